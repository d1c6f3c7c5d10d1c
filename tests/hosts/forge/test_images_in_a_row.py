"""What a denoiser that does not fit has of the card in its steps, from one image to the next: a Flux in fp8, T5 and a VAE on a
card of 12 GB that is not there (`support.fake_card`)."""

import contextlib

import pytest
from support.card_scene import assert_sound, scene_of
from support.fake_card import Denoiser, IntegratedAutoencoderKL, JointTextEncoder, bytes_on_card, size_of

from lib_lora_guard.planning import activations

MB = 1 << 20
STEP, DECODE = 1375 * MB, 3300 * MB
"""Held by torch for a step and for a decode of 1024 x 1024."""


class Images:
    """Makes images as Forge does: the prompt, where it is new, the steps, the decode."""

    def __init__(self, scene):
        self.scene = scene
        self.denoiser = scene.patcher(Denoiser, [70 * MB] * 120 + [35 * MB] * 100, fixed=10 * MB)
        self.text = scene.patcher(JointTextEncoder, [48 * MB] * 100)
        self.decoder = scene.patcher(IntegratedAutoencoderKL, [20 * MB] * 8)
        self.stack = self.denoiser

    def image(self, is_new_prompt=False, is_new_stack=False, factors=0):
        """Returns the bytes of the denoiser on the card while it samples."""
        if is_new_prompt:
            self.scene.load(self.text)
        if is_new_stack:
            self.stack = self.denoiser.clone()
        self.scene.load(self.stack, required=STEP, hard=factors)
        in_steps = bytes_on_card(self.denoiser.model)
        assert self.scene.machine.free() >= STEP
        assert_sound(self.denoiser.model, True)
        self.scene.load(self.decoder, required=DECODE / activations.VAE_HOLDS_WHERE_FORGE_HAS)
        return in_steps


@contextlib.contextmanager
def images_on(parts, gigabytes):
    with scene_of(parts, total=gigabytes * 1024 * MB, rest=1024 * MB) as scene:
        yield Images(scene)


@pytest.mark.parametrize("gigabytes", [8, 12])
def test_a_change_of_loras_costs_the_steps_nothing(parts, gigabytes):
    """What left for the decode comes back for another stack too."""
    with images_on(parts, gigabytes) as images:
        first = images.image(is_new_prompt=True)
        assert first < size_of(images.denoiser.model)
        images.image()
        for _ in range(4):
            assert images.image(is_new_stack=True) >= first - 35 * MB
        assert images.image() >= first - 35 * MB


@pytest.mark.parametrize("gigabytes", [8, 12])
@pytest.mark.parametrize("is_new_stack", [False, True])
def test_a_new_prompt_costs_the_steps_nothing(parts, gigabytes, is_new_stack):
    """The text encoder gives back what it had of the card while it ran."""
    with images_on(parts, gigabytes) as images:
        first = images.image(is_new_prompt=True)
        for _ in range(3):
            images.image()
            assert images.image(is_new_prompt=True, is_new_stack=is_new_stack) >= first - 35 * MB


def test_no_more_is_left_for_swapping_than_it_takes(parts):
    """Two copies of the largest layer, here of 70 MB: Forge leaves 1280 MB."""
    with images_on(parts, 12) as images:
        images.image(is_new_prompt=True)
        images.scene.load(images.stack, required=STEP)
        left = images.scene.machine.free() - STEP
        assert 256 * MB <= left < (256 + 35) * MB
