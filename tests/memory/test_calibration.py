"""Corrections follow what was measured, within their bounds, whoever else writes the file."""

import importlib.util
import json
import logging
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.memory import calibration as calibration_module
from lib_lora_guard.memory import calibration_file, file_lock
from lib_lora_guard.memory.calibration import (
    BETWEEN_TRIES_SECONDS,
    LARGEST_ENTRIES,
    REMEMBERED,
    Calibration,
    Key,
    Kind,
    resolution_bucket,
    stack_signature,
)
from lib_lora_guard.memory.file_lock import locked

ROOT = Path(calibration_module.__file__).parents[2]
MB = 1 << 20
KEY = Key(Kind.STEP, "Flux", "nf4", 4, 1, "a1")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kept" / "calibration.json"


def made(path, card="RTX 3060", torch_version="2.3.1", **settings):
    return Calibration(path, card, torch_version, **settings)


def after(path, *errors_mb, predicted_mb=1000):
    calibration = made(path)
    for error in errors_mb:
        calibration.record(KEY, predicted_mb * MB, (predicted_mb + error) * MB)
    return calibration.correction_bytes(KEY) / MB


@pytest.mark.parametrize(
    ("errors_mb", "correction_mb"),
    [
        ([], 0),
        ([100], 100),
        ([-100], 0),
        ([-100] * (REMEMBERED - 1), 0),
        ([-100] * REMEMBERED, -100),
        ([-100, -90, -80, -70, -60], -60),
        ([-100] * REMEMBERED + [40], 40),
        ([200] + [-100] * (REMEMBERED - 1), 200),
        ([200] + [-100] * REMEMBERED, -100),
        ([5000], 500),
        ([-900] * REMEMBERED, -250),
    ],
)
def test_an_under_prediction_counts_at_once_and_an_over_prediction_late(path, errors_mb, correction_mb):
    assert after(path, *errors_mb) == correction_mb


def test_the_bounds_are_those_of_the_prediction_at_hand(path):
    calibration = made(path)
    calibration.record(KEY, 1000 * MB, 1400 * MB)
    assert [calibration.correction_bytes(KEY, n * MB) / MB for n in (2000, 1000, 400, 0, -5)] == [400, 400, 200, 0, 0]
    assert calibration.correction_bytes(KEY) == 400 * MB


def test_several_at_once_are_one_write(path, monkeypatch):
    writes, change = [], calibration_file.CalibrationFile.change
    monkeypatch.setattr(calibration_file.CalibrationFile, "change", lambda *args: writes.append(1) or change(*args))
    others = [Key(Kind.LOAD, f"model {n}", "nf4") for n in range(3)]
    calibration = made(path)
    calibration.record_all([*((key, 1000, 1010) for key in others), (KEY, 0, 5), (KEY, 5, -1)])
    assert [made(path).correction_bytes(key) for key in others] == [10, 10, 10]
    assert made(path).measurements(KEY) == 0
    calibration.record_all([])
    calibration.record_all([(KEY, 0, 1)])
    assert len(writes) == 1


def test_torchs_own_kind_of_version_is_kept_as_text(path):
    """It calls itself equal to other spellings, and takes 50 microseconds for it."""

    class Version(str):
        def __eq__(self, other):
            raise AssertionError("compared as a version")

        __hash__ = str.__hash__

    calibration = made(path, torch_version=Version("2.3.1"))
    calibration.record(KEY, 1000, 1100)
    assert calibration.correction_bytes(KEY) == made(path).correction_bytes(KEY) == 100


SIZES = st.integers(-10, calibration_module.LARGEST_BYTES * 2)


@given(st.lists(st.tuples(SIZES, SIZES), max_size=12), SIZES)
@settings(max_examples=60, deadline=None)
def test_bounds_and_caution_hold_for_any_numbers(tmp_path_factory, pairs, predicted):
    calibration = made(tmp_path_factory.mktemp("any") / "c.json")
    taken = [(p, m) for p, m in pairs if 0 < p <= 1 << 50 and 0 < m <= 1 << 50]
    for pair in pairs:
        calibration.record(KEY, *pair)
    assert calibration.measurements(KEY) == len(taken)
    correction = calibration.correction_bytes(KEY, predicted)
    assert -0.25 * max(0, predicted) <= correction <= 0.5 * max(0, predicted)
    worst = max([m - p for p, m in taken[-REMEMBERED:]], default=0)
    if worst > 0:
        assert correction == min(worst, max(0, predicted) // 2), "raised at once, by the worst that is remembered"
    if len(taken) < REMEMBERED:
        assert correction >= 0, "lowered late"


@pytest.mark.parametrize(
    "other", [{"kind": Kind.DECODE}, {"storage": "fp8"}, {"resolution": 9}, {"batch": 2}, {"stack": ""}]
)
def test_each_configuration_has_its_own(path, other):
    calibration = made(path)
    calibration.record(KEY, 1000 * MB, 1100 * MB)
    assert calibration.correction_bytes(Key(**{**KEY.__dict__, **other}), 1000 * MB) == 0
    assert made(path).correction_bytes(KEY) == 100 * MB, "kept in the file"
    assert made(path, card="RTX 4090").correction_bytes(KEY) == 0
    assert made(path, torch_version="2.4.0").correction_bytes(KEY) == 0


def test_resolution_and_stack_of_a_key():
    sizes = [(512, 512), (1024, 1024), (832, 1216), (1344, 768), (1024, 1025), (64, 64)]
    assert [resolution_bucket(*size) for size in sizes] == [1, 4, 4, 4, 5, 1]
    first, second = stack_signature(["a", "b"]), stack_signature(["ab"])
    assert first == stack_signature(iter(["a", "b"])) != second
    assert (len(first), stack_signature([])) == (16, "")


def test_the_number_of_entries_is_bounded_and_the_oldest_go(path):
    calibration = made(path)
    keys = [Key(Kind.LOAD, "SDXL", f"s{n}") for n in range(LARGEST_ENTRIES + 1)]
    path.parent.mkdir()
    fresh = {("RTX 3060", "2.3.1", "load", "SDXL", f"s{n}", "0", "1", ""): n for n in range(LARGEST_ENTRIES - 1)}
    entries = [{"key": name, "count": 1, "predicted": 1000, "errors": [n]} for name, n in fresh.items()]
    path.write_text(json.dumps({"version": calibration_file.VERSION, "entries": entries}), encoding="utf-8")
    calibration.record(keys[-2], 1000, 1001)
    calibration.record(keys[0], 1000, 1001)
    calibration.record(keys[-1], 1000, 1001)
    assert len(json.loads(path.read_text(encoding="utf-8"))["entries"]) == LARGEST_ENTRIES
    assert [calibration.measurements(key) for key in (keys[0], keys[1], keys[2], keys[-1])] == [2, 0, 1, 1]


WITHOUT_TORCH = """
import sys, types
from pathlib import Path
sys.modules["lib_lora_guard.memory"] = types.ModuleType("lib_lora_guard.memory")
sys.modules["lib_lora_guard.memory"].__path__ = [str(Path("lib_lora_guard", "memory"))]
"""
"""The package's own __init__ imports torch, which takes seconds."""

WRITER = (
    WITHOUT_TORCH
    + """
from lib_lora_guard.memory.calibration import Calibration, Key, Kind
calibration = Calibration(Path(sys.argv[1]), "card", "torch")
print("ready", flush=True)
sys.stdin.readline()
for n in range(100):
    calibration.record(Key(Kind.STEP, "Flux", "both"), 1000, 1100)
    if n % 10 == 0:
        calibration.record(Key(Kind.STEP, "Flux", f"{sys.argv[2]} {n}"), 1000, 1000 + n)
"""
)


def test_two_processes_lose_nothing(path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in ("first", "second")
    ]
    for writer in writers:
        assert writer.stdout.readline().strip() == b"ready"
    for writer in writers:
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    calibration = made(path, "card", "torch")
    assert calibration.measurements(Key(Kind.STEP, "Flux", "both")) == 200
    for name in ("first", "second"):
        kept = [calibration.correction_bytes(Key(Kind.STEP, "Flux", f"{name} {n}")) for n in range(0, 100, 10)]
        assert kept == list(range(0, 100, 10))
    assert {file.name for file in path.parent.iterdir()} == {"calibration.json", "calibration.json.lock"}


def test_threads_lose_nothing(path):
    calibration = made(path)
    threads = [
        threading.Thread(target=lambda: [calibration.record(KEY, 1000, 1010) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made(path).measurements(KEY) == 80


HOLDER = (
    WITHOUT_TORCH
    + """
import time
from lib_lora_guard.memory.file_lock import locked
with locked(Path(sys.argv[1]), 1.0):
    print("held", flush=True)
    time.sleep(60)
"""
)


def test_a_lock_ends_with_its_process_and_what_waited_is_written(path, monkeypatch, caplog):
    path.parent.mkdir()
    monkeypatch.setattr(calibration_file, "WAIT_SECONDS", 0.05)
    now = [1000.0]
    calibration = made(path, clock=lambda: now[0])
    arguments = [sys.executable, "-c", HOLDER, str(path) + ".lock"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline().strip() == b"held"
        with caplog.at_level(logging.WARNING):
            calibration.record(KEY, 1000, 1100)
            calibration.record(KEY, 1000, 1200)
        assert calibration.correction_bytes(KEY) == 200, "known here all the same"
        assert not path.exists()
        holder.kill()
    assert [record.args[0].key for record in caplog.records] == ["calibration.not_kept"], "said once"
    assert "calibration.json.lock is in use" in caplog.text
    # A try takes seconds where the file cannot be had, and images wait for it.
    now[0] += BETWEEN_TRIES_SECONDS - 1
    calibration.record(KEY, 1000, 1250)
    assert not path.exists()
    assert calibration.correction_bytes(KEY) == 250
    now[0] += 1
    calibration.record(KEY, 1000, 1300)
    assert made(path).measurements(KEY) == 4
    assert made(path).correction_bytes(KEY) == 300


def test_a_folder_that_cannot_be_written_leaves_the_corrections_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    calibration = made(tmp_path / "file" / "calibration.json")
    for n in range(LARGEST_ENTRIES + 20):
        calibration.record(Key(Kind.LOAD, "SDXL", f"s{n}"), 1000, 1100)
    calibration.record(KEY, 1000, 1100)
    assert calibration.correction_bytes(KEY) == 100
    assert len(calibration._entries) == LARGEST_ENTRIES
    assert len(caplog.records) == 1
    assert "estimates are corrected until this program ends" in caplog.text


ENTRY = {
    "key": ["RTX 3060", "2.3.1", "step", "Flux", "nf4", "4", "1", "a1"],
    "count": 1,
    "predicted": 1000,
    "errors": [70],
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00garbage",
        b"[" * 100_000,
        b"[]",
        b"3",
        json.dumps({"version": calibration_file.VERSION - 1, "entries": [ENTRY]}).encode(),
    ],
)
def test_a_file_of_something_else_is_kept_aside_once(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    calibration = made(path)
    assert calibration.correction_bytes(KEY, 1000) == 0
    assert path.read_bytes() == content, "reading changes nothing"
    calibration.record(KEY, 1000, 1100)
    assert made(path).correction_bytes(KEY) == 100
    aside = path.with_name("calibration.json.old")
    assert aside.read_bytes() == content
    path.write_bytes(b"garbage again")
    calibration.record(KEY, 1000, 1050)
    assert aside.read_bytes() == content
    assert made(path).correction_bytes(KEY) == 50


@pytest.mark.parametrize(
    "broken",
    [
        {"key": "Flux"},
        {"key": [1] * 8},
        {"key": ["a"]},
        {"errors": None},
        {"errors": [1.5]},
        {"errors": [True]},
        {"errors": [1 << 80]},
        {"predicted": 0},
        {"predicted": "1"},
        {"count": -1},
    ],
)
def test_a_broken_entry_is_dropped_and_the_others_are_kept(path, broken):
    path.parent.mkdir()
    right = {**ENTRY, "key": [*ENTRY["key"][:-1], "right"]}
    listed = [{**ENTRY, **broken}, 7, right]
    path.write_text(json.dumps({"version": calibration_file.VERSION, "entries": listed}), encoding="utf-8")
    calibration = made(path)
    assert calibration.correction_bytes(KEY, 1000) == 0
    assert calibration.correction_bytes(Key(Kind.STEP, "Flux", "nf4", 4, 1, "right")) == 70


def test_replacing_a_file_that_windows_holds_open_is_tried_again(path, monkeypatch):
    replace, refused = calibration_file.os.replace, []

    def sometimes(source, target):
        if len(refused) < 3:
            refused.append(source)
            raise PermissionError(13, "in use")
        replace(source, target)

    monkeypatch.setattr(calibration_file.os, "replace", sometimes)
    made(path).record(KEY, 1000, 1100)
    assert len(refused) == 3
    assert made(path).correction_bytes(KEY) == 100


def test_reset_deletes_the_corrections_of_every_card(path):
    first, second = made(path), made(path, card="RTX 4090")
    assert first.reset() == 0
    first.record(KEY, 1000, 1100)
    second.record(KEY, 1000, 1200)
    third = made(path)
    assert third.reset() == 2
    assert not path.exists()
    assert third.correction_bytes(KEY) == made(path).correction_bytes(KEY) == 0
    first.record(KEY, 1000, 990)
    assert first.correction_bytes(KEY) == 0, "nor does a process that still runs write it back"


def test_the_file_lock_excludes_threads_and_reports_a_wait_in_vain(tmp_path):
    path = tmp_path / "lock"
    with locked(path, 0), pytest.raises(TimeoutError, match="lock is in use"), locked(path, 0.03):
        pass
    with locked(path, 0):
        pass


def test_on_windows_the_first_byte_is_locked(tmp_path, monkeypatch):
    calls, held = [], [True, True, False]

    def locking(descriptor, mode, count):
        calls.append((mode, count))
        if mode == "lock" and held.pop(0):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(
        sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK="lock", LK_UNLCK="unlock", locking=locking)
    )
    monkeypatch.setattr(sys, "platform", "win32")
    name = "lib_lora_guard.memory.file_lock_on_windows"
    specification = importlib.util.spec_from_file_location(name, file_lock.__file__)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    with module.locked(tmp_path / "lock", 5):
        assert calls == [("lock", 1)] * 3
    assert calls[3:] == [("unlock", 1)]
