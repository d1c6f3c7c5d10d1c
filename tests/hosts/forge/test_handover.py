"""The loaded model goes to a new patcher where it lies, and is remembered where Forge gives it up."""

import gc

import pytest
from support.card_scene import assert_as_built, flux, scene_of
from support.fake_card import is_swapped

pytestmark = pytest.mark.usefixtures("swapping_in_bytes")


def test_a_model_that_forge_gave_up_is_as_built_when_the_guard_goes(parts):
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
