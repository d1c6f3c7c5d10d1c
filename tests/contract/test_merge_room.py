"""Mode "Merge" where RAM is short, inside Forge: another way before the first weight, and when memory ends all the same."""

import logging
from collections import Counter

import pytest
import torch
from support.make import host_value
from support.measure import assert_same

from contract.stacks import run, shapes, with_loras
from lib_lora_guard.hosts.forge.access import ForgeAccess
from lib_lora_guard.hosts.forge.lora_loader_state import state_of
from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.patching import merge_attachment, merge_room
from lib_lora_guard.planning.mode import Mode
from lib_lora_guard.recorder.crash_report import Precaution
from lib_lora_guard.settings import LoraMode

GB = 1 << 30
NO_RAM = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


@pytest.fixture
def merging(guarded, monkeypatch):
    guarded.guard.settings.options = {"lora_guard_mode": LoraMode.MERGE.value}
    monkeypatch.setattr(merge_room, "LEAST_BYTES", 1)
    # As weights above 1 MB are: merged when they are put in place, one after the other.
    monkeypatch.setattr(merge_attachment, "KEPT_BYTES", 16)
    return guarded


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    return lambda: [record.getMessage() for record in caplog.records]


def loras(dense, seed=1):
    """On every matrix, where bypass and merging both do."""
    return {k: host_value("lora", s, seed + n) for n, (k, s) in enumerate(shapes(dense).items()) if len(s) == 2}


def modes(patcher):
    return Counter(one.mode for one in state_of(patcher.lora_loader).engine.attached.values())


def spare(monkeypatch, ram):
    monkeypatch.setattr(ForgeAccess, "backup_budget", lambda self: BackupBudget(0, ram, 0))


def pictures(host, monkeypatch, dense, patcher):
    """Without LoRAs, and with all of them merged."""
    plain = run(patcher)
    spare(monkeypatch, GB)
    merged = with_loras(host, patcher, ("a", loras(dense), 1.0))
    assert set(modes(merged)) == {Mode.MERGE}
    whole = run(merged)
    host.load(patcher)
    assert torch.equal(run(patcher), plain)
    return plain, whole


def test_what_there_is_no_room_for_is_bypassed_and_said(merging, monkeypatch, lines):
    patcher, dense = merging.build("fp32")
    plain, whole = pictures(merging, monkeypatch, dense, patcher)
    sizes = [patcher.model.get_parameter(key).nbytes for key in loras(dense)]
    spare(monkeypatch, sum(sizes[:2]))
    part = with_loras(merging, patcher, ("b", loras(dense), 1.0))
    assert modes(part) == {Mode.MERGE: 2, Mode.BYPASS: len(sizes) - 2}
    assert_same(run(part), whole, plain)
    said = [line for line in lines() if "keep their LoRA beside the weight" in line]
    assert len(said) == 1
    assert f"to merge into {len(sizes)} of its weights takes" in said[0]
    merging.load(patcher)
    assert torch.equal(run(patcher), plain)


def test_memory_that_ends_in_a_merge_all_the_same(merging, monkeypatch, lines):
    patcher, dense = merging.build("fp32")
    plain, whole = pictures(merging, monkeypatch, dense, patcher)
    merge, count = merge_attachment.merge, []

    def ends(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise RuntimeError(NO_RAM)
        return merge(*args, **kwargs)

    monkeypatch.setattr(merge_attachment, "merge", ends)
    part = with_loras(merging, patcher, ("b", loras(dense), 1.0))
    assert len(count) == 3
    assert modes(part) == {Mode.BYPASS: len(loras(dense))}
    assert not state_of(part.lora_loader).left_to_host
    assert_same(run(part), whole, plain)
    assert [line for line in lines() if "memory ended while LoRAs were merged (RuntimeError: [enforce fail" in line]
    # The next load finds memory again.
    merging.load(part)
    assert set(modes(part)) == {Mode.MERGE}
    merging.load(patcher)
    assert torch.equal(run(patcher), plain)


def test_a_merge_that_ends_twice_is_not_tried_with_every_image(merging, monkeypatch, lines):
    patcher, dense = merging.build("fp32")
    plain, whole = pictures(merging, monkeypatch, dense, patcher)
    merge, count, ends = merge_attachment.merge, [], [True]

    def ending(*args, **kwargs):
        count.append(1)
        if ends[0]:
            raise RuntimeError(NO_RAM)
        return merge(*args, **kwargs)

    monkeypatch.setattr(merge_attachment, "merge", ending)
    part = with_loras(merging, patcher, ("b", loras(dense), 1.0))
    for _ in range(3):
        merging.load(part)
    assert len(count) == 2
    assert modes(part) == {Mode.BYPASS: len(loras(dense))}
    assert_same(run(part), whole, plain)
    assert len([line for line in lines() if "memory ended while LoRAs were merged" in line]) == 2
    # Another stack is another matter, and so is this one after it.
    ends[0] = False
    weaker = with_loras(merging, patcher, ("b", loras(dense), 0.5))
    assert set(modes(weaker)) == {Mode.MERGE}
    merging.load(part)
    assert set(modes(part)) == {Mode.MERGE}
    merging.load(patcher)
    assert torch.equal(run(patcher), plain)


def test_another_error_in_a_merge_is_not_tried_again(merging, monkeypatch, lines):
    patcher, dense = merging.build("fp32")
    monkeypatch.setattr(
        merge_attachment, "merge", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("something else"))
    )
    spare(monkeypatch, GB)
    part = with_loras(merging, patcher, ("b", loras(dense), 1.0))
    assert state_of(part.lora_loader).left_to_host
    assert not [line for line in lines() if "memory ended" in line]


def test_after_a_crash_in_merging_nothing_is_merged(merging, monkeypatch, lines):
    merging.guard.stacks.precautions = lambda model: {Precaution.NO_MERGE}
    patcher, dense = merging.build("fp32")
    part = with_loras(merging, patcher, ("b", loras(dense), 1.0))
    assert modes(part) == {Mode.BYPASS: len(loras(dense))}
    other = with_loras(merging, patcher, ("b", loras(dense), 0.5))
    assert modes(other) == {Mode.BYPASS: len(loras(dense))}
    assert lines().count(Precaution.NO_MERGE.message) == 1


def test_after_a_crash_caches_go_once_before_a_model_is_moved(guarded):
    drops = []
    guarded.guard.preflight._drop_caches = lambda: len(drops) if drops.append(1) else 0
    guarded.guard.precautions.planned = lambda model: {Precaution.DROP_CACHES}
    patcher, _ = guarded.build("fp32")
    assert drops == [1]
    guarded.load(patcher.clone())
    assert drops == [1]
