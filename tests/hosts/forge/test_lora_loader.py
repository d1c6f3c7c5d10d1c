"""Forge's refresh of a loader: when there is nothing to do, when it is Forge's own, and what a newer Forge passes."""

import types

import pytest
import torch

from lib_lora_guard.hosts.forge.lora_loader import LoaderControl
from lib_lora_guard.hosts.forge.lora_loader_state import RETRY, state_of
from lib_lora_guard.hosts.forge.patches import PatchReader
from lib_lora_guard.hosts.forge.stacks import ForgeStacks
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching.watching import unwatched
from lib_lora_guard.runtime.live_settings import LiveSettings
from lib_lora_guard.settings import LoraMode

STACK = {("style", 0.8, 1.0, False): {}}
CPU = torch.device("cpu")


class Scene:
    """A loader in the mode "Forge's own", where Forge is asked at once."""

    def __init__(self):
        self.settings = LiveSettings({"lora_guard_mode": LoraMode.OWN.value})
        reader = PatchReader(types.SimpleNamespace(extra_weight_calculators={}))
        api = types.SimpleNamespace(linear_classes=(), weight_classes=(), operations=types.SimpleNamespace())
        stacks = ForgeStacks(reader, self.settings, lambda model: (), unwatched)
        self.control = LoaderControl(api, stacks, self.settings)
        self.loader = Loader()
        self.calls = []

    def original(self, *args, **kwargs):
        assert self.loader.loaded_hash == RETRY
        self.calls.append((args[1:], kwargs))
        self.loader.loaded_hash = str(list(args[1]))

    def refresh(self, *args, **kwargs):
        self.control.refresh(self.original, self.loader, *args, **kwargs)


class Loader:
    def __init__(self):
        self.model, self.backup, self.online_backup, self.loaded_hash = torch.nn.Linear(2, 2), {}, [], str([])


@pytest.fixture
def scene():
    return Scene()


def test_an_empty_stack_on_a_model_that_the_guard_has_never_seen_is_nothing_to_do(scene):
    scene.refresh({})
    assert (scene.calls, state_of(scene.loader)) == ([], None)


def test_a_stack_that_forge_applied_before_the_guard_came_is_applied_again(scene):
    scene.loader.loaded_hash = str(list(STACK))
    scene.refresh(STACK)
    assert len(scene.calls) == 1


def test_the_same_stack_in_the_same_mode_is_applied_once_unless_it_is_forced(scene):
    for force in (False, False, True):
        scene.refresh(STACK, CPU, force)
    assert len(scene.calls) == 2


def test_forges_own_refresh_gets_what_every_version_of_it_takes(scene):
    scene.refresh(STACK)
    assert scene.calls == [((STACK, CPU), {})]


def test_what_a_newer_forge_passes_goes_on_to_its_own_refresh(scene):
    scene.refresh(STACK, CPU, False, "one more", another=1)
    assert scene.calls == [((STACK, CPU, True, "one more"), {"another": 1})]


def test_in_forges_own_mode_nothing_of_the_guard_is_on_the_model(scene):
    scene.refresh(STACK)
    state = state_of(scene.loader)
    assert (state.left_to_host, state.report, state.published, dict(state.engine.attached)) == (True, None, None, {})
    assert scene.loader.loaded_hash == str(list(STACK))


def test_when_the_guard_goes_forge_applies_what_is_asked_of_loaded_models(scene):
    scene.refresh(STACK)
    scene.calls.clear()
    patcher = types.SimpleNamespace(lora_patches=STACK, offload_device=CPU)
    scene.control.release_all(scene.original, {id(scene.loader): patcher})
    assert state_of(scene.loader) is None
    assert scene.calls == [((STACK, CPU), {})]


class Engine:
    """Stands for a model's engine; `error` is raised when factors are brought to the card."""

    def __init__(self, error=None):
        self.error, self.brought = error, 0

    def bring_factors(self, access):
        self.brought += 1
        if self.error is not None:
            raise self.error


def applied(scene, error=None):
    """A loader whose stack is the wished one."""
    scene.refresh(STACK)
    state = state_of(scene.loader)
    state.engine = Engine(error)
    return state.engine


def test_factors_that_left_with_the_model_are_there_before_the_first_step(scene):
    engine = applied(scene)
    scene.refresh(STACK)
    assert engine.brought == 1


def test_a_card_without_room_for_factors_leaves_them_to_the_first_step(scene):
    engine = applied(scene, OutOfMemory[0]("CUDA out of memory."))
    scene.refresh(STACK)
    assert engine.brought == 1


def test_another_error_of_the_card_is_raised(scene):
    applied(scene, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        scene.refresh(STACK)
