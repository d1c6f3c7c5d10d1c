"""The stacks on Forge's models: what is on a model, who applies it, what is applied again, what happens while it moves."""

import gc
import logging
import types

import pytest
import torch

from lib_lora_guard.hosts.forge.lora_loader_state import RETRY, STATE, state_of
from lib_lora_guard.hosts.forge.patches import PatchReader
from lib_lora_guard.hosts.forge.stacks import ForgeStacks, wants_hosts_layers
from lib_lora_guard.patching.watching import unwatched
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.runtime.live_settings import LiveSettings
from lib_lora_guard.settings import LoraMode

STYLE = ("style", 0.8, 1.0, False)
PER_PASS = ("style", 0.8, 1.0, True)


class Model(torch.nn.Module):
    def __init__(self, storage=torch.float16):
        super().__init__()
        self.storage_dtype = storage
        self.layer = torch.nn.Linear(4, 4)
        self.lora_loader = Loader(self)


class Loader:
    def __init__(self, model):
        self.model, self.backup, self.online_backup, self.loaded_hash = model, {}, [], str([])


class Patcher:
    def __init__(self, model, *stack):
        self.model, self.lora_loader, self.lora_patches = model, model.lora_loader, {one: {} for one in stack}
        self.refreshes = 0

    def refresh_loras(self):
        self.refreshes += 1


@pytest.fixture
def settings():
    return LiveSettings()


@pytest.fixture
def stacks(settings):
    reader = PatchReader(types.SimpleNamespace(extra_weight_calculators={}))
    return ForgeStacks(reader, settings, lambda model: (), unwatched)


def applied(stacks, patcher, *loras, mode=LoraMode.AUTOMATIC):
    """The state after a refresh."""
    state = stacks.state(patcher.lora_loader)
    state.mode, state.report = mode, ApplyReport("Model", list(loras), 0, 0, 1.0)
    state.publish(patcher.lora_loader, patcher.lora_patches)
    return state


def test_a_loader_has_one_state_as_long_as_it_lives(stacks):
    model = Model()
    state = stacks.state(model.lora_loader)
    assert stacks.state(model.lora_loader) is state
    assert stacks.loaders() == [model.lora_loader]
    assert stacks.engines() == [state.engine]
    del model, state
    gc.collect()
    assert (stacks.loaders(), stacks.engines()) == ([], [])


def test_taken_out_it_leaves_nothing_on_the_loaders(stacks):
    model = Model()
    applied(stacks, Patcher(model, STYLE))
    stacks.publish_reports()
    assert len(stacks.reports()) == 1
    assert stacks.take_out() == [model.lora_loader]
    assert not hasattr(model.lora_loader, STATE)
    assert (stacks.loaders(), stacks.reports(), stacks.engines()) == ([], (), [])


def test_current_and_reported_is_the_stack_that_was_applied(stacks):
    model = Model()
    wanted, other = Patcher(model, STYLE), Patcher(model)
    assert not stacks.is_reported(wanted)
    assert stacks.is_current(other), "nothing is applied, and nothing is asked for"
    state = applied(stacks, wanted)
    assert [stacks.is_current(one) for one in (wanted, other)] == [True, False]
    assert [stacks.is_reported(one) for one in (wanted, other)] == [True, False]
    assert stacks.report(model.lora_loader) is state.report
    model.lora_loader.loaded_hash = RETRY
    assert not stacks.is_current(wanted)
    assert stacks.is_reported(wanted), "the picture that was made had it"


def test_loras_are_named_by_mode_and_file_and_without_the_guard_by_the_stack(stacks):
    model = Model()
    assert stacks.names_on(torch.nn.Linear(1, 1)) is None
    assert stacks.names_on(model) == str([])
    names = []
    for strength, mode in ((0.8, LoraMode.AUTOMATIC), (0.2, LoraMode.AUTOMATIC), (0.2, LoraMode.MERGE)):
        applied(stacks, Patcher(model, STYLE), LoraReport("style", strength), mode=mode)
        names.append(stacks.names_on(model))
    assert names[0] == names[1] != names[2]


def test_models_of_other_extensions_have_no_merges_and_no_factors(stacks):
    model = torch.nn.Linear(1, 1)
    assert (stacks.merged_layers(model), stacks.unpatched_shapes(model), stacks.resident_bytes(None)) == (set(), {}, 0)
    stacks.drop_device_copies(None)
    stacks.before_move(None)


@pytest.mark.parametrize(
    ("mode", "storage", "stack", "is_the_hosts"),
    [
        (LoraMode.AUTOMATIC, torch.float16, [STYLE], False),
        (LoraMode.OWN, torch.float16, [STYLE], True),
        (LoraMode.AUTOMATIC, torch.float16, [PER_PASS], True),
        (LoraMode.AUTOMATIC, torch.float8_e4m3fn, [PER_PASS], False),
        (LoraMode.AUTOMATIC, "nf4", [PER_PASS], False),
        (LoraMode.AUTOMATIC, torch.float16, ["key of another extension"], False),
    ],
)
def test_forge_applies_in_its_own_mode_and_what_is_asked_of_its_layers(
    stacks, settings, mode, storage, stack, is_the_hosts
):
    settings.options = {"lora_guard_mode": mode.value}
    patcher = Patcher(Model(storage), *stack)
    assert stacks.is_left_to_host(patcher) is is_the_hosts
    assert wants_hosts_layers(patcher.model, patcher.lora_patches) is (is_the_hosts and mode is not LoraMode.OWN)


def test_what_was_left_to_forge_once_is_forges_until_the_next_change(stacks):
    patcher = Patcher(Model(), STYLE)
    assert not stacks.was_left_to_host(patcher.lora_loader)
    stacks.state(patcher.lora_loader).left_to_host = True
    assert stacks.is_left_to_host(patcher)


def test_a_model_that_was_handed_to_another_stack_is_refreshed(stacks):
    model = Model()
    first = Patcher(model, STYLE)
    applied(stacks, first)
    stacks.invalidate(Patcher(model, STYLE))
    assert stacks.is_current(first)
    stacks.invalidate(Patcher(model))
    assert model.lora_loader.loaded_hash == RETRY


def test_a_file_that_has_changed_makes_every_model_be_refreshed(stacks):
    models = [Model(), Model()]
    for model in models:
        applied(stacks, Patcher(model, STYLE))
    stacks.invalidate_all()
    assert [model.lora_loader.loaded_hash for model in models] == [RETRY, RETRY]


@pytest.mark.parametrize("why", ["failed", "another mode", "applied by Forge before the guard came", "nothing"])
def test_a_loaded_patcher_is_refreshed_where_something_has_failed_or_changed(stacks, settings, why):
    patcher = Patcher(Model(), STYLE)
    if why != "applied by Forge before the guard came":
        applied(stacks, patcher)
    if why == "failed":
        patcher.lora_loader.loaded_hash = RETRY
    if why == "another mode":
        settings.options = {"lora_guard_mode": LoraMode.MERGE.value}
    stacks.remind(patcher)
    assert patcher.refreshes == (why != "nothing")


def test_a_loaded_patcher_names_again_what_is_left_out(stacks, caplog):
    caplog.set_level(logging.WARNING, logger="lib_lora_guard")
    patcher = Patcher(Model(), STYLE)
    applied(stacks, patcher, LoraReport("style", 0.8, refused="broken"))
    stacks.remind(patcher)
    assert patcher.refreshes == 0
    assert "style" in caplog.text
    assert "broken" in caplog.text


@pytest.mark.parametrize("failed", [False, True])
def test_a_model_whose_merges_are_suspended_for_a_move_is_refreshed_after_it(stacks, monkeypatch, caplog, failed):
    patcher = Patcher(Model(), STYLE)
    state = applied(stacks, patcher)
    stacks.before_move(patcher.lora_loader)
    assert stacks.is_current(patcher), "it had no merges"
    suspend = (lambda: 1 / 0) if failed else (lambda: True)
    monkeypatch.setattr(state.engine, SUSPEND, suspend)
    state.left_to_host = True
    stacks.before_move(patcher.lora_loader)
    assert stacks.is_current(patcher), "what Forge has merged, Forge restores"
    state.left_to_host = False
    stacks.before_move(patcher.lora_loader)
    assert patcher.lora_loader.loaded_hash == RETRY
    assert ("ZeroDivisionError" in caplog.text) is failed


SUSPEND = "suspend_merges"


def test_parameters_in_ram_are_the_backups_of_what_is_merged_after_a_load(stacks, settings):
    model = Model()
    patcher = Patcher(model, STYLE)
    patcher.lora_patches[STYLE] = {"layer.weight": [], "not.there": []}
    with stacks.loading(patcher):
        copies = dict(state_of(model.lora_loader).engine._backups.host_copies)
        assert list(copies) == ["layer.weight"]
        assert copies["layer.weight"].data_ptr() == model.layer.weight.data_ptr()
    assert not state_of(model.lora_loader).engine._backups.host_copies


@pytest.mark.parametrize("why", ["no stack", "own mode", "no loader"])
def test_a_load_that_the_guard_merges_nothing_after_makes_no_state(stacks, settings, why):
    patcher = Patcher(Model(), *([] if why == "no stack" else [STYLE]))
    loader = patcher.lora_loader
    if why == "own mode":
        settings.options = {"lora_guard_mode": LoraMode.OWN.value}
    if why == "no loader":
        del patcher.lora_loader
    with stacks.loading(patcher):
        assert state_of(loader) is None
