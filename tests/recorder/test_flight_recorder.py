"""A killed process leaves behind what it was doing; one that ends in order leaves nothing."""

import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.any_signs import ANY_SIGNS
from support.machine_speed import times_slower

from lib_lora_guard.recorder import crash as crash_module
from lib_lora_guard.recorder.crash import KEPT_FILES, last_crash
from lib_lora_guard.recorder.crash_report import avoid, crash_report
from lib_lora_guard.recorder.flight_recorder import RING_BYTES, FlightRecorder, Phase, name_only
from lib_lora_guard.recorder.flight_ring import BODY_BYTES, SLOT_BYTES, bodies, packed, start_of
from lib_lora_guard.recorder.processes import own_start_ms

ROOT = Path(crash_module.__file__).parents[2]

CHILD = """
import sys, time
from pathlib import Path
from lib_lora_guard.recorder.flight_recorder import FlightRecorder, Phase
recorder = FlightRecorder.open(Path(sys.argv[1]))
with recorder.enter(Phase.ENCODE_PROMPT):
    pass
for step in range(int(sys.argv[3])):
    with recorder.enter(Phase.SAMPLING_STEP, memory={"rss": step}):
        pass
with recorder.enter(Phase.APPLY_LORA, model=r"D:\\models\\flux1-dev.safetensors", architecture="Flux", storage="bf16",
                    loras=["style.safetensors", "/home/me/loras/人物.safetensors"], memory={"ram_available": 3 << 30}):
    with recorder.enter(Phase(sys.argv[2]), memory={"ram_available": 1 << 30, "swap_free": 1 << 29, "vram_free": None},
                        plan={"ram": 6 << 30}):
        print("in it", flush=True)
        if sys.argv[4] == "killed":
            time.sleep(60)
if sys.argv[4] == "idle":
    print("idle", flush=True)
    time.sleep(60)
recorder.close()
"""


def start(folder, phase=Phase.MERGE, steps=0, end="killed"):
    arguments = [sys.executable, "-c", CHILD, str(folder), phase.value, str(steps), end]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")


def kill(child, wait_for="in it"):
    with child:
        while child.stdout.readline().strip() != wait_for:
            assert child.poll() is None, "the child died by itself"
        child.kill()
        child.communicate()


def killed(folder, **how):
    """The ring file of a process that was killed."""
    kill(start(folder, **how))
    (ring,) = folder.glob("flight-*.ring")
    return ring


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """One process in every phase, all at the same time."""
    started = {}
    for phase in Phase:
        folder = tmp_path_factory.mktemp(phase.value)
        started[phase] = folder, start(folder, phase)
    yield started
    for _, child in started.values():
        with child:  # each is killed by its own test, if that was run
            child.kill()


@pytest.fixture
def recorder(tmp_path):
    recorder = FlightRecorder.open(tmp_path)
    yield recorder
    recorder.close()


@pytest.fixture
def dead(tmp_path, monkeypatch):
    """The file of this process, once this process counts as dead."""
    recorder = FlightRecorder.open(tmp_path)
    monkeypatch.setattr(crash_module, "is_running", lambda pid, start_ms: False)
    yield recorder
    recorder.close()


@pytest.mark.parametrize("phase", list(Phase))
def test_the_next_start_names_the_phase_that_was_killed(children, phase):
    folder, child = children[phase]
    before = time.time()
    kill(child)
    crash = last_crash(folder)
    assert (crash.phase, crash.phases) == (phase, (Phase.APPLY_LORA, phase))
    assert crash.pid == child.pid
    assert (crash.model, crash.architecture, crash.storage) == ("flux1-dev.safetensors", "Flux", "bf16")
    assert (crash.loras, crash.lora_count) == (("style.safetensors", "人物.safetensors"), 2)
    assert crash.memory == {"ram_available": 1 << 30, "swap_free": 1 << 29}
    assert crash.plan == {"ram": 6 << 30}
    assert before - 60 < crash.since <= crash.memory_time <= crash.time <= time.time()
    assert last_crash(folder) is None, "told once"
    assert crash_report(crash)[0].facts["phase"].key == f"flight.phase_{phase.value}"


def test_nothing_is_told_of_a_clean_end_nor_of_an_idle_process(tmp_path):
    clean, idle = start(tmp_path / "a", end="clean"), start(tmp_path / "b", end="idle")
    assert clean.communicate()[0].strip() == "in it"
    assert clean.returncode == 0
    kill(idle, "idle")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert last_crash(folder) is None
        assert list(folder.iterdir()) == []
    assert last_crash(tmp_path / "no such folder") is None


def test_the_ring_wraps_around(tmp_path):
    crash = last_crash(killed(tmp_path, steps=200).parent)
    assert (crash.phase, crash.plan, crash.model) == (Phase.MERGE, {"ram": 6 << 30}, "flux1-dev.safetensors")


def test_every_record_has_a_slot_of_its_own_also_after_the_end(tmp_path, recorder):
    for step in range(100):
        recorder.note(memory={"rss": step})
    (ring,) = tmp_path.glob("*.ring")
    kept = [json.loads(body)["memory"]["rss"] for body in bodies(ring.read_bytes())]
    assert kept == list(range(100 - RING_BYTES // SLOT_BYTES, 100))


def test_a_file_that_cannot_be_deleted_at_the_end_tells_of_no_crash(dead, tmp_path, monkeypatch):
    with dead.enter(Phase.MERGE), monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError))
        dead.close()
    assert len(list(tmp_path.iterdir())) == 1
    assert last_crash(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_recorder_can_be_closed_in_the_middle_of_a_write(tmp_path, dead, monkeypatch):
    """As a handler of Ctrl+C does, in the thread that it interrupts."""

    def interrupted(number, body):
        dead.close()
        return packed(number, body)

    monkeypatch.setattr("lib_lora_guard.recorder.flight_recorder.packed", interrupted)
    with dead.enter(Phase.MERGE):
        assert list(tmp_path.iterdir()) == []


def test_a_killed_child_that_was_not_waited_for_is_dead(tmp_path):
    with start(tmp_path) as child:
        assert child.stdout.readline().strip() == "in it"
        assert last_crash(tmp_path) is None
        child.kill()
        until = time.monotonic() + 10
        while (crash := last_crash(tmp_path)) is None and time.monotonic() < until:
            time.sleep(0.01)
        assert crash.phase is Phase.MERGE


def test_a_number_that_was_given_out_again_is_another_process(tmp_path):
    record = {"open": [["merge", 1.0]], "time": 1.0}
    path = tmp_path / f"flight-{os.getpid()}-{own_start_ms() - 60_000}.ring"
    path.write_bytes(packed(0, json.dumps(record).encode()).ljust(SLOT_BYTES, b"\0"))
    assert last_crash(tmp_path).phase is Phase.MERGE


def test_of_two_processes_each_has_its_file_and_the_living_one_stays(tmp_path, recorder):
    with recorder.enter(Phase.RESTORE):
        first, second = start(tmp_path, Phase.UNLOAD), start(tmp_path, Phase.VAE_DECODE)
        kill(first)
        assert last_crash(tmp_path).phase is Phase.UNLOAD
        kill(second)
        assert last_crash(tmp_path).phase is Phase.VAE_DECODE
        assert last_crash(tmp_path) is None
        assert len(list(tmp_path.glob("*.ring"))) == 1, "that of this process, which lives"


def test_the_newest_of_several_crashes_is_told_and_a_few_files_stay(tmp_path):
    children = [start(tmp_path, phase) for phase in (Phase.LOAD_CHECKPOINT, Phase.BACKUP, *[Phase.MERGE] * KEPT_FILES)]
    for child in children[2:] + children[:2]:
        kill(child)
    rings = {int(path.name.split("-")[1]): path for path in tmp_path.glob("*.ring")}
    newest = json.loads(bodies(rings[children[1].pid].read_bytes())[-1]) | {"time": time.time() + 100}
    rings[children[1].pid].write_bytes(packed(0, json.dumps(newest).encode()).ljust(SLOT_BYTES, b"\0"))
    assert last_crash(tmp_path).phase is Phase.BACKUP
    assert {path.suffix for path in tmp_path.iterdir()} == {".told"}
    assert len(list(tmp_path.iterdir())) == KEPT_FILES


def test_a_torn_last_record_is_skipped(tmp_path):
    ring = killed(tmp_path)
    whole = ring.read_bytes()
    count = len(bodies(whole))
    assert count == 4
    last = start_of(count - 1, len(whole))
    ring.write_bytes(whole[: last + 300] + bytes(len(whole) - last - 300))
    crash = last_crash(tmp_path)
    assert (crash.phase, crash.plan) == (Phase.APPLY_LORA, {}), "what the record before it says"
    assert crash.memory == {"ram_available": 3 << 30}


@pytest.mark.parametrize("garbage", [b"", b"\0" * RING_BYTES, random.Random(1).randbytes(5000), b"LGF1" * 2000])
def test_a_file_of_something_else_is_no_crash_and_goes(tmp_path, garbage):
    (tmp_path / "flight-999999999-1.ring").write_bytes(garbage)
    (tmp_path / "notes.txt").write_bytes(garbage)
    assert last_crash(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


RING = b"".join(
    packed(n, json.dumps({"n": n, "open": [["merge", n]]}).encode()).ljust(SLOT_BYTES, b"\0") for n in range(4)
)


@given(st.integers(0, len(RING) * 8 - 1))
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_costs_at_most_its_own_record(bit):
    broken = bytearray(RING)
    broken[bit // 8] ^= 1 << bit % 8
    found = [json.loads(body)["n"] for body in bodies(bytes(broken))]
    assert found == sorted(found)
    hit = bit // 8 // SLOT_BYTES
    assert [n for n in range(4) if n not in found] in ([], [hit])
    used = len(packed(hit, b"")) + len(bodies(RING)[hit])
    assert (hit in found) == (bit // 8 % SLOT_BYTES >= used), "every byte that is used is checked"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(ANY_SIGNS, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(ANY_SIGNS, max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("time", "open", "plan", "memory", "memory_time", "model", "architecture", "storage", "loras", "lora_count")


@example({"loras": [None, []], "memory": {"rss": "1"}, "time": 1e300}, [])
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, ANYTHING)), ANYTHING)
@settings(max_examples=150, deadline=None)
def test_a_whole_record_of_any_content_stops_nothing(tmp_path_factory, record, phase):
    folder = tmp_path_factory.mktemp("any")
    body = json.dumps({"open": [[phase, 1]], **record}).encode()[:BODY_BYTES]
    (folder / "flight-999999999-1.ring").write_bytes(packed(3, body).ljust(SLOT_BYTES, b"\0"))
    crash = last_crash(folder)
    if crash is not None:
        assert crash_report(crash)
        assert isinstance(avoid(crash, "a", "b"), frozenset)
    assert list(folder.glob("*.ring")) == []


def test_phases_nest_and_end_also_when_something_is_raised(dead, tmp_path):
    plans = {}
    with dead.enter(Phase.LOAD_CHECKPOINT, plan={"ram": 1}, model="a.gguf"):
        with pytest.raises(KeyError), dead.enter(Phase.UNLOAD, plan={"ram": 2}):
            raise KeyError
        with dead.enter(Phase.MOVE_TO_GPU):
            dead.note(memory={"rss": 7}, plan={"vram": 5})
            plans["inner"] = newest(tmp_path)
        plans["outer"] = newest(tmp_path)
    assert [[p for p, _ in plans[k]["open"]] for k in ("inner", "outer")] == [
        ["load_checkpoint", "move_to_gpu"],
        ["load_checkpoint"],
    ]
    assert (plans["inner"]["plan"], plans["outer"]["plan"]) == ({"vram": 5}, {"ram": 1})
    assert newest(tmp_path)["open"] == []
    assert newest(tmp_path)["model"] == "a.gguf"
    assert newest(tmp_path)["memory"] == {"rss": 7}


def newest(folder):
    (ring,) = folder.glob("*.ring")
    return json.loads(bodies(ring.read_bytes())[-1])


def test_a_phase_of_a_later_version_is_told_as_something_else(dead, tmp_path):
    with dead.enter(Phase.MERGE):
        (ring,) = tmp_path.glob("*.ring")
        record = newest(tmp_path) | {"open": [["teleport", 1.0]]}
        with ring.open("r+b") as file:
            file.write(packed(9, json.dumps(record).encode()))
        assert last_crash(tmp_path).phase is Phase.OTHER


def test_a_file_of_another_machine_may_be_in_use_for_a_day(tmp_path):
    path = tmp_path / f"flight-999999999-{own_start_ms()}.ring"
    record = {"open": [["merge", 1.0]], "machine": "another", "time": time.time()}
    path.write_bytes(packed(0, json.dumps(record).encode()).ljust(SLOT_BYTES, b"\0"))
    assert last_crash(tmp_path) is None
    assert path.exists()
    old = path.with_name("flight-999999999-1000.ring")
    record["time"] -= 2 * crash_module.FOREIGN_SECONDS
    path.rename(old)
    old.write_bytes(packed(0, json.dumps(record).encode()).ljust(SLOT_BYTES, b"\0"))
    assert last_crash(tmp_path).phase is Phase.MERGE


def test_only_names_and_little_of_them_are_kept(dead, tmp_path):
    loras = [f"C:\\secret\\place/{'长' * 100}{n}.safetensors" for n in range(300)]
    numbers = {f"{'k' * 100}{n}": 1 << 40 for n in range(50)}
    with dead.enter(
        Phase.MERGE, model="/secret/x/m\n.gguf", loras=loras, memory=numbers, plan=numbers, storage="s" * 999
    ):
        assert b"secret" not in next(tmp_path.glob("*.ring")).read_bytes()
        crash = last_crash(tmp_path)
    assert (crash.phase, crash.model, crash.lora_count) == (Phase.MERGE, "m?.gguf", 300)
    assert name_only("a\\b/c.d") == "c.d"


def test_a_folder_that_cannot_be_written_is_said_and_there_is_no_recorder(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert FlightRecorder.open(tmp_path / "file" / "folder") is None
    assert len(caplog.records) == 1
    assert "no flight record can be kept" in caplog.text
    assert last_crash(tmp_path / "file" / "folder") is None
    silent = FlightRecorder()
    with silent.enter(Phase.MERGE, memory={"rss": 1}):
        silent.note(model="x")
    silent.close()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="folders have no such flag, or root ignores it")
def test_a_read_only_folder(tmp_path):
    killed(tmp_path)
    tmp_path.chmod(0o500)
    try:
        assert FlightRecorder.open(tmp_path) is None
        assert last_crash(tmp_path).phase is Phase.MERGE
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_gets_no_mapping(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1 << 20}))
    assert FlightRecorder.open(tmp_path) is None
    assert "less than 16 MB free" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_raises_nothing_and_is_reported_once(recorder, caplog):
    recorder.note(memory={"rss": "many"})
    recorder.note(memory={"rss": "many"})
    with recorder.enter(Phase.MERGE):
        pass
    assert [record.args[0].key for record in caplog.records] == ["flight.given_up"]
    assert "ValueError" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody make a mapped file shorter")
def test_a_ring_file_made_shorter_does_not_end_the_process(tmp_path, recorder, caplog):
    with recorder.enter(Phase.MERGE):
        next(tmp_path.glob("*.ring")).write_bytes(b"")
    assert "the file has 0 bytes, expected 65536" in caplog.text
    another = FlightRecorder.open(tmp_path)
    next(tmp_path.glob("*.ring")).write_bytes(b"")
    another.close()
    assert list(tmp_path.iterdir()) == []


def test_a_second_recorder_of_one_process_starts_anew(tmp_path, recorder):
    with recorder.enter(Phase.MERGE):
        again = FlightRecorder.open(tmp_path)
        assert len(list(tmp_path.glob("*.ring"))) == 1
        with again.enter(Phase.RESTORE):
            assert newest(tmp_path)["open"][-1][0] == "restore"
        again.close()
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_crash_file_that_another_start_has_taken_is_not_reported_again(dead, tmp_path, monkeypatch):
    with dead.enter(Phase.MERGE):
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
        assert last_crash(tmp_path) is None
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError))
        assert last_crash(tmp_path).phase is Phase.MERGE, "better told again than never"


def test_a_record_costs_less_than_50_microseconds(recorder):
    memory = dict.fromkeys(
        ("vram_free", "vram_total", "ram_available", "ram_total", "swap_free", "alive", "rss"), 1 << 33
    )
    loras = [f"lora-{n}.safetensors" for n in range(10)]

    def per_record(count=10):
        begun = time.perf_counter()
        for _ in range(count):
            with recorder.enter(Phase.SAMPLING_STEP, loras=loras, memory=memory, plan={"ram": 1 << 30}):
                pass
        return (time.perf_counter() - begun) / (2 * count)

    # The best of many: the others measure what else the machine does.
    assert min(per_record() for _ in range(300)) < 50e-6 * times_slower()
