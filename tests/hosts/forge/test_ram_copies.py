"""Copies in RAM of layers that leave and return, on a card that is not there. `support.fake_card` has weights without values, so the
copies are played; `tests/runtime/test_ram_copies.py` has the real ones."""

import pytest
import torch
from support.card_scene import flux, t5, vae
from support.fake_card import CARD, RAM, Weight, sides_of, size_of

pytestmark = pytest.mark.usefixtures("swapping_in_bytes")


class Pinned:
    """Keeps a copy of each layer that it was given."""

    works, bytes = True, 0

    def __init__(self):
        self.in_ram, self.kept, self.left = set(), set(), []

    def pin(self, layers):
        new = set(layers) - self.in_ram
        self.in_ram |= new
        return sum(map(size_of, new))

    def keeps_all(self):
        return self.works

    def before_card(self, layer, returns=False):
        return {"weight": layer} if (returns or layer in self.in_ram) and sides_of(layer) == {RAM} else {}

    def on_card(self, layer, before):
        self.kept |= {layer} if before else set()

    def kept_bytes(self, layers):
        return sum(size_of(layer) for layer in layers if layer in self.kept)

    def pinned_bytes(self, layers):
        return sum(size_of(layer) for layer in layers if layer in self.in_ram)

    def to_ram(self, layer):
        if layer not in self.kept:
            return False
        self.kept.discard(layer)
        self.left.append(layer)
        for parameter in layer.parameters():
            data = parameter.data
            parameter.data = Weight(data.machine, data.shape, data.dtype, RAM)
        return True

    def moving(self, layers, return_all=False):
        return torch.no_grad()

    def pinning(self):
        return torch.no_grad()


@pytest.fixture
def pinned(scene):
    played = Pinned()
    scene.residency._copies = played
    return played


def test_what_left_for_a_decode_leaves_the_second_time_without_a_move(scene, pinned):
    denoiser = flux(scene, 20)
    scene.load(denoiser, required=1_500)
    decoder = vae(scene)
    scene.load(decoder, required=6_000)
    gone = {layer for layer in denoiser.model.layers() if sides_of(layer) == {RAM}}
    assert gone
    assert gone <= pinned.in_ram
    assert scene.guard.memory.placed(denoiser).swapped().pinned_bytes == sum(map(size_of, gone))
    scene.load(denoiser, required=1_500)
    assert scene.guard.memory.placed(denoiser).swapped().pinned_bytes == 0
    assert {sides_of(layer) == {CARD} for layer in gone} == {True}
    assert scene.guard.memory.placed(denoiser).copied_bytes() == sum(map(size_of, gone))
    moves = scene.machine.moves_to_ram
    scene.load(decoder, required=6_000)
    assert set(pinned.left) == gone == {layer for layer in denoiser.model.layers() if sides_of(layer) == {RAM}}
    # The VAE may move its own layers; the denoiser's came from their copies.
    assert scene.machine.moves_to_ram - moves <= len(decoder.model.layers())


def test_a_part_of_a_text_encoder_that_left_for_a_denoiser_keeps_its_copy_when_it_is_back(scene, pinned):
    text = t5(scene, 10)
    scene.load(text)
    placed = scene.guard.memory.placed(text)
    placed.shrink(3_000)
    gone = {layer for layer in text.model.layers() if sides_of(layer) == {RAM}}
    placed.grow(10_000)
    assert placed.copied_bytes() == sum(map(size_of, gone)) > 0
    placed.shrink(3_000)
    assert set(pinned.left) == gone


def test_what_comes_back_keeps_no_copy_once_they_are_switched_off(scene, pinned):
    denoiser = flux(scene, 20)
    scene.load(denoiser, required=1_500)
    scene.load(vae(scene), required=6_000)
    gone = {layer for layer in denoiser.model.layers() if sides_of(layer) == {RAM}}
    assert gone
    assert gone <= pinned.in_ram
    pinned.works = False
    scene.load(denoiser, required=1_500)
    assert {sides_of(layer) == {CARD} for layer in gone} == {True}
    assert pinned.kept == set()


def test_forge_moves_no_layer_that_has_its_copy(scene, pinned):
    denoiser = flux(scene, 20)
    scene.load(denoiser, required=1_500)
    scene.load(vae(scene), required=6_000)
    scene.load(denoiser, required=1_500)
    kept, moved = set(pinned.kept), scene.machine.moved
    assert kept
    scene.free_all()
    assert set(pinned.left) == kept
    assert scene.machine.moved - moved <= size_of(denoiser.model) - sum(map(size_of, kept)) + 1_000


def test_a_merged_layer_is_not_taken_from_its_copy(scene, pinned):
    denoiser = flux(scene, 20)
    scene.load(denoiser, required=1_500)
    scene.load(vae(scene), required=6_000)
    scene.load(denoiser, required=1_500)
    merged = set(pinned.kept)
    scene.residency._merged_layers = lambda model: merged
    scene.residency.to_ram(denoiser.model)
    assert merged
    assert pinned.left == []
