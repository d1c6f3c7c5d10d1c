"""What a denoiser that does not fit has of the card in its steps, from one image to the next: a Flux in fp8, T5 and a VAE on a
card of 12 GB that is not there (`support.fake_card`)."""

import contextlib

import pytest
from support.card_scene import assert_sound, scene_of
from support.fake_card import Denoiser, IntegratedAutoencoderKL, JointTextEncoder, bytes_on_card, size_of

from lib_lora_guard.planning import activations
from lib_lora_guard.runtime.jobs import Pass

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


def test_a_text_encoder_runs_from_ram_beside_a_denoiser_that_lacks_the_room(parts):
    """Leaving the card is slow, so what would have to leave again before the steps does not come."""
    with images_on(parts, 12) as images:
        images.image(is_new_prompt=True)
        before = bytes_on_card(images.text.model)
        moved = images.scene.machine.moved
        images.scene.load(images.text)
        assert bytes_on_card(images.text.model) == before == 0
        assert images.scene.machine.moved == moved
        assert_sound(images.text.model, True)


def test_a_text_encoder_comes_to_a_card_with_room_for_all(parts):
    with images_on(parts, 24) as images:
        images.image(is_new_prompt=True)
        assert bytes_on_card(images.text.model) == size_of(images.text.model)
        moved = images.scene.machine.moved
        images.image(is_new_prompt=True, is_new_stack=True)
        assert images.scene.machine.moved == moved, "nothing moves where all fits"


@pytest.mark.parametrize(("steps", "comes"), [(1, False), (50, True)])
def test_with_few_steps_what_left_for_the_decode_may_stay_away(parts, steps, comes):
    with images_on(parts, 12) as images:
        first = images.image(is_new_prompt=True)
        with images.scene.guard.jobs.job(lambda: Pass(steps)):
            assert (images.image(is_new_stack=True) >= first - 35 * MB) is comes


def test_switched_off_the_denoiser_takes_all_room_before_its_steps(parts):
    with images_on(parts, 12) as images:
        images.scene.guard.settings.options = {"lora_guard_plan_residency": False}
        first = images.image(is_new_prompt=True)
        with images.scene.guard.jobs.job(lambda: Pass(1)):
            assert images.image(is_new_stack=True) >= first - 35 * MB
            # The text encoder gets what room there is, and gives it back.
            images.scene.load(images.text)
            assert bytes_on_card(images.text.model) > 0
            assert images.image() >= first - 35 * MB


def test_one_line_says_the_choice_with_its_numbers(parts, lines):
    with images_on(parts, 12) as images:
        for _ in range(3):
            images.image(is_new_stack=True)
        said = [line for line in lines() if line.startswith("Denoiser, calls: 20; ")]
        assert 1 <= len(said) <= 2
        assert "(6.5 GB/s to the card, 1.5 to RAM)" in said[0]


def test_an_image_like_the_last_one_adds_no_line(parts, lines):
    with images_on(parts, 12) as images:
        for _ in range(2):
            images.image(is_new_prompt=True, factors=150 * MB)
        before = lines()
        assert any(line.startswith("Denoiser, calls: 20; ") for line in before)
        assert any("of Denoiser leave the card" in line for line in before)
        moved = images.scene.machine.moved
        images.image(is_new_prompt=True, factors=150 * MB)
        assert images.scene.machine.moved > moved
        assert lines() == before


def test_a_model_that_fits_is_not_chosen_for_and_no_link_is_measured(parts, monkeypatch):
    with images_on(parts, 24) as images:
        monkeypatch.setattr(images.scene.guard.links, "of", lambda device: pytest.fail("a link was asked for"))
        for _ in range(2):
            images.image(is_new_stack=True)


def test_a_stack_of_3_gb_takes_its_room_and_gives_it_back(parts):
    """On 8 GB, as three LoRAs of 1 GB; then another stack that takes next to nothing."""
    with images_on(parts, 8) as images:
        first = images.image(is_new_prompt=True)
        images.scene.load(images.stack.clone(), required=STEP, hard=3072 * MB)
        assert images.scene.machine.free() >= STEP + 3072 * MB
        assert 0 < bytes_on_card(images.denoiser.model) <= first - 3072 * MB + 512 * MB
        assert images.image(is_new_stack=True, factors=MB) >= first - 35 * MB


class ControlNet(Denoiser):
    """Runs in the denoiser's calls."""


@pytest.mark.parametrize("is_new_prompt", [False, True])
def test_a_controlnet_gets_its_room_before_the_denoiser_grows_into_it(parts, is_new_prompt):
    """1200 MB, which the decode before has left free. Both together have what the denoiser had alone."""
    with images_on(parts, 12) as images:
        first = images.image(is_new_prompt=True)
        control = images.scene.patcher(ControlNet, [30 * MB] * 40)
        for _ in range(2):
            if is_new_prompt:
                images.scene.load(images.text)
            images.scene.load(images.stack, control, required=STEP)
            on_card = bytes_on_card(images.denoiser.model)
            assert bytes_on_card(control.model) == 1200 * MB
            assert first - 105 * MB <= on_card + 1200 * MB <= first + 35 * MB
            assert images.scene.machine.free() >= STEP + 256 * MB
            assert_sound(images.denoiser.model, True)
            images.scene.load(images.decoder, required=DECODE / activations.VAE_HOLDS_WHERE_FORGE_HAS)
