"""The moves of a load: models leave, shrink and come back on a card that is not there (`support.fake_card`)."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from support.card_scene import (
    REST,
    TOTAL,
    assert_as_built,
    assert_sound,
    flux,
    prompts,
    scene_of,
    t5,
    vae,
)
from support.fake_card import CARD, RAM, Denoiser, Upscaler, bytes_on_card, sides_of, size_of
from support.walks import walks_of

from lib_lora_guard.hosts.forge.takeover import ForgeTakeover
from lib_lora_guard.memory import rules
from lib_lora_guard.planning import activations, on_card

pytestmark = pytest.mark.usefixtures("swapping_in_bytes")


def test_models_that_fit_together_stay_on_the_card(scene):
    denoiser, text, decoder = flux(scene, 12), t5(scene, 8), vae(scene)
    for patcher in (text, denoiser, decoder, text, denoiser, decoder):
        scene.load(patcher, required=500)
    assert scene.machine.moved == sum(size_of(p.model) for p in (denoiser, text, decoder))
    for patcher in (denoiser, text, decoder):
        assert bytes_on_card(patcher.model) == size_of(patcher.model)
        assert_as_built(patcher.model)


@pytest.mark.parametrize(("required", "spare"), [(0, REST), (1_500, 1_500)])
def test_room_is_made_to_the_byte(scene, required, spare):
    """The larger of slider and step, and what is asked for beside them, once."""
    denoiser, text = flux(scene, 12), t5(scene, 8)
    scene.load(text)
    scene.load(denoiser)
    before = bytes_on_card(text.model)
    hard = scene.machine.free() - spare
    scene.load(denoiser, required=required, hard=hard)
    assert bytes_on_card(text.model) == before
    scene.load(denoiser, required=required, hard=hard + 1)
    assert bytes_on_card(text.model) < before
    assert bytes_on_card(denoiser.model) == size_of(denoiser.model)


def test_changing_prompts_moves_less_than_forge_alone_does(parts):
    """24 GB, a denoiser of 18 and a text encoder of 10: the host carries both there and back in each round."""
    with scene_of(parts, guarded=False) as stock:
        by_host, _, _ = prompts(stock)
    with scene_of(parts) as scene:
        by_guard, denoiser, text = prompts(scene)
        assert_sound(denoiser.model, scene.is_loaded(denoiser))
        assert_sound(text.model, scene.is_loaded(text))
    assert by_host == 4 * 2 * (18_000 + 10_000 + 160)
    assert by_guard < 0.35 * by_host


def test_a_text_encoder_runs_swapped_beside_a_large_denoiser(parts, lines, caplog):
    caplog.set_level(logging.DEBUG, logger="lib_lora_guard")

    def moved(guarded):
        with scene_of(parts, guarded=guarded) as scene:
            denoiser, text = flux(scene, 18), t5(scene, 10)
            scene.load(denoiser, required=1_000)
            before = scene.machine.moved
            scene.load(text)
            stays = bytes_on_card(denoiser.model) == size_of(denoiser.model)
            swapped = size_of(text.model) - bytes_on_card(text.model)
            assert_sound(text.model, True)
            scene.load(denoiser, required=1_000)
            assert bytes_on_card(denoiser.model) == size_of(denoiser.model)
            assert_as_built(denoiser.model)
            # What is swapped is copied in each of the two passes.
            return scene.machine.moved - before + 2 * swapped, stays

    by_host, stays = moved(False)
    assert not stays
    by_guard, stays = moved(True)
    assert stays
    assert by_guard < by_host / 2
    # Toy sizes, too small for a line that all read.
    assert any("JointTextEncoder comes for a short while (calls: 2)" in line for line in lines())
    assert not any("leaves the card" in line for line in lines())


def test_a_decode_evicts_only_the_bytes_that_are_missing(parts):
    with scene_of(parts, guarded=False) as stock:
        denoiser, decoder = flux(stock, 20), vae(stock)
        stock.load(denoiser)
        stock.load(decoder, required=6_000)
        assert bytes_on_card(denoiser.model) == 0, "what the host does"
    with scene_of(parts) as scene:
        denoiser, decoder = flux(scene, 20), vae(scene)
        scene.load(denoiser)
        before = bytes_on_card(denoiser.model)
        layer = size_of(denoiser.model.layers()[0])
        scene.load(decoder, required=6_000)
        needed = 6_000 * activations.VAE_HOLDS_WHERE_FORGE_HAS
        gone = before - bytes_on_card(denoiser.model)
        missing = before + size_of(decoder.model) + needed - TOTAL
        assert 0 < missing <= gone + size_of(decoder.model)
        assert gone < missing + layer
        assert scene.machine.free() >= int(needed)
        assert scene.away(denoiser) == gone
        assert scene.is_loaded(denoiser)
        assert_sound(denoiser.model, True)
        # And all of it comes back, with nothing left behind.
        scene.load(denoiser)
        assert bytes_on_card(denoiser.model) == before
        assert scene.away(denoiser) == 0
        assert_as_built(denoiser.model)
        assert scene.machine.free() >= REST
        assert not any(one.model_accelerated for one in scene.memory.current_loaded_models)


def test_a_larger_picture_takes_room_from_the_model_itself(scene):
    """The host places a model once, for the picture it is then."""
    denoiser = flux(scene, 20)
    scene.load(denoiser, required=1_000)
    scene.load(denoiser, required=9_000)
    assert scene.machine.free() >= 9_000
    assert_sound(denoiser.model, True)
    scene.load(denoiser, required=1_000)
    assert bytes_on_card(denoiser.model) == size_of(denoiser.model)
    assert_as_built(denoiser.model)


def test_only_a_share_that_shrinks_without_a_reason_is_logged(parts, lines, monkeypatch):
    monkeypatch.setattr(rules, "SHRINKING_BYTES", 1)
    with scene_of(parts) as scene:
        _, denoiser, _ = prompts(scene, rounds=2)
        scene.load(denoiser, required=9_000)  # a larger picture
        scene.free_all()
        scene.load(denoiser, required=12_000)
        scene.load(denoiser, required=1_000)
        assert not any("LG-R09" in line for line in lines())
        layer = next(one for one in denoiser.model.layers() if sides_of(one) == {CARD})
        layer.to(RAM)
        scene.load(denoiser, required=1_000)
        assert sum("LG-R09: " in line for line in lines()) == 1
        layer.to(CARD)


def test_a_swapped_text_encoder_gets_the_room_there_is(scene, monkeypatch):
    monkeypatch.setattr(on_card, "SWAPPING_BYTES", 300)
    text, denoiser = t5(scene, 10), flux(scene, 18)
    scene.load(text)
    scene.load(denoiser)
    away = scene.away(text)
    assert away > 0
    scene.machine.total += 3_000
    scene.load(text)
    assert scene.away(text) <= max(0, away - 3_000 + 500 + 300)
    assert scene.machine.free() >= REST
    assert bytes_on_card(denoiser.model) == size_of(denoiser.model)


def test_a_model_of_many_passes_gets_its_room_from_others(scene):
    denoiser, other = flux(scene, 18), scene.patcher(Upscaler, [500] * 20)
    scene.load(denoiser)
    scene.load(other)
    assert bytes_on_card(other.model) == size_of(other.model)
    assert_as_built(other.model)
    assert_sound(denoiser.model, True)
    gone = size_of(denoiser.model) - bytes_on_card(denoiser.model)
    assert 0 < gone <= size_of(other.model) + REST - (TOTAL - size_of(denoiser.model)) + 750


def test_the_least_recently_used_model_leaves_first(scene):
    models = [scene.patcher(Upscaler, [500] * 14) for _ in range(4)]
    for patcher in models:
        scene.load(patcher)
    assert bytes_on_card(models[0].model) < size_of(models[0].model)
    for patcher in models[1:]:
        assert bytes_on_card(patcher.model) == size_of(patcher.model)


def test_models_of_two_devices_are_placed_by_forge(scene):
    denoiser, decoder = flux(scene), vae(scene)
    decoder.load_device = RAM
    scene.load(denoiser, decoder)
    assert bytes_on_card(denoiser.model) == size_of(denoiser.model)


# -- the numbers of a load


@pytest.mark.parametrize("required", [1e30, 10 * TOTAL, math.inf])
def test_a_model_is_loaded_even_if_its_step_needs_more_than_the_card(scene, required):
    denoiser, text = flux(scene, 12), t5(scene, 6)
    scene.load(text)
    scene.load(denoiser, required=required)
    assert scene.is_loaded(denoiser)
    assert bytes_on_card(text.model) == 0
    assert_sound(denoiser.model, True)
    assert_as_built(text.model)


@pytest.mark.parametrize(
    ("slider_rest", "becomes", "says"),
    [(-500, 0, "'GPU Weights' is at"), (TOTAL + 1, TOTAL, "'GPU Weights' is at"), (math.nan, TOTAL, "not a number")],
)
def test_a_slider_out_of_range_is_put_right_in_forge(parts, lines, slider_rest, becomes, says):
    with scene_of(parts, rest=slider_rest) as scene:
        denoiser = flux(scene, 12)
        scene.load(denoiser)
        assert scene.memory.current_inference_memory == becomes
        assert scene.memory.minimum_inference_memory() == becomes
        assert scene.is_loaded(denoiser)
        assert_sound(denoiser.model, True)
        assert sum(line.startswith("LG-R04: ") and says in line for line in lines()) == 1
        scene.load(denoiser)
        assert sum(line.startswith("LG-R04: ") for line in lines()) == 1


def test_a_model_is_placed_for_a_step_that_needs_more_than_the_slider_leaves(scene, lines):
    """The host evicts for the step and places by the slider: 21 GB of 24 would lie there and 3 be left for 5."""
    denoiser = scene.patcher(Denoiser, [300] * 70)
    scene.load(denoiser, required=5_000)
    assert scene.machine.free() >= 5_000
    assert 0 < bytes_on_card(denoiser.model) < size_of(denoiser.model)
    assert_sound(denoiser.model, True)
    assert any(line.startswith("LG-R05: Denoiser needs about") for line in lines())


# -- how much of a model that does not fit is placed, and what a load leaves in torch's cache


def test_more_of_a_model_that_does_not_fit_lies_on_the_card_than_with_forge(parts):
    placed = {}
    for guarded in (True, False):
        with scene_of(parts, guarded=guarded) as scene:
            denoiser = flux(scene, 30, layers=60)
            scene.load(denoiser)
            placed[guarded] = bytes_on_card(denoiser.model)
    room, layer = TOTAL - REST, 500
    assert room - 768 - layer < placed[True] <= room - 768
    assert room / 1.3 - layer < placed[False] <= room / 1.3


@pytest.mark.parametrize("fixed", [[3_000], [1_500, 1_500]])
def test_several_models_use_the_room_though_a_part_of_the_later_ones_cannot_be_swapped(scene, fixed):
    """As a Flux and ControlNets in torch's own layers: what the first leaves for them is theirs, and no more stays free."""
    denoiser = flux(scene, 22, layers=44)
    controls = [scene.patcher(Upscaler, [100] * 8, size) for size in fixed]
    scene.load(denoiser, *controls)
    models = [one.model for one in (denoiser, *controls)]
    layer, room = 500, TOTAL - REST
    assert room - 768 - layer < sum(map(bytes_on_card, models)) <= room - 768
    for model in models:
        assert_sound(model, True)


@pytest.mark.parametrize("more", [100, 400, 700, 2_000, 5_000])
def test_what_is_left_for_swapping_stays_when_more_is_needed(scene, more):
    """A larger picture, or another LoRA: at most half of it is used up before layers leave."""
    denoiser = flux(scene, 30, layers=300)
    scene.load(denoiser)
    assert 768 <= scene.machine.free() - REST <= 768 + 100
    scene.load(denoiser, hard=more)
    left = scene.machine.free() - REST - more
    assert 768 / 2 <= left <= 768 + 100
    before = bytes_on_card(denoiser.model)
    scene.load(denoiser, hard=more)
    assert bytes_on_card(denoiser.model) == before, "nothing moves where nothing changed"
    scene.load(denoiser)
    assert 768 <= scene.machine.free() - REST <= 768 + 100
    assert_sound(denoiser.model, True)


@pytest.mark.parametrize(("unused", "times"), [(0, 0), (REST, 0), (REST + 1, 1)])
def test_a_load_gives_back_what_torch_holds_beyond_a_step(scene, monkeypatch, unused, times):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5_000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000 + unused)
    given_back = []
    monkeypatch.setattr(scene.memory, "soft_empty_cache", lambda: given_back.append(1))
    denoiser = flux(scene)
    scene.load(denoiser)
    assert len(given_back) == times
    # Not between the images of a loaded model, nor for another stack on it: the next step takes it.
    scene.load(denoiser)
    scene.load(denoiser.clone())
    assert len(given_back) == times


def test_every_function_is_given_back(parts):
    with scene_of(parts, guarded=False) as scene:
        names = ("load_models_gpu", "free_memory", "unload_model_clones")
        before = [getattr(scene.memory, name) for name in names]
        guard = ForgeTakeover(replace(parts, memory=scene.memory))
        guard.install()
        assert all(getattr(scene.memory, n) is not b for n, b in zip(names, before, strict=True))
        guard.uninstall()
        assert [getattr(scene.memory, name) for name in names] == before


def looks(scene, stack, required, *patchers):
    """How often a load looks at all layers of each model."""
    return walks_of(lambda: scene.load(stack, required=required), *(one.model.first for one in patchers))


SIZE = 2
"""Looks: this host's own one, and the guard's for what it corrects. Forge's own function takes the guard's list."""


def test_a_load_looks_a_few_times_at_the_layers_of_its_own_models_and_at_no_others(scene):
    """Each look at a thousand modules takes a millisecond or more of the time until the first step."""
    denoiser, text, decoder = models = flux(scene, 12), t5(scene, 4), vae(scene)
    scene.load(text)
    scene.load(denoiser, required=1_500)
    # Of a VAE that comes: sized for the journal, for the room that it takes, with what a decode takes, for its share on the card,
    # and twice by the host, which moves and bakes it, too. Asked for what cannot be swapped, for the largest layer, and for layers
    # with copies in RAM.
    assert looks(scene, decoder, 2_000, *models) == [0, 0, 6 * SIZE + 2 + 3]
    # Sized for the journal, for its share on the card, and twice for the plan that the panel shows; asked for swapped layers
    # before room is made, after that, and before they are pinned.
    assert looks(scene, denoiser, 1_500, *models) == [4 * SIZE + 3, 0, 0]
    # The same, and sized on the card and outside it before it is handed over.
    assert looks(scene, denoiser.clone(), 1_500, *models) == [6 * SIZE + 3, 0, 0]
    # A VAE has no plan; what a decode takes is noted.
    assert looks(scene, decoder, 2_000, *models) == [0, 0, 3 * SIZE + 2]


def test_a_load_of_a_swapped_model_looks_a_few_times_at_its_layers(scene):
    denoiser, text = flux(scene, 30), t5(scene, 2)
    scene.load(text)
    scene.load(denoiser, required=1_500)
    assert 0 < scene.away(denoiser) < size_of(denoiser.model)
    # Sized once more to choose what leaves and once more to bring back what may; then it is asked for what can come back.
    assert looks(scene, denoiser, 1_500, denoiser) == [6 * SIZE + 4]
    assert looks(scene, denoiser.clone(), 1_500, denoiser) == [8 * SIZE + 5]
