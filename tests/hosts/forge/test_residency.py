"""Layers of a loaded model leave the card and come back whole, on a card that is not there (`support.fake_card`)."""

import gc
import itertools
import statistics
import types
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.card_scene import TOTAL, assert_as_built, assert_sound, flux, scene_of, vae
from support.fake_card import (
    CARD,
    NO_RAM,
    RAM,
    Denoiser,
    IntegratedAutoencoderKL,
    Upscaler,
    bytes_on_card,
    is_swapped,
    parameter,
    sides_of,
    size_of,
)

from lib_lora_guard.hosts.forge.facts import loaded_module
from lib_lora_guard.hosts.forge.residency import _fewest, _returning, _spread
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.recorder.crash_report import Precaution
from lib_lora_guard.runtime.host import Swapped

pytestmark = pytest.mark.usefixtures("swapping_in_bytes")


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
def test_few_layers_leave_and_little_more_than_wanted(scene, wanted, leave):
    sizes = [304, 2_000, 96, 896]
    denoiser = scene.patcher(Denoiser, sizes, fixed=10)
    scene.load(denoiser)
    moved = scene.residency.shrink(scene.memory.current_loaded_models[0], wanted)
    gone = [size_of(layer) for layer in denoiser.model.layers() if sides_of(layer) == {RAM}]
    assert sorted(gone) == sorted(leave)
    assert moved == sum(leave) == scene.away(denoiser)
    assert size_of(denoiser.model.norm) == 10
    assert sides_of(denoiser.model.norm) == {CARD}


class Scale(torch.nn.Module):
    """A raw parameter: Forge leaves it in RAM unless it places all of the model, and the model's own code copies it."""

    def __init__(self, machine):
        super().__init__()
        self.scale = parameter(machine, (4,))


def test_a_model_is_whole_again_though_the_host_leaves_raw_parameters_in_ram(scene):
    """700 bytes stay free then, less than what swapped layers would need."""
    denoiser = scene.patcher(Denoiser, [2_230] * 10)
    denoiser.model.scales = Scale(scene.machine)
    scene.machine.ballast = 5_000
    scene.load(denoiser)
    model = denoiser.model
    assert 0 < bytes_on_card(model) < 18_000
    scene.machine.ballast = 0
    changed = denoiser.clone()
    scene.load(changed)
    assert scene.away(changed) == 0
    assert bytes_on_card(model) == scene.machine.moved == 22_300, "each byte has come once"
    assert model.scales.scale.device == RAM


def test_of_what_is_swapped_a_merged_layer_does_not_come_back(scene):
    denoiser = scene.patcher(Denoiser, [2_000] * 4, fixed=40)
    scene.load(denoiser)
    scene.residency.shrink(scene.memory.current_loaded_models[0], 6_000)
    swapped = [layer for layer in denoiser.model.layers() if is_swapped(layer)]
    assert scene.residency.swapped(denoiser.model) == Swapped(6_000, 6_000, 0)
    scene.residency._merged_layers = lambda model: {swapped[0]}
    assert scene.residency.swapped(denoiser.model) == Swapped(6_000, 4_000, 0)
    assert scene.away(denoiser) == 4_000
    assert scene.residency.grow(scene.memory.current_loaded_models[0], 9_000) == 4_000
    assert sides_of(swapped[0]) == {RAM}


def test_what_forge_can_swap_is_not_fixed_though_another_extension_added_a_module_to_it(scene):
    """Forge asks for its own attribute first, of every module."""
    denoiser = scene.patcher(Denoiser, [2_000] * 4, fixed=40)
    model = denoiser.model
    model.layers()[0].added = torch.nn.Identity()
    model.scales = Scale(scene.machine)
    assert scene.residency.fixed_bytes(model, CARD) == size_of(model.norm) == 40
    assert scene.residency.loose_bytes(model, CARD) == 8


class OnTheCardAlone(torch.nn.Module):
    """Another extension's layer: its weight is computed when it is asked for."""

    def __init__(self, machine):
        super().__init__()
        self.packed = parameter(machine, (8,))

    @property
    def weight(self):
        raise RuntimeError("only on the card")


def test_no_load_asks_for_a_weight_that_another_extension_computes(scene):
    """It counts as fixed all the same, as Forge has it."""
    denoiser = scene.patcher(Denoiser, [2_000] * 4, fixed=40)
    denoiser.model.computed = OnTheCardAlone(scene.machine)
    assert scene.residency.fixed_bytes(denoiser.model, CARD) == 40 + 16
    scene.load(denoiser)
    scene.load(denoiser.clone())
    assert denoiser.model.computed.packed.device == CARD


def test_a_layer_with_a_merged_lora_leaves_only_with_the_whole_model(scene):
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


def test_layers_come_back_for_another_patcher_of_the_model(scene):
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


def test_a_model_with_layers_away_is_freed_with_its_last_reference(scene):
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


def test_layers_count_as_away_no_more_once_forge_moves_the_model(scene):
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


# -- moves that fail

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
def test_errors_other_than_a_lack_of_ram_are_raised(scene, error):
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


def test_an_error_of_the_card_is_raised_when_layers_come_back(scene):
    """Whatever else goes wrong when a layer comes back goes on to the host."""
    denoiser, decoder = flux(scene, 20), vae(scene)
    scene.load(denoiser)
    scene.load(decoder, required=9_000)
    layer = next(layer for layer in denoiser.model.layers() if is_swapped(layer))
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


def test_a_host_that_keeps_the_loaded_model_weakly_is_read_like_the_others():
    model = torch.nn.Linear(2, 2)
    loaded = types.SimpleNamespace(real_model=weakref.ref(model))
    assert loaded_module(loaded) is model
    del model
    assert loaded_module(loaded) is None
    assert loaded_module(types.SimpleNamespace(real_model=None)) is None


SIZES = st.lists(st.integers(1, 60), max_size=40)


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(-5, 900))
def test_what_returns_uses_the_room_and_leaves_few_large_layers_out(sizes, room):
    away = [(size, torch.nn.Identity()) for size in sizes]
    found = _returning(away, room)
    back = {layer for _, layer in found}
    out = [size for size, layer in away if layer not in back]
    assert sum(size for size, _ in found) <= max(0, room)
    assert all(size > room - sum(size for size, _ in found) for size in out), "none of them would have fitted"
    assert len(back) == len(found)
    # As many as the largest ones make up what cannot be there.
    lacking, count = sum(sizes) - max(0, room), 0
    for size in sorted(sizes, reverse=True):
        if lacking <= 0:
            break
        lacking, count = lacking - size, count + 1
    assert len(out) <= count


def test_of_a_flux_the_layers_that_see_one_token_return_first():
    """As measured in a whole Forge with an NF4 Flux and 8 GB: largest first brought the large ones back, and left 15 modulations."""
    away = [(31, f"linear1 {n}") for n in range(38)] + [(27, f"lin {n}") for n in range(20)]
    returning = [layer for _, layer in _returning(away, sum(size for size, _ in away) - 430)]
    out = {layer for _, layer in away} - set(returning)
    assert len(out) == 14
    # The last one is the smallest that closes the gap.
    assert sum("linear1" in layer for layer in out) == 13


@pytest.mark.parametrize(("count", "out"), [(38, 5), (38, 13), (57, 8), (16, 4), (1, 1), (3, 2)])
def test_layers_of_one_size_that_leave_lie_apart(count, out):
    """Of 38 blocks in a row the first 13 would wait for each other: each copy takes longer than one block."""
    places = [place for _, place in _fewest([(10, place) for place in range(count)], 10 * out)]
    assert len(places) == out
    gaps = [b - a for a, b in itertools.pairwise(sorted(places))]
    assert all(gap <= 2 * count / out + 1 for gap in gaps)
    assert not gaps or statistics.mean(gaps) > 0.6 * count / out
    assert sorted(place for _, place in _spread([(1, place) for place in range(count)])) == list(range(count))
