"""Who leaves the card and who stays, on a card that is not there (`support.fake_card`): the takeover as it is in Forge."""

import contextlib
import gc
import logging
import math
import sys
import types
import weakref
from dataclasses import replace

import pytest
import torch
from contract.host import Host
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fake_card import (
    CARD,
    NO_RAM,
    RAM,
    Denoiser,
    FakeMemory,
    IntegratedAutoencoderKL,
    JointTextEncoder,
    Machine,
    Upscaler,
    bytes_on_card,
    is_swapped,
    sides_of,
    size_of,
)
from support.forge_memory import VRAMState

from lib_lora_guard.hosts.forge.api import probe
from lib_lora_guard.hosts.forge.takeover import ForgeTakeover
from lib_lora_guard.memory import rules
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.planning import activations, on_card
from lib_lora_guard.recorder.crash_report import Precaution
from lib_lora_guard.recorder.flight_recorder import Phase

TOTAL, REST = 24_000, 1_000
"""Bytes: a card of 24 "GB" of which the slider leaves one."""


@pytest.fixture(scope="module", autouse=True)
def _swapping():
    """Bytes again: of the real 768 MB a quarter of the room would always be less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_card, "SWAPPING_BYTES", 768)
        yield


@pytest.fixture(scope="module")
def parts():
    """The double's LoRA loader and patchers; its memory management is replaced."""
    double = Host()
    gc.collect()
    # Looking for what is left of a model shall not take a look at all of torch each time.
    gc.freeze()
    yield probe()
    gc.unfreeze()
    double.close()


class Scene:
    """The fake Forge, with the guard (`guard`) or without it (None)."""

    def __init__(self, parts, total=TOTAL, rest=REST, guarded=True):
        self.machine = Machine(total)
        self.memory = FakeMemory(self.machine, rest)
        self.parts = parts
        self.guard = None
        if guarded:
            self.guard = ForgeTakeover(replace(parts, memory=self.memory))
            self.guard.memory.total_bytes = lambda device: self.machine.total
            self.guard.preflight.room_bytes = lambda: None
            self.guard.install()

    def patcher(self, kind, sizes, fixed=0):
        return self.parts.base.ModelPatcher(kind(self.machine, sizes, fixed), load_device=CARD, offload_device=RAM)

    def load(self, *patchers, required=0, hard=0):
        self.memory.load_models_gpu(list(patchers), memory_required=required, hard_memory_preservation=hard)

    def free_all(self):
        self.memory.free_memory(1e30, CARD, free_all=True)

    def away(self, patcher):
        return self.guard.residency.away_bytes(patcher.model)

    def is_loaded(self, patcher):
        return any(one.model is patcher for one in self.memory.current_loaded_models)

    @property
    def residency(self):
        return self.guard.residency

    def close(self):
        self.memory.current_loaded_models.clear()
        if self.guard is not None:
            self.guard.uninstall()


@contextlib.contextmanager
def scene_of(parts, **settings):
    scene = Scene(parts, **settings)
    try:
        yield scene
    finally:
        scene.close()


@pytest.fixture
def scene(parts):
    with scene_of(parts) as found:
        yield found


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    return lambda: [record.getMessage() for record in caplog.records]


def flux(scene, gigabytes=12, layers=24):
    return scene.patcher(Denoiser, [gigabytes * 1000 // layers] * layers)


def t5(scene, gigabytes=10, layers=20):
    return scene.patcher(JointTextEncoder, [gigabytes * 1000 // layers] * layers)


def vae(scene):
    return scene.patcher(IntegratedAutoencoderKL, [20] * 8)


def assert_as_built(model):
    for layer in model.layers():
        assert not is_swapped(layer)
        assert layer.parameters_manual_cast is layer.as_built


def assert_sound(model, is_loaded):
    """Every layer can run where it lies."""
    for layer in model.layers():
        if is_swapped(layer):
            assert layer.parameters_manual_cast is True
            assert layer.prev_parameters_manual_cast is layer.as_built
        else:
            assert layer.parameters_manual_cast is layer.as_built
            assert len(sides_of(layer)) == 1
            if is_loaded:
                assert sides_of(layer) == {CARD}
    if is_loaded:
        assert sides_of(model.norm) == {CARD}


# -- one thing at a time


def test_what_fits_stays(scene):
    denoiser, text, decoder = flux(scene, 12), t5(scene, 8), vae(scene)
    for patcher in (text, denoiser, decoder, text, denoiser, decoder):
        scene.load(patcher, required=500)
    assert scene.machine.moved == sum(size_of(p.model) for p in (denoiser, text, decoder))
    for patcher in (denoiser, text, decoder):
        assert bytes_on_card(patcher.model) == size_of(patcher.model)
        assert_as_built(patcher.model)


@pytest.mark.parametrize(("required", "spare"), [(0, REST), (1_500, 1_500)])
def test_to_the_byte(scene, required, spare):
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


def prompts(scene, rounds=5):
    """Rounds of a prompt, a picture and its decode; the bytes moved in all rounds but the first."""
    denoiser, text, decoder = flux(scene, 18), t5(scene, 10), vae(scene)
    first = 0
    for number in range(rounds):
        scene.load(text)
        scene.load(denoiser, required=1_500)
        scene.load(decoder, required=2_000)
        if not number:
            first = scene.machine.moved
    return scene.machine.moved - first, denoiser, text


def test_prompts_move_less_than_in_the_host(parts):
    """24 GB, a denoiser of 18 and a text encoder of 10: the host carries both there and back in each round."""
    with scene_of(parts, guarded=False) as stock:
        by_host, _, _ = prompts(stock)
    with scene_of(parts) as scene:
        by_guard, denoiser, text = prompts(scene)
        assert_sound(denoiser.model, scene.is_loaded(denoiser))
        assert_sound(text.model, scene.is_loaded(text))
    assert by_host == 4 * 2 * (18_000 + 10_000 + 160)
    assert by_guard < 0.35 * by_host


def test_a_text_encoder_runs_swapped_beside_a_large_denoiser(parts, lines):
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
    assert any("JointTextEncoder comes for 2 calls" in line for line in lines())
    assert not any("leaves the card" in line for line in lines())


def test_a_decode_takes_only_what_is_missing(parts):
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


def test_a_share_that_shrinks_for_a_reason_is_no_alarm(parts, lines, monkeypatch):
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


def test_who_was_used_longest_ago_leaves_first(scene):
    models = [scene.patcher(Upscaler, [500] * 14) for _ in range(4)]
    for patcher in models:
        scene.load(patcher)
    assert bytes_on_card(models[0].model) < size_of(models[0].model)
    for patcher in models[1:]:
        assert bytes_on_card(patcher.model) == size_of(patcher.model)


def test_a_merged_layer_stays(scene):
    denoiser = flux(scene, 20)
    merged = set(denoiser.model.layers()[:6])
    scene.residency._merged_layers = lambda model: merged
    scene.load(denoiser)
    scene.memory.free_memory(10_000, CARD)
    assert scene.machine.free() >= 10_000
    assert all(sides_of(layer) == {CARD} and not is_swapped(layer) for layer in merged)
    assert_sound(denoiser.model, True)
    # Where that is not enough, all of it goes, and the host lifts the merges then.
    scene.memory.free_memory(TOTAL - 100, CARD)
    assert not scene.is_loaded(denoiser)
    assert bytes_on_card(denoiser.model) == 0
    assert_as_built(denoiser.model)


@pytest.mark.parametrize(
    ("wanted", "leave"),
    [
        (1, [96]),
        (96, [96]),
        (97, [304]),
        (850, [896]),
        (2_000, [2_000]),
        (2_001, [2_000, 96]),
        # 900 are missing then: 896, and the smallest that closes the gap.
        (2_900, [2_000, 896, 96]),
        (3_296, [96, 304, 896, 2_000]),
        (99_999, [96, 304, 896, 2_000]),
    ],
)
def test_few_copies_and_little_too_much(scene, wanted, leave):
    sizes = [304, 2_000, 96, 896]
    denoiser = scene.patcher(Denoiser, sizes, fixed=10)
    scene.load(denoiser)
    moved = scene.residency.shrink(scene.memory.current_loaded_models[0], wanted)
    gone = [size_of(layer) for layer in denoiser.model.layers() if sides_of(layer) == {RAM}]
    assert sorted(gone) == sorted(leave)
    assert moved == sum(leave) == scene.away(denoiser)
    assert size_of(denoiser.model.norm) == 10
    assert sides_of(denoiser.model.norm) == {CARD}


def test_a_new_patcher_of_the_model_brings_it_back(scene):
    """A change of LoRAs while parts of the model are away, and Forge having forgotten the old patcher."""
    denoiser = flux(scene, 20)
    model = denoiser.model
    scene.load(denoiser)
    decoder = vae(scene)
    scene.load(decoder, required=6_000)
    assert scene.away(denoiser) > 0
    denoiser = denoiser.clone()
    scene.load(decoder, required=6_000)
    scene.load(denoiser)
    assert bytes_on_card(model) == size_of(model)
    assert scene.away(denoiser) == 0
    assert_as_built(model)


def test_a_model_that_nobody_holds_is_not_kept_alive(scene):
    denoiser, decoder = flux(scene, 20), vae(scene)
    scene.load(denoiser, required=1_500)
    scene.load(decoder, required=6_000)
    assert scene.away(denoiser) > 0
    scene.guard.calibration.estimates.architecture(denoiser.model)
    gone = weakref.ref(denoiser.model), weakref.ref(denoiser.model.layers()[3])
    del denoiser
    scene.memory.free_memory(0, CARD)
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert scene.machine.free() == TOTAL - size_of(decoder.model)
    assert not scene.residency._away
    assert not scene.residency._was_accelerated


# -- what goes where


def test_the_sentinel_and_free_all_are_the_hosts(scene, lines):
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


def test_what_was_away_is_forgotten_when_the_host_moves_the_model(scene):
    denoiser, decoder = flux(scene, 20), vae(scene)
    scene.load(denoiser)
    scene.load(decoder, required=6_000)
    assert scene.away(denoiser) > 0
    scene.free_all()
    assert scene.away(denoiser) == 0
    assert_as_built(denoiser.model)
    moved = scene.machine.moved
    scene.load(denoiser)
    assert bytes_on_card(denoiser.model) == size_of(denoiser.model)
    assert scene.machine.moved - moved == size_of(denoiser.model)
    assert_as_built(denoiser.model)


def test_everything_but_what_is_kept(scene):
    denoiser, decoder = flux(scene), vae(scene)
    scene.load(denoiser)
    scene.load(decoder)
    kept = [one for one in scene.memory.current_loaded_models if one.model is decoder]
    scene.memory.free_memory(TOTAL, CARD, keep_loaded=kept)
    assert [one.model for one in scene.memory.current_loaded_models] == [decoder]
    assert bytes_on_card(decoder.model) == size_of(decoder.model)
    assert scene.memory.calls == [], "nothing of it was the host's work"


def test_a_request_above_the_card_is_the_whole_card(scene, lines):
    denoiser = flux(scene)
    scene.load(denoiser)
    scene.memory.free_memory(10 * TOTAL, CARD)
    assert not scene.memory.current_loaded_models
    assert bytes_on_card(denoiser.model) == 0
    assert sum(line.startswith("LG-R02: ") for line in lines()) == 1
    scene.memory.free_memory(10 * TOTAL, CARD)
    assert sum(line.startswith("LG-R02: ") for line in lines()) == 1, "once while it stays the same"


@pytest.mark.parametrize(("asked", "says"), [(math.nan, "not a number"), (-5e9, "asked for -4768 MB")])
def test_no_amount_is_nothing(scene, lines, asked, says):
    denoiser, decoder = flux(scene, 12), vae(scene)
    scene.load(denoiser)
    scene.memory.free_memory(asked, CARD)
    scene.load(decoder, required=asked, hard=asked)
    for patcher in (denoiser, decoder):
        assert bytes_on_card(patcher.model) == size_of(patcher.model)
    assert any(line.startswith("LG-R03: ") and says in line for line in lines())
    assert scene.machine.moved == size_of(denoiser.model) + size_of(decoder.model)


@pytest.mark.parametrize("required", [1e30, 10 * TOTAL, math.inf])
def test_a_step_above_the_card_leaves_what_it_can(scene, required):
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
def test_a_slider_out_of_range_is_put_right_in_the_host(parts, lines, slider_rest, becomes, says):
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


def test_a_step_that_needs_more_than_the_slider_leaves_is_placed_for(scene, lines):
    """The host evicts for the step and places by the slider: 21 GB of 24 would lie there and 3 be left for 5."""
    denoiser = scene.patcher(Denoiser, [300] * 70)
    scene.load(denoiser, required=5_000)
    assert scene.machine.free() >= 5_000
    assert 0 < bytes_on_card(denoiser.model) < size_of(denoiser.model)
    assert_sound(denoiser.model, True)
    assert any(line.startswith("LG-R05: Denoiser needs about") for line in lines())


@pytest.mark.parametrize("own_rule", [VRAMState.HIGH_VRAM, VRAMState.NO_VRAM, VRAMState.DISABLED, "always"])
def test_where_the_host_has_a_rule_of_its_own_it_decides(parts, own_rule):
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


def test_another_device_is_the_hosts(scene):
    scene.memory.free_memory(5, torch.device("mps"))
    assert scene.memory.calls == [(5, False)]
    assert not scene.guard.memory.plans_for(None)
    assert not scene.guard.memory.plans_for(RAM)
    assert scene.guard.memory.plans_for(CARD)
    scene.memory.vram_state = VRAMState.LOW_VRAM
    assert scene.guard.memory.plans_for(CARD)


def test_models_of_two_devices_are_placed_by_the_host(scene):
    denoiser, decoder = flux(scene), vae(scene)
    decoder.load_device = RAM
    scene.load(denoiser, decoder)
    assert bytes_on_card(denoiser.model) == size_of(denoiser.model)


def test_everything_is_given_back(parts):
    with scene_of(parts, guarded=False) as scene:
        names = ("load_models_gpu", "free_memory", "unload_model_clones")
        before = [getattr(scene.memory, name) for name in names]
        guard = ForgeTakeover(replace(parts, memory=scene.memory))
        guard.install()
        assert all(getattr(scene.memory, n) is not b for n, b in zip(names, before, strict=True))
        guard.uninstall()
        assert [getattr(scene.memory, name) for name in names] == before


def test_a_model_that_forge_gave_up_gets_its_layers_back_when_the_guard_goes(parts):
    """Too large for the card it has swapped layers; once Forge has forgotten it, nobody but the guard knows which."""
    with scene_of(parts) as scene:
        denoiser = flux(scene, gigabytes=40)
        scene.load(denoiser)
        model = denoiser.model
        assert any(is_swapped(layer) for layer in model.layers())
        del denoiser
        gc.collect()
        scene.guard.memory.drop_abandoned()
        assert model in scene.guard.placement._given_up
        scene.guard.uninstall()
        scene.guard = None
        assert_as_built(model)


# -- RAM runs out on the way

ERRORS = [lambda: RuntimeError(NO_RAM), lambda: OutOfMemory[0]("CUDA out of memory."), MemoryError]


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_a_move_that_fails_leaves_every_layer_whole(parts, lines, error, permanent):
    """A decode wants room from a denoiser; the k-th move to RAM fails, for every k."""
    moves = 0
    for k in range(1, 60):
        with scene_of(parts) as scene:
            denoiser, decoder = scene.patcher(Denoiser, [800] * 25), vae(scene)
            scene.load(denoiser)
            scene.machine.fails = lambda move, k=k: error() if (move >= k if permanent else move == k) else None
            scene.load(decoder, required=9_000)
            assert all(len(sides_of(layer)) == 1 for layer in denoiser.model.layers())
            assert_sound(denoiser.model, scene.is_loaded(denoiser))
            assert scene.is_loaded(denoiser)
            assert scene.is_loaded(decoder)
            if scene.machine.moves_to_ram < k:
                moves = scene.machine.moves_to_ram
                break
            scene.machine.fails = lambda move: None
            scene.load(denoiser)
            assert bytes_on_card(denoiser.model) == size_of(denoiser.model)
            assert_as_built(denoiser.model)
    assert moves >= 8, "every move was made to fail once"
    assert any("could not leave the card for lack of RAM" in line for line in lines())


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_a_whole_model_that_cannot_leave_can_still_run(parts, error, permanent):
    """An unknown model of many passes wants the whole card; the denoiser's k-th move fails."""
    moves = 0
    for k in range(1, 60):
        with scene_of(parts) as scene:
            denoiser, other = flux(scene, 20, layers=10), scene.patcher(Upscaler, [800] * 30)
            scene.load(denoiser)
            scene.machine.fails = lambda move, k=k: error() if (move >= k if permanent else move == k) else None
            scene.load(other)
            assert scene.is_loaded(other)
            assert_sound(other.model, True)
            assert all(len(sides_of(layer)) == 1 for layer in denoiser.model.layers())
            assert_sound(denoiser.model, scene.is_loaded(denoiser))
            if scene.machine.moves_to_ram < k:
                moves = scene.machine.moves_to_ram
                break
            scene.machine.fails = lambda move: None
            scene.load(denoiser)
            assert bytes_on_card(denoiser.model) == size_of(denoiser.model)
            assert_as_built(denoiser.model)
    assert moves >= 8


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("broken"), KeyError(3)]
)
def test_other_errors_come_through(scene, error):
    denoiser, decoder = flux(scene, 20), vae(scene)
    scene.load(denoiser)
    scene.machine.fails = lambda move: error if move == 4 else None
    with pytest.raises(type(error)) as raised:
        scene.load(decoder, required=9_000)
    assert raised.value is error
    assert_sound(denoiser.model, True)
    scene.load(decoder, required=9_000)
    scene.load(denoiser)
    assert bytes_on_card(denoiser.model) == size_of(denoiser.model)
    assert_as_built(denoiser.model)


def test_a_card_that_is_fuller_than_it_said_leaves_layers_swapped(scene, monkeypatch):
    """What was away cannot come back: another program took the room between the question and the move."""
    denoiser, decoder = flux(scene, 20, layers=80), vae(scene)
    scene.load(denoiser)
    scene.load(decoder, required=10_000)
    away = scene.away(denoiser)
    real = scene.memory.get_free_memory
    scene.machine.ballast = scene.machine.free() - away // 2
    monkeypatch.setattr(
        scene.memory, "get_free_memory", lambda *a, **k: (0, 0) if k.get("torch_free_too") else real() + 8_000
    )
    scene.load(denoiser)
    assert 0 < scene.away(denoiser) < away
    assert all(len(sides_of(layer)) == 1 for layer in denoiser.model.layers())
    assert_sound(denoiser.model, True)


def test_a_broken_card_is_no_full_card(scene):
    """Whatever else goes wrong when a layer comes back goes on to the host."""
    denoiser, decoder = flux(scene, 20), vae(scene)
    scene.load(denoiser)
    scene.load(decoder, required=9_000)
    layer = next(iter(scene.residency._away[denoiser.model]))
    broken = RuntimeError("CUDA error: an illegal memory access")
    real, moves = layer.to, []

    def to(device):
        moves.append(device)
        if len(moves) == 1:
            layer.weight.data = layer.weight.data.to(device)
            raise broken
        return real(device)

    layer.to = to
    with pytest.raises(RuntimeError) as raised:
        scene.load(denoiser)
    assert raised.value is broken
    assert moves == [CARD, RAM]
    assert_sound(denoiser.model, True)
    assert sides_of(layer) == {RAM}


def test_nothing_is_moved_into_ram_that_is_not_there(scene, lines):
    """The page file has 100 bytes left: the denoiser stays whole, and what comes is placed beside it."""
    denoiser, decoder = flux(scene, 20), scene.patcher(IntegratedAutoencoderKL, [400] * 8)
    scene.load(denoiser)
    scene.guard.preflight.room_bytes = lambda: 100
    scene.load(decoder, required=6_000)
    scene.memory.free_memory(TOTAL, CARD)
    scene.load(denoiser, required=20_000)
    assert scene.machine.moves_to_ram == 0
    assert bytes_on_card(denoiser.model) == size_of(denoiser.model)
    assert_as_built(denoiser.model)
    assert scene.is_loaded(decoder)
    assert any(line.startswith("Denoiser could not leave the card for lack of RAM") for line in lines())
    scene.guard.preflight.room_bytes = lambda: TOTAL
    scene.memory.free_memory(10_000, CARD)
    assert scene.machine.free() >= 10_000


def test_after_a_crash_in_unloading_as_much_leaves_as_ram_is_fast_for(scene):
    """Once; when that went well the whole model may go again."""
    denoiser = flux(scene, 20)
    scene.load(denoiser)
    whole = bytes_on_card(denoiser.model)
    scene.guard.precautions.planned = lambda model: {Precaution.PARTIAL_UNLOAD}
    scene.guard.preflight.fast_bytes = lambda: 5_000
    scene.memory.free_memory(TOTAL, CARD)
    assert scene.is_loaded(denoiser)
    # In whole layers, of which the last one may be cut.
    assert 5_000 <= whole - bytes_on_card(denoiser.model) < 5_000 + 20_000 // 24 + 1
    scene.memory.free_memory(TOTAL, CARD)
    assert not scene.is_loaded(denoiser)
    assert bytes_on_card(denoiser.model) == 0


def test_an_engine_tells_the_journal_what_it_is_about_to_do(scene):
    told = []
    scene.guard.journal.phase = lambda phase, plan: told.append((phase, plan)) or contextlib.nullcontext()
    denoiser = flux(scene, 5)
    with scene.guard.control._state(denoiser.lora_loader).engine.watch(Phase.MERGE, 7):
        assert told == [(Phase.MERGE, {"ram": 7})]


# -- what a model is asked


@pytest.mark.parametrize("forges", [7, 7.9, math.inf, math.nan, "much", None])
@pytest.mark.parametrize("shape", [[2, 4, 8, 8], [2, 4], [2, 4, 1, 8, 8], ["b", 4, 8, 8], None])
def test_an_estimate_that_cannot_be_had_is_the_hosts(scene, forges, shape):
    estimates = scene.guard.calibration.estimates
    model = torch.nn.Linear(2, 2)
    found = estimates.memory_required(lambda model, shape: forges, model, shape)
    assert found == forges or (forges == 7.9 and found == 7) or found is forges


# -- any order

KINDS = (Denoiser, JointTextEncoder, IntegratedAutoencoderKL, Upscaler)
sizes = st.lists(st.integers(8, 4_000), min_size=2, max_size=8)
models = st.tuples(st.sampled_from(KINDS), sizes, st.integers(0, 40), st.sets(st.integers(0, 9), max_size=3))
amounts = st.one_of(st.just(0), st.integers(0, 6_000), st.integers(0, 60_000), st.just(math.nan), st.just(-100.0))
places = st.integers(0, 3)
steps = st.one_of(
    st.tuples(st.just("load"), places, amounts, st.integers(0, 500)),
    st.tuples(st.just("load"), places, amounts, st.integers(0, 500)),
    st.tuples(st.just("load_two"), places, places, amounts),
    st.tuples(st.just("free"), amounts, st.one_of(st.none(), places)),
    st.tuples(st.just("clone"), places),
    st.tuples(st.just("free_all")),
    st.tuples(st.just("drop"), places),
    st.tuples(st.just("ballast"), st.integers(0, 3_000)),
)


class Run:
    """Carries out steps and holds the invariants after each."""

    def __init__(self, scene, drawn):
        gc.freeze()
        self.scene = scene
        self.patchers = {}
        self.merged = {}
        for place, (kind, sizes, fixed, merged) in enumerate(drawn):
            patcher = scene.patcher(kind, sizes, fixed)
            self.patchers[place] = patcher
            layers = patcher.model.layers()
            self.merged[id(patcher.model)] = {id(layers[i]) for i in merged if i < len(layers)}
        self.sizes = {place: size_of(p.model) for place, p in self.patchers.items()}
        residency = scene.residency
        residency._merged_layers = lambda model: [
            layer for layer in model.layers() if id(layer) in self.merged[id(model)]
        ]

    def on_card(self):
        return {place: bytes_on_card(p.model) for place, p in self.patchers.items()}

    def step(self, name, *values):
        getattr(self, name)(*values)
        self.check()

    def check(self):
        scene = self.scene
        assert scene.machine.free() >= 0
        listed = [one.model.model for one in scene.memory.current_loaded_models]
        assert len({id(model) for model in listed}) == len(listed)
        for place, patcher in self.patchers.items():
            model = patcher.model
            assert size_of(model) == self.sizes[place]
            is_loaded = any(model is one for one in listed)
            assert_sound(model, is_loaded)
            away = scene.residency._away.get(model, ())
            assert not {id(layer) for layer in away} & self.merged[id(model)]
            assert all(sides_of(layer) == {RAM} and is_swapped(layer) for layer in away)
            if not is_loaded and model not in scene.guard.placement._given_up:
                assert_as_built(model)
                assert not away

    def needs(self, patchers, required, hard):
        def within(value):
            return 0 if math.isnan(value) else max(0, min(value, TOTAL))

        is_vae = any(isinstance(p.model, IntegratedAutoencoderKL) for p in patchers)
        share = activations.VAE_HOLDS_WHERE_FORGE_HAS if is_vae else 1
        estimate = within(required * share)
        return max(REST, int(estimate)) + int(within(hard))

    def load(self, place, required, hard):
        self.load_all([place], required, hard)

    def load_two(self, one, two, required):
        self.load_all(list(dict.fromkeys((one, two))), required, 0)

    def load_all(self, wanted, required, hard):
        wanted = [place for place in wanted if place in self.patchers]
        if not wanted:
            return
        scene, patchers = self.scene, [self.patchers[place] for place in wanted]
        scene.guard.memory.drop_abandoned()
        before, free = self.on_card(), scene.machine.free()
        new = {place for place in wanted if not scene.is_loaded(self.patchers[place])}
        outside = sum(
            self.sizes[place] - before[place] if place in new else scene.away(self.patchers[place]) for place in wanted
        )
        scene.load(*patchers, required=required, hard=hard)
        after, need = self.on_card(), self.needs(patchers, required, hard)
        listed = [one.model.model for one in scene.memory.current_loaded_models]
        others = [p for p in self.patchers if p not in wanted and any(self.patchers[p].model is one for one in listed)]
        assert all(scene.is_loaded(p) for p in patchers)
        if free - outside >= need:
            # It fits: nobody leaves, and all of it is there.
            assert all(after[place] == before[place] for place in before if place not in wanted)
            assert all(scene.away(p) == 0 for p in patchers)
            assert all(after[place] == self.sizes[place] for place in new if not before[place])
        if scene.machine.free() < need:
            # As far as it can be helped: whatever could leave has left, but what was counted and cannot be split.
            assert all(after[place] == 0 for place in others)
            kept = sum(
                size_of(layer)
                for p in patchers
                for layer in p.model.layers()
                if sides_of(layer) == {CARD} and id(layer) not in self.merged[id(p.model)]
            )
            assert kept == 0
        alone = len(wanted) == 1 and isinstance(patchers[0].model, (Denoiser, Upscaler))
        if alone and sum(after[p] for p in others) > 0:
            # Nothing of it waits outside while others have what it lacks.
            assert scene.away(patchers[0]) == 0

    def free(self, asked, kept):
        scene = self.scene
        scene.guard.memory.drop_abandoned()
        before, free = self.on_card(), scene.machine.free()
        keep = [one for one in scene.memory.current_loaded_models if one.model is self.patchers.get(kept)]
        scene.memory.free_memory(asked, CARD, keep_loaded=keep)
        wanted = 0 if math.isnan(asked) else max(0, min(asked, TOTAL))
        after = self.on_card()
        if free >= wanted:
            assert after == before
        if keep:
            assert after[kept] == before[kept]
        if scene.machine.free() < wanted:
            listed = {id(one.model.model) for one in scene.memory.current_loaded_models if one not in keep}
            assert all(after[p] == 0 for p in self.patchers if id(self.patchers[p].model) in listed)

    def clone(self, place):
        if place in self.patchers:
            self.patchers[place] = self.patchers[place].clone()

    def free_all(self):
        self.scene.free_all()
        assert not self.scene.memory.current_loaded_models

    def drop(self, place):
        if place not in self.patchers:
            return
        gone = weakref.ref(self.patchers.pop(place).model)
        self.scene.memory.free_memory(0, CARD)
        gc.collect()
        assert gone() is None

    def ballast(self, size):
        # Other programs take what is free and no more.
        machine = self.scene.machine
        machine.ballast = min(size, machine.ballast + machine.free())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(models, min_size=2, max_size=4), st.lists(steps, min_size=3, max_size=14))
def test_any_order_of_loading_and_freeing(parts, drawn, todo):
    with scene_of(parts) as scene:
        run = Run(scene, drawn)
        for step in todo:
            run.step(*step)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(models, min_size=2, max_size=3),
    st.lists(steps, min_size=3, max_size=8),
    st.sets(st.integers(1, 60), max_size=12),
)
def test_any_order_with_ram_that_runs_out(parts, drawn, todo, failing):
    """Nothing is asked of the room then, only that every model can run and the host goes on."""
    with scene_of(parts) as scene:
        run = Run(scene, drawn)
        scene.machine.fails = lambda move: RuntimeError(NO_RAM) if move in failing else None
        for name, *values in todo:
            if name in ("load", "load_two"):
                wanted = {run.patchers[p] for p in values[: 1 if name == "load" else 2] if p in run.patchers}
                with contextlib.suppress(RuntimeError):  # the host's own placing moves layers to RAM too
                    scene.load(*wanted, required=values[-1])
            elif name == "free":
                scene.memory.free_memory(values[0], CARD)
        scene.machine.fails = lambda move: None
        scene.free_all()
        for patcher in run.patchers.values():
            scene.load(patcher)
            assert_sound(patcher.model, True)
            scene.free_all()
            assert bytes_on_card(patcher.model) == 0
            assert_as_built(patcher.model)


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


def test_another_rule_than_forges_stays(parts, monkeypatch):
    """A fork's, or that of an extension that has wrapped the function."""
    monkeypatch.setattr(FakeMemory, BUDGET, lambda self, current_free_mem, inference_memory: 4_321)
    with scene_of(parts) as scene:
        assert budgets(scene) == (4_321, 4_321)


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
