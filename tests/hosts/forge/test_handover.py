"""The loaded model goes to a new patcher where it lies, and is remembered where Forge gives it up."""

import gc

import pytest
from support.card_scene import assert_as_built, assert_sound, flux, scene_of
from support.fake_card import CARD, RAM, bytes_on_card, is_swapped, size_of

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


class Breaks:
    """A function of the new patcher that raises."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, *args):
        self.calls += 1
        raise self.error


STEPS = ("model_patches_to", "model_dtype", "forge_patch_model")
"""What a patcher is asked while it gets the model."""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), KeyError(3), MemoryError()])
def test_a_hand_over_that_raises_leaves_the_model_to_the_old_patcher(scene, step, error):
    old = flux(scene, 5)
    scene.load(old)
    new, (loaded,) = old.clone(), scene.memory.current_loaded_models
    setattr(new, step, Breaks(error))
    assert scene.guard.placement.hand_over(new, 0) is False
    assert getattr(new, step).calls == 1
    assert loaded.model is old
    assert scene.memory.current_loaded_models == [loaded]
    assert bytes_on_card(old.model) == size_of(old.model)


@pytest.mark.parametrize("step", STEPS)
def test_after_a_hand_over_that_raises_forge_loads_the_model_itself(scene, step):
    """Forge's own way asks the same of the patcher, and may succeed."""
    old = flux(scene, 5)
    scene.load(old)
    new, breaks = old.clone(), Breaks(RuntimeError("the first time"))
    usual = getattr(new, step)
    setattr(new, step, lambda *args: breaks() if not breaks.calls else usual(*args))
    scene.load(new)
    assert breaks.calls == 1
    assert [one.model for one in scene.memory.current_loaded_models] == [new]
    assert_sound(new.model, True)
    assert bytes_on_card(new.model) == size_of(new.model)


@pytest.mark.parametrize("step", STEPS)
def test_a_model_that_forge_gave_up_is_forgotten_if_its_hand_over_raises(parts, step):
    """Too large for the card it has swapped layers; Forge gets them back as it would have found them without the guard."""
    with scene_of(parts) as scene:
        old = flux(scene, gigabytes=40)
        scene.load(old)
        new = old.clone()
        model = new.model
        assert any(is_swapped(layer) for layer in model.layers())
        del old
        gc.collect()
        scene.guard.memory.drop_abandoned()
        assert model in scene.guard.placement._given_up
        setattr(new, step, Breaks(RuntimeError("CUDA error")))
        assert scene.guard.placement.hand_over(new, 0) is False
        assert model not in scene.guard.placement._given_up
        assert scene.memory.current_loaded_models == []
        assert_as_built(model)
        delattr(new, step)
        scene.load(new)
        assert_sound(model, True)


def test_a_loaded_model_is_handed_over_where_it_lies(scene):
    old = flux(scene, 5)
    scene.load(old)
    moved, new, (loaded,) = scene.machine.moved, old.clone(), scene.memory.current_loaded_models
    assert scene.guard.placement.hand_over(new, 0) is True
    assert loaded.model is new
    assert loaded.real_model is new.model
    assert new.current_device == CARD
    assert scene.machine.moved == moved


def test_a_model_that_was_moved_behind_forges_back_is_placed_again(scene):
    old = flux(scene, 5)
    scene.load(old)
    old.model.to(RAM)
    assert scene.guard.placement.hand_over(old.clone(), 0) is False
    old.model.to(CARD)


@pytest.mark.parametrize(("needed", "handed_over"), [(4_000, False), (100_000, True)])
def test_a_model_that_is_partly_in_ram_is_placed_again_only_if_all_of_it_fits_now(parts, needed, handed_over):
    with scene_of(parts) as scene:
        old = flux(scene, gigabytes=40)
        scene.load(old)
        scene.machine.total += 40_000
        assert scene.guard.placement.hand_over(old.clone(), needed) is handed_over


def test_a_model_that_was_moved_away_behind_forge_is_placed_anew_though_it_cannot_be_whole(scene):
    """Its layers are not swapped: handed over as it lies, it could not run."""
    old = flux(scene, 12)
    scene.load(old)
    old.model.to(RAM)
    scene.machine.ballast = 15_000
    new = old.clone()
    scene.load(new)
    assert 0 < bytes_on_card(new.model) < size_of(new.model)
    assert_sound(new.model, True)
