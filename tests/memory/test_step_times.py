"""Slow steps are told from hiccups, and a spilling driver from whatever else is slow."""

import ctypes
import math
import os
import platform
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_lora_guard.memory import shared_usage
from lib_lora_guard.memory.shared_usage import CounterItem, shared_usage_bytes
from lib_lora_guard.memory.step_times import LEAST_STEPS, Slowdown, StepTimes, Verdict, driver_spills
from lib_lora_guard.units import MB

NORMAL = [1.0, 1.1, 0.9, 1.0]


def fed(seconds, times=None, **how):
    """What each step says."""
    times = times or StepTimes(driver_spills=True)
    return [times.add("flux 1024", s, **how) for s in seconds]


@pytest.mark.parametrize(
    ("seconds", "said_at"),
    [
        (NORMAL, None),
        ([*NORMAL, 2.9, 2.9, 2.9], None),
        ([*NORMAL, 3.1], None),
        ([*NORMAL, 3.1, 1.0, 3.1, 1.0], None),
        ([*NORMAL, 3.1, 3.1], 5),
        ([*NORMAL, 10.1], 4),
        ([*NORMAL, 9.9], None),
        ([*NORMAL, 3.1, 30.0, 30.0, 30.0], 5),
        ([1.0] * (LEAST_STEPS - 2) + [30.0] * 2, None),
        ([0.05] * 9 + [0.5] * 3, None),
        ([0.05] * 9 + [0.6], 9),
        ([0.05] * 9 + [0.56] * 2, 9),
        ([*NORMAL, math.nan, math.inf, 0.0, -1.0], None),
    ],
)
def test_two_slow_steps_in_a_row_or_one_very_slow_one(seconds, said_at):
    said = fed(seconds)
    assert [n for n, slowdown in enumerate(said) if slowdown is not None] == ([] if said_at is None else [said_at])
    if said_at is not None:
        assert said[said_at].seconds == seconds[said_at]


def test_slow_steps_are_reported_once_until_a_normal_step():
    said = fed([*NORMAL, 4.0, 5.0, 6.0, 1.0, 7.0, 8.0, 9.0])
    first, second = (slowdown for slowdown in said if slowdown is not None)
    assert first == Slowdown(Verdict.LIKELY, 5.0, 1.0, 4)
    assert first.factor == 5.0
    assert (second.seconds, second.steps) == (8.0, 5), "slow steps do not become the usual"


def test_first_steps_count_for_nothing_and_configurations_are_apart():
    times = StepTimes(driver_spills=True)
    for n in range(20):
        assert times.add("a", 60.0 if n % 5 == 0 else 1.0, first=n % 5 == 0) is None
    assert times.add("b", 30.0) is None
    assert times.add("a", 30.0).median_seconds == 1.0
    assert times.add("a", 4.0, first=True) is None
    for n in range(100):
        times.add(n, 1.0)
    assert len(times._histories) == 64
    assert times.add("a", 30.0) is None, "forgotten, and known anew"


@pytest.mark.parametrize(
    ("spills", "before_mb", "now_mb", "verdict"),
    [
        (True, 300, 900, Verdict.SPILLED),
        (True, 300, 556, Verdict.SPILLED),
        (True, 300, 555, Verdict.OTHER),
        (True, None, None, Verdict.LIKELY),
        (True, None, 900, Verdict.LIKELY),
        (True, 300, None, Verdict.LIKELY),
        (False, None, None, Verdict.OTHER),
    ],
)
def test_the_verdict_needs_evidence(spills, before_mb, now_mb, verdict):
    times = StepTimes(spills)
    fed(NORMAL, times, shared_bytes=None if before_mb is None else before_mb * MB)
    (slowdown,) = fed([20.0], times, shared_bytes=None if now_mb is None else now_mb * MB)
    assert slowdown.verdict is verdict
    if verdict is Verdict.SPILLED:
        assert (slowdown.shared_before_bytes, slowdown.shared_bytes) == (before_mb * MB, now_mb * MB)


def test_a_slow_step_is_logged_with_its_cure():
    spilled = Slowdown(Verdict.SPILLED, 29.0, 1.01, 12, 300 * MB, 2300 * MB)
    assert [str(line) for line in spilled.messages(lower_mb=512)] == [
        "a step took 29.0 s, 28.7 times the usual 1.01 s (median of 12 steps of the same kind)",
        "VRAM is too full: the graphics driver moved a part of it into system memory (shared GPU memory went from 300 to "
        "2300 MB)",
        "to prevent it: NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy > Prefer No Sysmem "
        "Fallback, then start Forge again; what does not fit is then reported and handled instead of becoming slow",
        "or lower 'GPU Weights' by 512 MB",
    ]
    keys = [
        [line.key for line in Slowdown(verdict, 9.0, 1.0, 4, *shared).messages(**how)]
        for verdict, shared, how in (
            (Verdict.LIKELY, (), {"lower_mb": 9, "nvidia": False}),
            (Verdict.LIKELY, (MB, None), {}),
            (Verdict.OTHER, (MB, MB), {"lower_mb": 9}),
            (Verdict.OTHER, (), {}),
        )
    ]
    assert keys == [
        ["spill.slow", "spill.likely", "spill.lower"],
        ["spill.slow", "spill.likely", "spill.setting"],
        ["spill.slow", "spill.not_grown"],
        ["spill.slow", "spill.other"],
    ]


@given(st.lists(st.floats(0.5, 2.9), min_size=1, max_size=30).filter(lambda s: max(s) < 3 * min(s)))
def test_steps_within_a_factor_of_three_never_say_anything(seconds):
    assert fed(seconds) == [None] * len(seconds)


@given(st.lists(st.floats(0.5, 1.4), min_size=LEAST_STEPS, max_size=30), st.floats(4.3, 100), st.floats(4.3, 100))
def test_two_steps_three_times_as_slow_as_all_others_always_do(seconds, one, other):
    said = fed([*seconds, one, other])
    assert said[: len(seconds)] == [None] * len(seconds)
    assert sum(slowdown is not None for slowdown in said[len(seconds) :]) == 1


@pytest.mark.parametrize(
    ("system", "release", "spills"),
    [("Windows", "10", True), ("Linux", "6.1.0-9-amd64", False), ("Linux", "5.15.90.1-microsoft-standard-WSL2", True)],
)
def test_drivers_of_windows_and_wsl_spill(monkeypatch, system, release, spills):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert driver_spills() is spills


class FakePdh:
    """Windows' library as far as it is used; `fails` is the function that does not succeed, `items` are (status, value)."""

    def __init__(self, items=(), fails=""):
        self.items, self.fails, self.open, self.path = items, fails, 0, None

    def _status(self, function):
        return -1073738824 if self.fails == function else 0  # PDH_CSTATUS_NO_OBJECT, signed as ctypes has it

    def PdhOpenQueryW(self, source, user_data, query):  # noqa: N802  # as Windows calls it
        self.open += self.fails != "PdhOpenQueryW"
        query._obj.value = 11
        return self._status("PdhOpenQueryW")

    def PdhAddEnglishCounterW(self, query, path, user_data, counter):  # noqa: N802  # as Windows calls it
        assert query.value == 11
        self.path, counter._obj.value = path.value, 22
        return self._status("PdhAddEnglishCounterW")

    def PdhCollectQueryData(self, query):  # noqa: N802  # as Windows calls it
        assert (query.value, self.path is None) == (11, False)
        return self._status("PdhCollectQueryData")

    def PdhGetFormattedCounterArrayW(self, counter, form, size, count, buffer):  # noqa: N802  # as Windows calls it
        assert (counter.value, form) == (22, 0x400)
        if buffer is None:
            size._obj.value = len(self.items) * ctypes.sizeof(CounterItem) + 100
            return 0x800007D2 - (1 << 32) if self.fails != "size" else -1
        assert size._obj.value == len(buffer)
        array = (CounterItem * len(self.items))(*[CounterItem("pid_1_luid", *item) for item in self.items])
        ctypes.memmove(buffer, array, ctypes.sizeof(array))
        count._obj.value = len(self.items)
        return self._status("PdhGetFormattedCounterArrayW")

    def PdhCloseQuery(self, query):  # noqa: N802  # as Windows calls it
        assert query.value == 11
        self.open -= 1


def test_the_counters_of_all_adapters_are_added():
    pdh = FakePdh([(0, 5 << 30), (1, 7), (0xC0000BBA, 999)])
    assert shared_usage_bytes(pdh) == (5 << 30) + 7
    assert pdh.path == rf"\GPU Process Memory(pid_{os.getpid()}_*)\Shared Usage"
    assert pdh.open == 0


def test_an_item_has_the_layout_of_windows():
    if ctypes.sizeof(ctypes.c_void_p) == 8:
        assert (ctypes.sizeof(CounterItem), CounterItem.status.offset, CounterItem.value.offset) == (24, 8, 16)


@pytest.mark.parametrize(
    "fails",
    ["PdhOpenQueryW", "PdhAddEnglishCounterW", "PdhCollectQueryData", "size", "PdhGetFormattedCounterArrayW"],
)
def test_a_counter_that_does_not_answer_is_none(fails):
    pdh = FakePdh([(0, 5)], fails)
    assert shared_usage_bytes(pdh) is None
    assert pdh.open == 0, "the query is closed"
    assert shared_usage_bytes(FakePdh([(0xC0000BBA, 5)])) is None
    assert shared_usage_bytes(FakePdh([])) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has the library")
def test_elsewhere_there_is_none():
    assert shared_usage_bytes() is None


def test_a_windows_without_the_library_has_none(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(shared_usage.sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", missing, raising=False)
    assert shared_usage_bytes() is None
