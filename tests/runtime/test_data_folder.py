"""What lies in the guard's folder under its files' names never keeps a host from starting, and is said in one line."""

import itertools
import json
import logging
import os
import threading

import pytest
from test_private_files import mode, plant, posix

from lib_lora_guard.memory.calibration import Calibration, Key, Kind
from lib_lora_guard.recorder.crash import last_crash
from lib_lora_guard.recorder.flight_recorder import Phase
from lib_lora_guard.recorder.flight_ring import SLOT_BYTES, packed
from lib_lora_guard.recorder.processes import own_start_ms
from lib_lora_guard.runtime.data_folder import look_over
from lib_lora_guard.runtime.journal import Journal

CALIBRATION = ("calibration.json", "calibration.json.lock", "calibration.json.tmp", "calibration.json.old")
KINDS = ("folder", "pipe", "socket", "device", "dangling")


class Memory:
    """A look at the memory."""

    alive_ram_bytes = 1

    def readings(self):
        return []


def work_in(folder):
    """All that a host does with the folder from its start to its end; raises if it waits for something."""
    done = []

    def work():
        look_over(folder)
        journal = Journal(Memory)
        journal.open(folder)
        with journal.phase(Phase.MERGE):
            calibration = Calibration(folder / "calibration.json", "card", "2.3")
            for _ in range(2):
                calibration.record(Key(Kind.LOAD, "SDXL", "bf16"), 1000, 1100)
        journal.close()
        done.append(calibration.correction_bytes(Key(Kind.LOAD, "SDXL", "bf16")))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert done == [100], "it hangs or has raised"


def keys(caplog):
    return [record.args[0].key for record in caplog.records]


@posix
@pytest.mark.parametrize("kind", KINDS)
def test_each_thing_is_passed_by_and_all_of_them_are_said_in_one_line(tmp_path, caplog, kind):
    names = [*CALIBRATION, "flight-7-7.ring", "flight-7-7.told", "flight-x.ring", "notes.txt"]
    for name in names:
        plant(tmp_path / name, kind, tmp_path)
    work_in(tmp_path)
    assert keys(caplog) == ["private.in_the_way", "calibration.not_kept"]
    assert "7 things" in caplog.text
    assert f"(calibration.json: {'a link to nothing' if kind == 'dangling' else 'a ' + kind})" in caplog.text
    left = {path.name for path in tmp_path.iterdir()}
    assert left == set(names), "nothing is taken away, and the recorder's own file is gone"


@posix
@pytest.mark.parametrize(("name", "kind"), list(itertools.product(CALIBRATION[1:3], KINDS)))
def test_a_lock_or_a_temporary_file_that_is_none_costs_the_corrections_at_most(tmp_path, caplog, name, kind):
    plant(tmp_path / name, kind, tmp_path)
    work_in(tmp_path)
    is_written = (tmp_path / "calibration.json").exists()
    assert is_written == ("calibration.not_kept" not in keys(caplog))
    assert keys(caplog).count("private.in_the_way") == 1


@pytest.mark.parametrize("thing", ["file", "dangling", "pipe"])
@posix
def test_something_else_in_place_of_the_folder(tmp_path, caplog, thing):
    folder = tmp_path / "data"
    folder.write_text("x") if thing == "file" else plant(folder, thing, tmp_path)
    work_in(folder)
    assert keys(caplog) == ["flight.not_kept", "calibration.not_kept"]


def test_garbage_is_said_once_and_nothing_of_it_stays_in_the_way(tmp_path, caplog):
    for n in range(9):
        (tmp_path / f"flight-99999999{n}-1.ring").write_bytes(b"garbage" * n)
    (tmp_path / "calibration.json").write_bytes(b"[" * 50_000)
    work_in(tmp_path)
    assert keys(caplog) == ["flight.damaged", "calibration.begun_anew"]
    assert "killed: 8 (flight-999999991-1.ring)" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == set(CALIBRATION) - {"calibration.json.tmp"}
    assert json.loads((tmp_path / "calibration.json").read_text())["entries"]


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_said_and_kept(tmp_path, caplog):
    for name in ("calibration.json", "flight-7-7.ring"):
        (tmp_path / name).write_bytes(b"of another user")
        (tmp_path / name).chmod(0)
    work_in(tmp_path)
    assert keys(caplog) == ["private.in_the_way", "calibration.not_kept"]
    assert "2 things" in caplog.text
    assert len(list(tmp_path.iterdir())) == 3


def test_a_calibration_that_cannot_be_read_is_never_replaced(tmp_path, caplog, monkeypatch):
    from lib_lora_guard.memory import calibration_file

    path = tmp_path / "calibration.json"
    path.write_bytes(b"of another user")
    opened = calibration_file.open_private

    def refusing(file, how):
        if file == path:
            raise PermissionError(13, "Permission denied")
        return opened(file, how)

    monkeypatch.setattr(calibration_file, "open_private", refusing)
    work_in(tmp_path)
    assert path.read_bytes() == b"of another user"
    assert keys(caplog) == ["calibration.not_kept"]


@posix
def test_every_file_is_for_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        journal = Journal(Memory)
        journal.open(tmp_path / "data")
        Calibration(tmp_path / "data" / "calibration.json", "card", "2.3").record(Key(Kind.LOAD, "a", "b"), 1000, 1100)
        found = {path.name: mode(path) for path in (tmp_path / "data").iterdir()}
        journal.close()
    finally:
        os.umask(before)
    assert mode(tmp_path / "data") == 0o700
    assert len(found) == 3
    assert set(found.values()) == {0o600}


@posix
def test_another_programs_file_under_the_recorders_name_is_not_written(tmp_path):
    other, folder = tmp_path / "other", tmp_path / "data"
    folder.mkdir()
    other.write_bytes(b"of another program")
    (folder / f"flight-{os.getpid()}-{own_start_ms()}.ring").hardlink_to(other)
    work_in(folder)
    assert other.read_bytes() == b"of another program"


@posix
@pytest.mark.parametrize("kind", KINDS)
def test_a_death_is_told_once_where_its_new_name_is_taken(tmp_path, kind):
    record = json.dumps({"time": 1.7e9, "open": [["merge", 1.7e9]]}).encode()
    (tmp_path / "flight-999999999-1.ring").write_bytes(packed(0, record).ljust(SLOT_BYTES, b"\0"))
    plant(tmp_path / "flight-999999999-1.told", kind, tmp_path)
    assert last_crash(tmp_path).phase is Phase.MERGE
    assert last_crash(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["flight-999999999-1.told"]


def test_a_quiet_folder_says_nothing(tmp_path, caplog):
    (tmp_path / "anything").mkdir()
    caplog.set_level(logging.DEBUG)
    look_over(tmp_path)
    look_over(tmp_path / "none")
    assert caplog.records == []
