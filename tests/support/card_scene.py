"""The takeover as it is in Forge, on a card that is not there (`support.fake_card`): a card of 24 "GB" of a thousand bytes."""

import contextlib
import gc
from dataclasses import replace

from lib_lora_guard.hosts.forge.api import probe
from lib_lora_guard.hosts.forge.takeover import ForgeTakeover
from support.fake_card import (
    CARD,
    RAM,
    Denoiser,
    FakeMemory,
    IntegratedAutoencoderKL,
    JointTextEncoder,
    Machine,
    is_swapped,
    sides_of,
)

TOTAL, REST = 24_000, 1_000
"""Bytes of the card, and what the slider leaves of it."""


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
        return self.residency.away_bytes(patcher.model)

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


@contextlib.contextmanager
def parts_of(double):
    """The double's LoRA loader and patchers; a scene replaces its memory management."""
    gc.collect()
    # Looking for what is left of a model shall not take a look at all of torch each time.
    gc.freeze()
    yield probe()
    double.close()


def flux(scene, gigabytes=12, layers=24):
    return scene.patcher(Denoiser, [gigabytes * 1000 // layers] * layers)


def t5(scene, gigabytes=10, layers=20):
    return scene.patcher(JointTextEncoder, [gigabytes * 1000 // layers] * layers)


def vae(scene):
    return scene.patcher(IntegratedAutoencoderKL, [20] * 8)


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
