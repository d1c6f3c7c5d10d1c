"""Merges that RAM has no room for go through the layers' calls, and the disk is for what can only be merged."""

import logging
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.make import Net, host_value, rand

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.errors import ModeError
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.patching import backup, merge_room, watching
from lib_lora_guard.patching.backup import Where
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.merge_attachment import MergeAttachment
from lib_lora_guard.planning.mode import Mode, Wish

X = rand(2, 16, 64, seed=5)
GB = 1 << 30
SHAPES = {name: tuple(value.shape) for name, value in Net(64, depth=2).state_dict().items()}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]
SMALL = [name for name, shape in SHAPES.items() if len(shape) == 1 and name.endswith("bias")]


class Bench:
    def __init__(self, ram=GB, vram=0, disk=0):
        self.model, self.engine = Net(64, depth=2), Engine()
        self.access = PlainAccess(self.model)
        self.spare, self.asked = BackupBudget(vram, ram, disk), 0
        self.access.backup_budget = self.budget
        self.bytes = {name: p.numel() * p.element_size() for name, p in self.model.named_parameters()}

    def budget(self):
        self.asked += 1
        return self.spare

    def change(self, *patches, strength=1.0, wish=Wish.PREFER_MERGE):
        requests = []
        for origin, one in enumerate(patches):
            terms = {k: [parse_term([strength, v, 1.0, None, None], {}, origin)] for k, v in one.items()}
            requests.append(LoraRequest(f"lora{origin}", strength, terms))
        self.engine.change(self.access, requests, wish)
        with torch.no_grad():
            return self.model(X).clone()

    def modes(self):
        return {key: one.mode for key, one in self.engine.attached.items()}

    def total(self, *names):
        return sum(self.bytes[name] for name in names)


def loras(names=None, seed=1):
    return {name: host_value("lora", SHAPES[name], seed + n) for n, name in enumerate(names or MATRICES)}


def vectors(seed=50):
    return {name: (rand(*SHAPES[name], seed=seed + n, scale=0.05),) for n, name in enumerate(SMALL)}


@pytest.fixture(autouse=True)
def _every_byte_counts(monkeypatch):
    monkeypatch.setattr(merge_room, "LEAST_BYTES", 1)


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """As for weights on a device."""
    for module in (backup, merge_room, watching):
        monkeypatch.setattr(module, "lies_in_ram", lambda parameter: False)
    monkeypatch.setattr(merge_room, "_other_choice", _as_on_a_device(merge_room._other_choice))
    monkeypatch.setattr("lib_lora_guard.patching.spool.disk_spare_bytes", lambda folder: GB)


def _as_on_a_device(original):
    return lambda planned, device: original(planned, torch.device("cuda"))


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard.patching.merge_room")
    return lambda: [r.getMessage() for r in caplog.records if r.name.endswith("merge_room")]


def assert_same_picture(found, expected, plain):
    # fp32 on both sides, summed in another order: measured 2e-7 of the LoRA's own contribution.
    gap, size = (found - expected).norm(), (expected - plain).norm()
    assert size > 0.01 * plain.norm()
    assert gap <= 1e-4 * size + 1e-6 * expected.norm()


def test_with_enough_ram_everything_is_merged_and_memory_is_measured_once(lines):
    bench = Bench()
    bench.change(loras())
    assert set(bench.modes().values()) == {Mode.MERGE}
    assert bench.asked == 1
    assert lines() == []


def test_weights_that_ram_has_no_room_for_use_bypass_and_the_log_says_so(lines):
    plain, whole = Bench().change(), Bench().change(loras())
    room = Bench().total(*MATRICES[:3]) + 1
    bench = Bench(ram=room)
    found = bench.change(loras())
    assert [key for key, mode in bench.modes().items() if mode is Mode.MERGE] == MATRICES[:3]
    assert Counter(bench.modes().values()) == {Mode.MERGE: 3, Mode.BYPASS: len(MATRICES) - 3}
    assert_same_picture(found, whole, plain)
    total = bench.total(*MATRICES)
    assert lines() == [
        f"Net: to merge into {len(MATRICES)} of its weights takes {total / 2**20:.0f} MB of RAM and {room / 2**20:.0f} MB are free: "
        f"{len(MATRICES) - 3} of them keep their LoRA beside the weight. The picture has all of it; a step takes a little longer"
    ]
    assert torch.equal(bench.change(), plain)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 400_000), st.integers(0, 3))
def test_merges_never_need_more_ram_than_is_free(ram, seed):
    bench = Bench(ram=ram)
    found = bench.change(loras(seed=seed))
    merged = [key for key, mode in bench.modes().items() if mode is Mode.MERGE]
    assert bench.total(*merged) <= ram
    # Nothing is left out for want of room.
    left = [bench.bytes[key] for key, mode in bench.modes().items() if mode is Mode.BYPASS]
    assert all(size > ram - bench.total(*merged) for size in left)
    assert_same_picture(found, Bench().change(loras(seed=seed)), Bench().change())


def test_weights_that_can_only_be_merged_get_ram_first():
    needed = Bench().total(*SMALL)
    # A matrix would fit if it came first.
    bench = Bench(ram=needed + Bench().total(min(MATRICES, key=Bench().bytes.get)) - 1)
    bench.change(loras(), vectors())
    assert {key for key, mode in bench.modes().items() if mode is Mode.MERGE} == set(SMALL)


def test_weights_that_are_merged_already_need_no_more_ram():
    bench = Bench()
    bench.change(loras())
    bench.spare, bench.asked = BackupBudget(0, 0, 0), 0
    found = bench.change(loras(), strength=0.5)
    assert set(bench.modes().values()) == {Mode.MERGE}
    assert bench.asked == 0
    assert_same_picture(found, Bench().change(loras(), strength=0.5), Bench().change())


def test_ram_that_is_free_again_is_used_at_the_next_change():
    bench = Bench(ram=0)
    bench.change(loras())
    assert set(bench.modes().values()) == {Mode.BYPASS}
    bench.spare = BackupBudget(0, GB, 0)
    bench.change(loras(), strength=0.5)
    assert set(bench.modes().values()) == {Mode.MERGE}


def test_small_merges_start_without_measuring_memory(monkeypatch):
    monkeypatch.setattr(merge_room, "LEAST_BYTES", GB)
    bench = Bench(ram=0)
    bench.change(loras())
    assert (bench.asked, set(bench.modes().values())) == (0, {Mode.MERGE})


def test_a_strict_request_to_merge_is_kept_without_free_ram():
    bench = Bench(ram=0)
    bench.change(loras(), wish=Wish.MERGE)
    assert set(bench.modes().values()) == {Mode.MERGE}


@pytest.mark.usefixtures("on_gpu")
def test_weights_on_a_card_use_bypass_rather_than_backups_on_disk():
    bench = Bench(ram=0, disk=GB)
    found = bench.change(loras(), vectors())
    merged = {key: one for key, one in bench.engine.attached.items() if isinstance(one, MergeAttachment)}
    assert set(merged) == set(SMALL)
    assert {one.backup.place.where for one in merged.values()} == {Where.DISK}
    expected = Bench().change(loras(), vectors())
    assert_same_picture(found, expected, Bench().change())
    bench.change()


@pytest.mark.usefixtures("on_gpu")
def test_spare_vram_counts_for_weights_on_a_card_alone():
    need = Bench().total(*MATRICES[:3])
    bench = Bench(ram=0, vram=need)
    bench.change(loras(MATRICES[:4]))
    assert [key for key, mode in bench.modes().items() if mode is Mode.MERGE] == MATRICES[:3]
    bench.change()
    # For a weight in RAM it is none: the merged value comes beside it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_room, "lies_in_ram", lambda parameter: True)
        bench.change(loras(MATRICES[:4]))
        assert set(bench.modes().values()) == {Mode.BYPASS}


@pytest.mark.usefixtures("on_gpu")
def test_weights_that_the_host_keeps_a_copy_of_need_no_ram():
    bench = Bench(ram=0)
    copies = {name: p.data.clone() for name, p in bench.model.named_parameters()}
    with bench.engine.offloaded(copies):
        bench.change(loras())
    assert set(bench.modes().values()) == {Mode.MERGE}
    bench.change()


@pytest.mark.usefixtures("on_gpu")
def test_differences_as_large_as_the_weight_go_to_the_disk_on_a_card(lines):
    differences = {name: host_value("diff", SHAPES[name], n) for n, name in enumerate(MATRICES)}
    bench = Bench(ram=0, disk=GB)
    bench.change(differences, wish=Wish.AUTO)
    assert set(bench.modes().values()) == {Mode.MERGE}
    assert lines() == []
    bench.change()
    nowhere = Bench(ram=0)
    with pytest.raises(ModeError, match="no place for a backup"):
        nowhere.change(differences, wish=Wish.AUTO)


def test_differences_as_large_as_the_weight_are_added_on_the_fly_on_the_cpu():
    differences = {name: host_value("diff", SHAPES[name], n) for n, name in enumerate(MATRICES)}
    bench = Bench(ram=0)
    found = bench.change(differences, wish=Wish.AUTO)
    assert set(bench.modes().values()) == {Mode.ON_THE_FLY}
    assert_same_picture(found, Bench().change(differences, wish=Wish.AUTO), Bench().change())
