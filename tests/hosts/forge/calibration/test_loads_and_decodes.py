"""Loads, LoRAs and decodes are measured while Forge makes pictures, and the next needs are corrected by them."""

import pytest
import torch
from support.calibration_scene import (
    DECODE_ASKED,
    GB,
    MB,
    flux_step,
    folder_of,
    kinds_in,
    scene_of,
    used_by_decode,
)
from support.fake_card import CARD, parameter

from lib_lora_guard.hosts.forge.calibration import load_key
from lib_lora_guard.memory.calibration import Kind
from lib_lora_guard.planning import activations


def test_loading_is_measured_and_counts_beside_the_weights(scene):
    size = scene.memory.module_size(scene.text.model)
    coming = scene.text.model.to

    def converts(device):
        if device == CARD:
            scene.allocator.pass_by(size + 120 * MB)
        return coming(device)

    scene.text.model.to = converts
    scene.memory.load_models_gpu([scene.text])
    scene.memory.free_memory(1e30, CARD, free_all=True)
    needs = scene.guard.reservations.needs([scene.text], CARD, 0, 0)
    assert needs.hard_bytes == 0
    assert needs.hard_correction_bytes == 0, "not recorded before the next load"
    scene.memory.load_models_gpu([scene.text])
    assert scene.guard.reservations.needs([scene.text], CARD, 0, 0).hard_correction_bytes == 0, "it is there already"
    scene.memory.free_memory(1e30, CARD, free_all=True)
    needs = scene.guard.reservations.needs([scene.text], CARD, 0, 7)
    assert (needs.hard_bytes, needs.hard_correction_bytes) == (7, 120 * MB)
    assert needs.free_bytes == needs.inference_bytes + 7 + 120 * MB


def test_a_model_that_is_loaded_in_part_is_not_measured(parts, card, tmp_path):
    with scene_of(parts, tmp_path, total=1 * GB + 500 * MB) as scene:
        scene.memory.load_models_gpu([scene.text])
        scene.memory.load_models_gpu([scene.text])
        assert kinds_in(tmp_path) == {}


def test_a_load_is_recorded_under_the_key_that_was_asked_for_before_it(scene, monkeypatch):
    """Weights that are packed on their way to the card are fewer values afterwards."""
    model, seen = scene.text.model, []
    before, note = load_key(model), scene.guard.calibration.corrections.note
    monkeypatch.setattr(
        scene.guard.calibration.corrections, "note", lambda key, *numbers: seen.append(key) or note(key, *numbers)
    )
    patch = scene.text.forge_patch_model

    def packs(device=None):
        found = patch(device)
        for layer in model.layers():
            layer.weight = parameter(scene.machine, (layer.weight.nelement() // 2,), torch.uint8, CARD)
        return found

    monkeypatch.setattr(scene.text, "forge_patch_model", packs, raising=False)
    scene.memory.load_models_gpu([scene.text])
    assert [key for key in seen if key.kind is Kind.LOAD] == [before]
    assert load_key(model) != before


def test_lora_factors_are_measured_in_the_first_step(scene):
    """Predicted 100 MB; the refresh merges (40 MB pass by) and keeps 10, the first call brings 120."""
    scene.factor_bytes = 100 * MB
    loras = {("style.safetensors", 1.0, 1.0, False): {}}

    def applied():
        scene.allocator.pass_by(40 * MB)
        scene.allocator.keep(10 * MB)
        scene.model.leaves = 120 * MB

    scene.unet.lora_patches, scene.applied = loras, applied
    scene.picture()
    found = kinds_in(folder_of(scene))
    assert (found["apply"], found["step"]) == (1, 1)
    assert scene.needs() == flux_step().held_bytes, "and they are not the step's"
    # What LoadedModel.model_load took has not got the LoRA's part in it.
    assert scene.guard.calibration.load_bytes([scene.unet.model], CARD) == 0
    # Another patcher with that LoRA is asked for 100 MB and gets what they took, less the 1 MB that the step returned.
    other = scene.unet.clone()
    returned = 16 * 128 * 128 * 2
    assert scene.guard.calibration.factor_bytes(other, 100 * MB) == 130 * MB - returned
    assert scene.guard.calibration.factor_bytes(other, 20 * MB) == 30 * MB, "at most half as much again"
    other.lora_patches = {("other.safetensors", 1.0, 1.0, False): {}}
    assert scene.guard.calibration.factor_bytes(other, 100 * MB) == 100 * MB
    asked = []
    needs = scene.guard.reservations.needs
    scene.guard.reservations.needs = lambda *args: asked.append(needs(*args)) or asked[-1]
    scene.unet = scene.unet.clone()
    scene.sample(steps=1)
    assert asked[0].hard_bytes == 130 * MB - returned


def test_factors_that_are_still_to_come_are_in_the_panels_plan(scene):
    scene.factor_bytes, scene.unet = 300 * MB, scene.unet.clone()
    scene.unet.lora_patches = {("style.safetensors", 1.0, 1.0, False): {}}
    scene.sample(steps=0)
    assert scene.guard.loading.plans.last.factor_bytes == 300 * MB


@pytest.mark.parametrize(("share", "expected"), [(0.2, 0.2), (3.0, 0.5)])
def test_a_decode_gets_the_room_it_took(scene, share, expected):
    held = int(DECODE_ASKED * activations.VAE_HOLDS_WHERE_FORGE_HAS)
    scene.vae.takes = used_by_decode() + int(share * used_by_decode())
    asked = []
    needs = scene.guard.reservations.needs
    scene.guard.reservations.needs = lambda *args: asked.append(needs(*args)) or asked[-1]
    scene.picture()
    scene.decode()
    first, second = asked[-2], asked[-1]
    assert (first.estimate_bytes, first.estimate_correction_bytes) == (held, 0)
    assert second.estimate_bytes == held
    assert second.estimate_correction_bytes == pytest.approx(expected * held, rel=1e-6)
    assert second.free_bytes == pytest.approx((1 + expected) * held, rel=1e-6)
    # Loading anything else gets none of it.
    assert scene.guard.reservations.needs([scene.text], CARD, 5, 0).estimate_correction_bytes == 0


def test_tiles_and_several_pictures_are_not_measured(scene):
    scene.vae.takes = 3 * used_by_decode()
    scene.decode(pictures=4)
    scene.vae.fails = True
    assert scene.decode() == "tiled"
    assert "decode" not in kinds_in(folder_of(scene))
    scene.vae.fails = False
    scene.decode()
    assert kinds_in(folder_of(scene))["decode"] == 1


def test_a_decode_that_fails_is_not_measured_and_raises(scene):
    def breaks(size):
        raise ZeroDivisionError

    scene.allocator.pass_by = breaks
    with pytest.raises(ZeroDivisionError):
        scene.decode()
    del scene.allocator.pass_by
    assert scene.guard.calibration.decode_bytes() == 0
    scene.picture()
    assert kinds_in(folder_of(scene))["decode"] == 1


def test_corrections_end_with_the_card(parts, card, tmp_path):
    with scene_of(parts, tmp_path, total=8 * GB) as scene:
        scene.vae.takes = 3 * used_by_decode()
        scene.decode()
        scene.machine.total = int(1.1 * DECODE_ASKED * activations.VAE_HOLDS_WHERE_FORGE_HAS)
        asked = []
        needs = scene.guard.reservations.needs
        scene.guard.reservations.needs = lambda *args: asked.append(needs(*args)) or asked[-1]
        scene.decode()
        assert asked[0].estimate_correction_bytes > 0
        assert asked[0].free_bytes == scene.machine.total


def test_forge_still_shows_the_peak_of_the_image(scene):
    monitor = scene.modules["modules.memmon"].MemUsageMonitor(scene.allocator)
    monitor.monitor()
    scene.allocator.pass_by(20 * GB)
    scene.picture()
    assert monitor.read()["active_peak"] == 20 * GB
    assert monitor.read()["free"] == 1
    monitor.monitor()
    assert monitor.read()["reserved_peak"] == 20 * GB, "it is still the same image"
    monitor.run_flag.clear()
    monitor.monitor()
    assert monitor.read()["active_peak"] < 10 * GB
    scene.picture()
    expected = scene.allocator.now() + used_by_decode()
    assert monitor.read()["active_peak"] >= expected
