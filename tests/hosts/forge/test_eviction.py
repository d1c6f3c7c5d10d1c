"""In place of Forge's `free_memory` and of its rule for models that do not fit, on a card that is not there."""

import math
import sys
import types

import pytest
import torch
from support.card_scene import TOTAL, assert_as_built, flux, scene_of, t5, vae
from support.fake_card import CARD, RAM, FakeMemory, bytes_on_card, sides_of, size_of
from support.forge_memory import VRAMState

pytestmark = pytest.mark.usefixtures("swapping_in_bytes")


def test_a_request_to_unload_everything_is_left_to_forge(scene, lines):
    denoiser = flux(scene)
    scene.load(denoiser)
    scene.memory.free_memory(1e30, CARD)
    assert not scene.memory.current_loaded_models
    assert scene.memory.calls[-1] == (1e30, False)
    assert any(line.startswith("LG-R01: ") for line in lines())
    scene.load(denoiser)
    scene.memory.free_memory(1e30, CARD, free_all=True)
    assert scene.memory.calls[-1] == (1e30, True)
    scene.load(denoiser)
    scene.memory.free_memory(0, CARD, free_all=True)
    assert scene.memory.calls[-1] == (0, True)
    assert bytes_on_card(denoiser.model) == 0
    assert_as_built(denoiser.model)


def test_everything_leaves_but_the_models_to_keep(scene):
    denoiser, decoder = flux(scene), vae(scene)
    scene.load(denoiser)
    scene.load(decoder)
    kept = [one for one in scene.memory.current_loaded_models if one.model is decoder]
    scene.memory.free_memory(TOTAL, CARD, keep_loaded=kept)
    assert [one.model for one in scene.memory.current_loaded_models] == [decoder]
    assert bytes_on_card(decoder.model) == size_of(decoder.model)
    assert scene.memory.calls == [], "nothing of it was the host's work"


def test_a_request_above_the_card_frees_the_whole_card(scene, lines):
    denoiser = flux(scene)
    scene.load(denoiser)
    scene.memory.free_memory(10 * TOTAL, CARD)
    assert not scene.memory.current_loaded_models
    assert bytes_on_card(denoiser.model) == 0
    assert sum(line.startswith("LG-R02: ") for line in lines()) == 1
    scene.memory.free_memory(10 * TOTAL, CARD)
    assert sum(line.startswith("LG-R02: ") for line in lines()) == 1, "once while it stays the same"


@pytest.mark.parametrize(("asked", "says"), [(math.nan, "not a number"), (-5e9, "asked for -4768 MB")])
def test_a_request_that_is_no_amount_frees_nothing(scene, lines, asked, says):
    denoiser, decoder = flux(scene, 12), vae(scene)
    scene.load(denoiser)
    scene.memory.free_memory(asked, CARD)
    scene.load(decoder, required=asked, hard=asked)
    for patcher in (denoiser, decoder):
        assert bytes_on_card(patcher.model) == size_of(patcher.model)
    assert any(line.startswith("LG-R03: ") and says in line for line in lines())
    assert scene.machine.moved == size_of(denoiser.model) + size_of(decoder.model)


@pytest.mark.parametrize("own_rule", [VRAMState.HIGH_VRAM, VRAMState.NO_VRAM, VRAMState.DISABLED, "always"])
def test_where_forge_has_a_rule_of_its_own_it_decides(parts, own_rule):
    def calls(guarded):
        with scene_of(parts, guarded=guarded, rest=-700) as scene:
            if own_rule == "always":
                scene.memory.ALWAYS_VRAM_OFFLOAD = True
            else:
                scene.memory.vram_state = own_rule
            denoiser, text = flux(scene, 10), t5(scene, 9)
            scene.load(denoiser, required=2_000)
            scene.load(text)
            scene.memory.free_memory(1_500, CARD)
            scene.load(denoiser, required=10 * TOTAL, hard=50)
            places = [[sides_of(layer) for layer in p.model.layers()] for p in (denoiser, text)]
            return scene.memory.calls, scene.memory.current_inference_memory, scene.machine.moved, places

    expected, found = calls(False), calls(True)
    assert found == expected
    assert found[0]
    assert found[1] == -700


def test_other_devices_than_cuda_cards_are_left_to_forge(scene):
    scene.memory.free_memory(5, torch.device("mps"))
    assert scene.memory.calls == [(5, False)]
    assert not scene.guard.memory.plans_for(None)
    assert not scene.guard.memory.plans_for(RAM)
    assert scene.guard.memory.plans_for(CARD)
    scene.memory.vram_state = VRAMState.LOW_VRAM
    assert scene.guard.memory.plans_for(CARD)


# -- how much of a model that does not fit is placed

BUDGET = "compute_model_gpu_memory_when_using_cpu_swap"
"""14,000 free, 1,000 of it needed: Forge places 10,000, the guard 13,000 less 768."""


def budgets(scene, places=1):
    """Not planned, and planned; by position and by Forge's names."""
    budget = getattr(scene.memory, BUDGET)
    with scene.guard.eviction.planned(places):
        planned = budget(14_000, 1_000)
        assert budget(current_free_mem=14_000, inference_memory=1_000) == planned
    assert budget(inference_memory=1_000, current_free_mem=14_000) == budget(14_000, 1_000)
    return budget(14_000, 1_000), planned


def test_what_the_guard_does_not_plan_is_placed_by_forges_rule(scene):
    assert budgets(scene) == (10_000, 13_000 - 768)
    # Each of several models is placed into what the ones before it have left.
    assert budgets(scene, places=2) == (10_000, 10_000)
    scene.guard.uninstall()
    scene.guard = None
    assert getattr(scene.memory, BUDGET)(14_000, 1_000) == 10_000


def test_where_swapping_was_not_measured_forges_rule_stays(scene, monkeypatch):
    stream = types.SimpleNamespace(should_use_stream=lambda: True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "backend.stream", stream)
        assert budgets(scene) == (10_000, 10_000)
        stream.should_use_stream = lambda: False
        assert budgets(scene) == (10_000, 13_000 - 768)
    # Windows, where torch may call free what others hold: only with the driver's own number.
    asked = types.SimpleNamespace(free=types.SimpleNamespace(bytes=None))
    scene.guard.free.nvml = types.SimpleNamespace(memory=lambda device: asked)
    assert budgets(scene) == (10_000, 10_000)
    asked.free.bytes = 14_000
    scene.memory.get_free_memory(CARD)
    assert budgets(scene) == (10_000, 13_000 - 768)


def test_another_rule_for_large_models_than_forges_stays(parts, monkeypatch):
    """A fork's, or that of an extension that has wrapped the function."""
    monkeypatch.setattr(FakeMemory, BUDGET, lambda self, current_free_mem, inference_memory: 4_321)
    with scene_of(parts) as scene:
        assert budgets(scene) == (4_321, 4_321)
