"""Single faults that the sweeps do not name: where memory ends, and where the host's own way has to do."""

import pytest
from support.measure import contribution_error, fp32_limit, same_bits

from faults.planting import ERRORS, Faults
from faults.scene import Scene
from faults.test_host import count, sweep
from lib_lora_guard.patching.engine import Engine


@pytest.mark.parametrize("plan", ["once", "for good"])
def test_no_lora_is_left_out_as_unreadable_because_memory_ended(guarded, plan):
    scene = Scene(guarded, "fp8", read_by_guard=False)
    _, wrong = sweep(scene, "apply", plan, count(scene, "apply"))
    assert not wrong, "\n".join(wrong)


def test_after_memory_ended_once_it_goes_on_without_merging_and_the_next_load_merges(guarded):
    scene = Scene(guarded, "bf16")
    scene.settle("two")
    unmerged = scene.unmerged_picture("two")
    scene.load("none")
    with Faults(1):
        scene.load("two")
    assert not scene.guard.stacks.was_left_to_host(scene.loader)
    assert same_bits(scene.picture(), unmerged)
    scene.host.load(scene.clone)
    assert same_bits(scene.picture(), scene.pictures["two"])


def test_after_memory_ended_without_merging_too_the_next_load_is_the_guards_again(guarded, monkeypatch):
    scene = Scene(guarded, "bf16")
    scene.settle("two")
    scene.load("none")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "commit", lambda *args: (_ for _ in ()).throw(ERRORS["gpu"]()))
        scene.load("two")
    assert scene.guard.stacks.was_left_to_host(scene.loader)
    scene.host.load(scene.clone)
    assert not scene.guard.stacks.was_left_to_host(scene.loader)
    assert same_bits(scene.picture(), scene.pictures["two"])


def test_the_hosts_way_is_not_taken_with_a_part_of_a_lora(guarded, monkeypatch):
    scene = Scene(guarded, "fp8")
    scene.settle("none")
    scene.settle("other")
    scene.load("none")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "commit", lambda *args: 1 / 0)
        scene.load("other")
    picture, wanted = scene.picture(), scene.pictures["other"]
    whole = contribution_error(picture, wanted, scene.base) <= fp32_limit(wanted, scene.base)
    assert whole or same_bits(picture, scene.base)
