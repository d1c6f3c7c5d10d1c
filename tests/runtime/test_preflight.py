"""RAM is looked at before something large is read or moved."""

import logging
import sys
import types

import pytest

from lib_lora_guard.errors import MemoryShortError
from lib_lora_guard.hosts.webui.checkpoint_reading import CheckpointReading
from lib_lora_guard.messages import Message
from lib_lora_guard.planning.host_memory import RAM_FLOOR_BYTES
from lib_lora_guard.recorder.crash_report import Precaution
from lib_lora_guard.runtime.live_settings import LiveSettings
from lib_lora_guard.runtime.precautions import Precautions
from lib_lora_guard.runtime.preflight import Preflight

MB = 1 << 20
WHAT = Message("preflight.reading", {"files": "a.safetensors"})


class Ram:
    def __init__(self, fast, alive):
        self.fast, self.alive_ram_bytes = fast, alive

    def fast_ram_bytes(self, floor_bytes):
        assert floor_bytes == RAM_FLOOR_BYTES
        return self.fast


class Scene:
    def __init__(self, fast, alive, caches=0, planned=()):
        self.ram, self.caches, self.told, self.drops = Ram(fast, alive), caches, [], 0
        self.preflight = Preflight(lambda: self.ram, self.drop, self.told.append, Precautions(lambda model: planned))
        self.reading = CheckpointReading(self.preflight, lambda files, room_bytes: ())

    def drop(self):
        self.drops += 1
        freed, self.caches = self.caches, 0
        self.ram.fast += freed
        self.ram.alive_ram_bytes += freed
        return freed


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    return lambda: [record.getMessage() for record in caplog.records]


def checkpoint(folder, size=10 * MB, name="a.safetensors"):
    path = folder / name
    path.write_bytes(b"\0" * size)
    return path


def test_the_first_way_that_stays_fast_is_taken():
    scene = Scene(fast=500, alive=1000)
    choose = scene.preflight.choose
    assert [choose(needs, WHAT) for needs in ([500], [501, 500, 499], [900, 800, 100])] == [0, 1, 2]
    assert scene.told == []


def test_over_fast_the_smallest_is_taken_and_said():
    scene = Scene(fast=500, alive=1000)
    assert scene.preflight.choose([900, 700, 800], WHAT) == 1
    assert [(finding.rule, finding.says.key) for finding in scene.told] == [("LG-R08", "rule.ram_slow")]
    assert scene.told[0].says.facts["needed_mb"] == 700 / MB


def test_over_alive_it_is_refused_with_the_number_of_the_smallest(tmp_path):
    scene = Scene(fast=500 * MB, alive=1000 * MB)
    with pytest.raises(
        MemoryShortError,
        match=r"^LG-R08: reading a\.safetensors needs 1001 MB of RAM; with the page file there are 1000 MB",
    ):
        scene.preflight.choose([2000 * MB, 1001 * MB], WHAT)
    assert scene.told == []


def test_caches_go_first_and_once(lines):
    scene = Scene(fast=500 * MB, alive=1000 * MB, caches=200 * MB)
    assert scene.preflight.choose([900 * MB, 700 * MB], WHAT) == 1
    assert (scene.drops, scene.told) == (1, [])
    assert lines() == ["RAM is short: 200 MB of LoRA files and remembered prompts are given back"]


def test_nothing_known_is_no_reason_to_refuse():
    assert Scene(None, None).preflight.choose([1 << 60], WHAT) == 0
    assert Scene(None, None).preflight.room_bytes() is None


def test_a_checkpoint_that_ram_and_page_file_cannot_take_is_not_read(tmp_path):
    path = checkpoint(tmp_path)
    reads = []
    scene = Scene(fast=10 * MB, alive=10 * MB)
    scene.reading.before_reading(lambda *a, **k: reads.append((a, k)), str(path), additional_state_dicts=[])
    assert reads == [((str(path),), {"additional_state_dicts": []})]
    other = checkpoint(tmp_path, 1 * MB, "vae.safetensors")
    with pytest.raises(MemoryShortError, match=r"reading a\.safetensors, vae\.safetensors needs 11 MB of RAM"):
        scene.reading.before_reading(reads.append, str(path), [str(other)])
    assert len(reads) == 1


def test_a_model_to_be_held_in_fp8_takes_half(tmp_path, monkeypatch):
    module = types.ModuleType("backend.args")
    module.dynamic_args = {"forge_unet_storage_dtype": "torch.float8_e4m3fn"}
    monkeypatch.setitem(sys.modules, "backend.args", module)
    scene = Scene(fast=5 * MB, alive=5 * MB)
    assert scene.reading.before_reading(lambda path: "model", str(checkpoint(tmp_path))) == "model"
    module.dynamic_args = {"forge_unet_storage_dtype": None}
    with pytest.raises(MemoryShortError):
        scene.reading.before_reading(lambda path: "model", str(checkpoint(tmp_path)))


def test_after_a_crash_caches_go_before_reading_until_that_went_well(tmp_path, lines):
    scene = Scene(1 << 40, 1 << 40, caches=7 * MB, planned={Precaution.DROP_CACHES})
    path = str(checkpoint(tmp_path))

    def fails(path):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        scene.reading.before_reading(fails, path)
    assert scene.drops == 1
    scene.reading.before_reading(len, path)
    assert scene.drops == 2
    scene.reading.before_reading(len, path)
    assert scene.drops == 2
    # Moving is another thing to die in.
    for _ in range(2):
        with scene.preflight.careful("moving"):
            pass
    assert scene.drops == 3
    said = "after the last crash: caches of LoRA files are released before something large is loaded"
    given_back = "RAM is short: 7 MB of LoRA files and remembered prompts are given back"
    assert lines() == [said, given_back]


def test_after_a_crash_in_unloading_only_what_is_fast_leaves_until_that_went_well(lines):
    scene = Scene(300, 1 << 40, planned={Precaution.PARTIAL_UNLOAD})

    def leaves(wanted):
        with scene.preflight.leaving(object(), wanted) as may_leave:
            return may_leave

    with pytest.raises(KeyError), scene.preflight.leaving(object(), 200):
        raise KeyError
    assert [leaves(1000), leaves(1000)] == [300, 1000]
    assert lines() == ["after the last crash: only as much of a model is moved to RAM as the next step needs"]
    with Scene(300, 1 << 40).preflight.leaving(object(), 1000) as may_leave:
        assert may_leave == 1000
    with Scene(None, None, planned={Precaution.PARTIAL_UNLOAD}).preflight.leaving(object(), 1000) as may_leave:
        assert may_leave == 1000


def test_without_a_crash_nothing_is_given_back():
    scene = Scene(1 << 40, 1 << 40, caches=7 * MB)
    with scene.preflight.careful("moving"):
        pass
    assert scene.drops == 0


def test_room_in_ram_keeps_half_a_gigabyte():
    assert Scene(0, 900 * MB).preflight.room_bytes() == 388 * MB
    assert Scene(0, 100 * MB).preflight.room_bytes() == 0


def test_the_files_that_were_read_last_are_remembered_the_latest_first(tmp_path):
    scene = Scene(fast=100 * MB, alive=100 * MB)
    for n in (*range(9), 3):
        scene.reading.before_reading(lambda *args: None, str(checkpoint(tmp_path, 1, f"{n}.safetensors")))
    assert [int(path.stem) for path in scene.reading.files] == [3, 8, 7, 6, 5, 4, 2, 1]


@pytest.mark.parametrize(
    ("options", "uses", "merges"),
    [
        ({}, True, False),
        ({"lora_guard_merge_from_file": True}, True, True),
        ({"lora_guard_file_backups": False, "lora_guard_merge_from_file": True}, False, False),
    ],
)
def test_the_two_switches_of_file_backups(options, uses, merges):
    settings = LiveSettings(options)
    assert (settings.uses_file_backups(), settings.merges_from_file()) == (uses, merges)
    with settings.image({"lora_guard_merge_from_file": not merges}):
        # As the mode: what an image began with holds until its end.
        assert settings.merges_from_file() == (uses and not merges)
