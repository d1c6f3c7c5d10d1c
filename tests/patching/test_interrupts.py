"""A thin form of `interrupt_sweep.py` and `thread_sweep.py`, which are run by hand: a part of the places, in every mode."""

import signal
import sys
from contextlib import nullcontext

import pytest
import torch
from interrupt_sweep import ACTS, MODES, Case, Files, Tracer, alarms, count_places, sweep, sweep_twice
from support.short_way import take_short_way_of_plain_layers
from thread_sweep import Threads

from lib_lora_guard.patching import merge_attachment
from lib_lora_guard.patching.bypass import Bypass
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.transaction import Transaction

PLACES = 6
"""Interrupts a case: 96 in all, of the 18,000 of the script."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("loras"))


@pytest.fixture(autouse=True)
def merged_late(monkeypatch):
    """As weights above 1 MB are: merged when they are put in place. (And the log would hold what is to be freed.)"""
    monkeypatch.setattr(merge_attachment, "KEPT_BYTES", 16)
    monkeypatch.setattr("lib_lora_guard.patching.transaction.log.disabled", True)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    trace = sys.gettrace()
    yield
    sys.settrace(trace)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_leaves_the_stack_before_or_the_one_after(files, mode, act):
    case = Case(files, act, mode)
    sweep(case, max(1, count_places(case) // PLACES), start=1 + len(act))
    assert case.found["interrupts"] >= PLACES - 2
    assert not case.found["wrong"], case.examples


@pytest.mark.parametrize("act", ["apply", "change", "remove"])
def test_the_same_with_the_short_way_of_layers(files, act, monkeypatch):
    passes = take_short_way_of_plain_layers(monkeypatch)
    case = Case(files, act, "bypass")
    sweep(case, max(1, count_places(case) // PLACES), start=1 + len(act))
    assert passes
    assert case.found["interrupts"] >= PLACES - 2
    assert not case.found["wrong"], case.examples


@pytest.mark.parametrize(("mode", "act"), [("bypass", "change"), ("merge", "remove"), ("on_the_fly", "apply")])
def test_a_second_interrupt_while_the_first_is_undone_changes_nothing_of_it(files, mode, act):
    case = Case(files, act, mode)
    places = count_places(case)
    for first in range(3, places, max(1, places // 4)):
        for second in (1, 9, 25):
            case.run(Tracer(first, second))
    assert case.found["interrupts"] > 6
    assert not case.found["wrong"], case.examples


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals at a given time are POSIX")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file whose `with` was cut off
@pytest.mark.parametrize("twice", [False, True])
def test_real_signals_at_random_times(files, twice):
    cases = [Case(files, act, mode) for mode, act in (("bypass", "change"), ("merge", "change"))]
    alarms(cases, 30, twice, seed=1)
    assert sum(case.found["interrupts"] for case in cases) == 30
    assert not any(case.found["wrong"] for case in cases), [case.examples for case in cases]


@pytest.mark.parametrize("mode", MODES)
def test_two_threads_apply_while_four_run_the_layers(files, mode):
    threads = Threads(files, (mode,), removes=False)
    found = threads(0.4, at_least=2)
    assert found["changes"] > 1
    assert found["passes"] > 1
    assert not found["wrong"], threads.examples


def is_seen(case):
    sweep(case, max(1, count_places(case) // (4 * PLACES)))
    return case.found["wrong"] > 0


def test_a_change_that_is_not_undone_is_seen(files, monkeypatch):
    monkeypatch.setattr(Engine, "_settle", lambda self: None)
    assert is_seen(Case(files, "change", "bypass"))


def test_a_lock_that_stays_taken_is_seen(files):
    case = Case(files, "change", "bypass")
    case.patience_seconds = 0.2

    def taken(work):
        work()
        case.guard._engine._lock.acquire()
        return True

    case.run(taken)
    assert case.found["a lock stays taken"] == 1


def test_an_undo_that_ends_at_a_second_interrupt_is_seen(files, monkeypatch):
    def once(self):
        monkeypatch.setattr(Engine, "_settle", lambda self: None)
        try:
            self._undo()
        finally:
            monkeypatch.setattr(Engine, "_settle", once)

    monkeypatch.setattr(Engine, "_settle", once)
    case = Case(files, "change", "bypass")
    # The number of places differs with what ran before: a few first ones may all be between two changes.
    sweep_twice(case, max(1, count_places(case) // 10), 5)
    assert case.found["half patched"] > 0


def test_hooks_that_are_noted_instead_of_looked_for_are_seen(files, monkeypatch):
    attach, notes = Bypass.attach, {}

    def noting(self, layer):
        before = set(layer._forward_hooks) | set(layer._forward_pre_hooks)
        attach(self, layer)
        notes[self] = (set(layer._forward_hooks) | set(layer._forward_pre_hooks)) - before

    def forgetting(self, layer):
        for number in notes.pop(self, ()):
            layer._forward_hooks.pop(number, None)
            layer._forward_pre_hooks.pop(number, None)

    monkeypatch.setattr(Bypass, "attach", noting)
    monkeypatch.setattr(Bypass, "detach", forgetting)
    assert is_seen(Case(files, "apply", "bypass"))


def test_an_undo_that_leaves_steps_out_is_seen(files, monkeypatch):
    monkeypatch.setattr(Transaction, "undo", lambda self: (None, None))
    assert is_seen(Case(files, "change", "on_the_fly"))


def test_two_writers_at_once_are_seen(files, monkeypatch):
    """Without the lock a second thread takes what the first has made for the original."""

    class NoLock(nullcontext):
        def _is_owned(self):
            return False

    init = Engine.__init__

    def unlocked(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self._lock = NoLock()

    monkeypatch.setattr(Engine, "__init__", unlocked)
    assert any(Threads(files, ("merge",), removes=True, seed=n)(0.3)["wrong"] for n in range(20))


def test_a_grad_mode_that_stays_off_is_seen(files):
    case = Case(files, "apply", "bypass")

    def work(act):
        act()
        torch.set_grad_enabled(False)
        return True

    case.run(work)
    assert case.examples == [["gradients stay off"]]
