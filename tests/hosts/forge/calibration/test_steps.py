"""Steps are measured while Forge makes pictures, and the next estimates are corrected by them."""

import threading

import pytest
import torch
from support.calibration_scene import (
    FORGES,
    GB,
    LATENT,
    MB,
    Latent,
    corrected,
    flux_step,
    folder_of,
    kinds_in,
    scene_of,
    used_by_decode,
)
from support.fake_card import CARD, RAM

from lib_lora_guard.hosts.forge.calibration import SETTLED_BYTES
from lib_lora_guard.memory.calibration import REMEMBERED, Kind


def test_a_right_prediction_changes_nothing(scene):
    before = scene.needs()
    assert before == flux_step().held_bytes
    for _ in range(REMEMBERED + 1):
        scene.picture()
    assert scene.needs() == before


@pytest.mark.parametrize(("share", "expected"), [(0.2, 0.2), (0.5, 0.5), (0.51, 0.5), (3.0, 0.5)])
def test_too_little_predicted_is_corrected_at_once_within_bounds(scene, share, expected):
    step = flux_step()
    scene.model.takes = step.used_bytes + int(share * step.used_bytes)
    scene.picture()
    error = int(share * step.used_bytes)
    assert scene.needs() == corrected(step, error)
    assert scene.needs() == pytest.approx((1 + expected) * step.held_bytes, rel=1e-6)
    # What was predicted stays apart: the next error is not that of the corrected number.
    scene.picture()
    assert scene.needs() == corrected(step, error)


def test_the_next_load_makes_room_for_what_a_step_took(scene):
    """`memory_required` goes into `Needs`, and the room is there when the step begins."""
    scene.model.takes = int(1.2 * flux_step().used_bytes)
    scene.picture()
    asked = []
    needs = scene.guard.reservations.needs
    scene.guard.reservations.needs = lambda *args: asked.append(needs(*args)) or asked[-1]
    scene.sample(steps=1)
    assert asked[0].estimate_bytes == scene.needs() > flux_step().held_bytes
    assert asked[0].estimate_correction_bytes == 0, "the step is corrected where it is estimated"


def test_too_much_predicted_is_corrected_late_and_a_little(scene):
    step = flux_step()
    scene.model.takes = step.used_bytes // 2
    for _ in range(REMEMBERED - 1):
        scene.picture()
        assert scene.needs() == step.held_bytes
    scene.picture()
    assert scene.needs() == corrected(step, -step.used_bytes // 2)
    assert scene.needs() == pytest.approx(0.75 * step.held_bytes, rel=1e-6)
    # One under-prediction outweighs them all.
    scene.model.takes = int(1.1 * step.used_bytes)
    scene.picture()
    assert scene.needs() == pytest.approx(1.1 * step.held_bytes, rel=1e-6)


def test_prompt_and_negative_prompt_in_one_call_or_two_are_corrected_apart(scene):
    one, two = flux_step(1), flux_step(2)
    scene.model.takes = int(1.2 * two.used_bytes)
    scene.picture(rows=2)
    assert scene.needs(1) == one.held_bytes
    assert scene.needs(2) == pytest.approx(1.2 * two.held_bytes, rel=1e-6)


def test_the_largest_peak_of_a_picture_counts(scene):
    step = flux_step()
    scene.memory.load_models_gpu([scene.text])
    scene.sample(steps=1)
    for share in (1.0, 1.3, 1.1):
        scene.model.takes = int(share * step.used_bytes)
        scene.model.apply_model(Latent(LATENT), 1)
    scene.decode()
    assert scene.needs() == pytest.approx(1.3 * step.held_bytes, rel=1e-6)
    assert kinds_in(folder_of(scene))["step"] == 1


@pytest.mark.parametrize(
    "given",
    [
        {"control": {"input": []}},
        {"transformer_options": {**FORGES, "patches_replace": {"attn2": {"middle": len}}}},
        {"transformer_options": {**FORGES, "patches": {"output_block_patch": [len]}}},
        {"transformer_options": {**FORGES, "block_modifiers": [len]}},
        {"transformer_options": {**FORGES, "reference": torch.zeros(2)}},
    ],
)
def test_a_step_that_other_extensions_work_in_is_not_measured(scene, given):
    scene.model.takes = 3 * flux_step().used_bytes
    scene.picture(**given)
    assert scene.needs() == flux_step().held_bytes
    assert "step" not in kinds_in(folder_of(scene))


class NoTruth:
    """An array, as far as asking for its truth or its equal goes."""

    def __bool__(self):
        raise ValueError("the truth value of an array with more than one element is ambiguous")

    def __eq__(self, other):
        raise ValueError("no equality either")

    __hash__ = None


@pytest.mark.parametrize("told", [NoTruth(), [NoTruth()], {"a": NoTruth()}])
def test_an_array_in_the_options_is_an_extension_at_work(scene, told):
    scene.sample(steps=2, transformer_options={**FORGES, "mask": told})
    assert not [key for key in scene.guard.calibration.corrections._waiting if key.kind is Kind.STEP]


def test_empty_options_are_no_extension_at_work(scene):
    scene.model.takes = int(1.2 * flux_step().used_bytes)
    scene.picture(control=None, transformer_options={**FORGES, "patches": {}, "block_modifiers": [], "off": None})
    assert scene.needs() > flux_step().held_bytes


@pytest.mark.parametrize(
    ("stays", "counts"), [(SETTLED_BYTES, True), (SETTLED_BYTES + 8 * MB, False), (-100 * MB, False)]
)
def test_a_step_that_leaves_something_behind_is_not_measured(scene, stays, counts):
    scene.model.takes, scene.model.leaves = int(1.2 * flux_step().used_bytes), stays
    scene.picture(steps=1)
    assert (scene.needs() > flux_step().held_bytes) is counts


def test_a_model_of_unknown_architecture_is_corrected_from_forges_own_estimate(parts, card, tmp_path):
    with scene_of(parts, tmp_path, shapes={"stem.weight": (8, 8), "head.weight": (8, 8)}) as scene:
        forges = scene.needs()
        assert forges == int(1.28 * 128 * 128 * 2 * 16384)
        scene.model.takes = int(forges / 1.2 * 1.3)
        scene.picture()
        assert scene.needs() == pytest.approx(1.3 * forges, rel=1e-6)


def test_a_model_of_unknown_parameters_is_forges_to_estimate(scene):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = torch.nn.Linear(2, 2)
            self.diffusion_model.weight.gguf_cls = type("Q4_0", (), {})  # and no real_shape

        def memory_required(self, input_shape):
            return 1.0

    assert scene.patcher(Odd()).memory_required([2, 4, 8, 8]) == 1.0


def test_steps_with_and_without_loras_are_corrected_apart(scene):
    scene.model.takes = int(1.2 * flux_step().used_bytes)
    scene.unet = scene.unet.clone()
    scene.unet.lora_patches = {("style.safetensors", 1.0, 1.0, False): {}}
    scene.picture()
    assert scene.needs() > flux_step().held_bytes
    scene.unet = scene.unet.clone()
    scene.unet.lora_patches = {}
    scene.unet.memory_required([2, *LATENT[1:]])
    assert scene.needs() == flux_step().held_bytes


def test_nothing_is_measured_while_another_thread_uses_the_card(scene):
    """A preview that the VAE decodes while a step runs: neither number is anybody's."""
    step = scene.modules["backend.modules.k_model"].KModel.apply_model
    entered, go_on = threading.Event(), threading.Event()

    def waits(size):
        entered.set()
        go_on.wait(10)

    scene.memory.load_models_gpu([scene.unet])
    scene.allocator.pass_by, kept = waits, scene.allocator.pass_by
    thread = threading.Thread(target=lambda: step(scene.model, Latent(LATENT), 1))
    thread.start()
    assert entered.wait(10)
    scene.allocator.pass_by = kept
    scene.vae.takes = 5 * used_by_decode()
    scene.decode()
    go_on.set()
    thread.join()
    scene.decode()
    found = kinds_in(folder_of(scene))
    assert "step" not in found
    assert found["decode"] == 1, "the one that was alone"


def unload(scene):
    """As after a restart: nothing is on the card, every layer as it was built."""
    scene.memory.current_loaded_models.clear()
    for model in (scene.model, scene.text.model, scene.vae.first_stage_model):
        model.to(RAM)
    for layer in scene.model.modules():
        if hasattr(layer, "prev_parameters_manual_cast"):
            layer.parameters_manual_cast = layer.prev_parameters_manual_cast
            del layer.prev_parameters_manual_cast


@pytest.mark.parametrize("copies_bytes", [0, 132 * MB, 300 * MB])
def test_a_model_that_was_swapped_once_is_whole_again_when_it_fits(scene, copies_bytes):
    """The copies of swapped layers are no part of the step: counted as one they would keep the model swapped."""
    step, weights = flux_step(), scene.memory.module_size(scene.model)

    def picture():
        scene.memory.load_models_gpu([scene.text])
        scene.sample(steps=0)
        swapped = scene.memory.module_size(scene.model, include_device=CARD) < weights
        scene.model.takes = step.used_bytes + (copies_bytes if swapped else 0)
        scene.sample()
        scene.decode()
        return swapped

    scene.machine.ballast = scene.machine.total - (weights + step.held_bytes + 256 * MB)
    assert picture() is False
    unload(scene)
    scene.machine.ballast += GB
    assert picture() is True
    scene.machine.ballast -= GB
    found = []
    for _ in range(3):
        unload(scene)
        found.append(picture())
    assert found == [False, False, False]
