"""The record of the applied stack: current, another, or unknown; and who has patched a model."""

import types

import pytest
import torch

from lib_lora_guard.hosts.forge.facts import loader_of_model
from lib_lora_guard.hosts.forge.lora_loader_state import (
    RETRY,
    STATE,
    AppliedStack,
    LoaderState,
    state_of,
)

FIRST, SECOND = ("a", 1.0, 1.0, False), ("b", 0.5, 1.0, False)


@pytest.fixture
def loader():
    return types.SimpleNamespace(backup={}, online_backup=[], loaded_hash=str([]))


def test_a_new_loader_has_the_empty_stack(loader):
    applied = AppliedStack(loader)
    assert applied.is_current({})
    assert not applied.is_current([FIRST])
    assert not applied.is_unknown


def test_what_is_recorded_is_current_until_it_is_invalidated(loader):
    applied = AppliedStack(loader)
    applied.record({FIRST: {}, SECOND: {}})
    assert applied.is_current([FIRST, SECOND])
    assert not applied.is_current([SECOND, FIRST]), "the order counts"
    assert loader.loaded_hash == str([FIRST, SECOND]), "as other extensions compare it"
    applied.invalidate()
    assert applied.is_unknown
    assert not any(applied.is_current(stack) for stack in ([FIRST, SECOND], [], [RETRY]))
    applied.record(())
    assert applied.is_current({})


def test_what_the_guard_has_published_is_its_own_and_everything_else_is_not(loader):
    state = LoaderState()
    assert not state.is_patched_by_other(loader)
    loader.backup = {"w": torch.ones(1)}
    assert state.is_patched_by_other(loader), "before the guard came"
    state.publish(loader, [FIRST])
    assert (dict(loader.backup), loader.online_backup, loader.loaded_hash) == ({}, [], str([FIRST]))
    assert not state.is_patched_by_other(loader)
    loader.online_backup = []
    assert state.is_patched_by_other(loader), "equal is not the same: a copy of Forge's refresh makes new ones"
    state.unpublish(loader)
    assert (loader.backup, loader.online_backup, state.published, state.report) == ({}, [], None, None)


def test_models_and_loaders_without_the_guard(loader):
    assert state_of(loader) is None
    assert state_of(None) is None
    assert loader_of_model(None) is None
    assert loader_of_model(torch.nn.Linear(1, 1)) is None
    setattr(loader, STATE, LoaderState())
    assert isinstance(state_of(loader), LoaderState)
