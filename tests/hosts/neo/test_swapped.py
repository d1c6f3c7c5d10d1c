"""Which of Neo's layers get copies in pinned RAM; the copies themselves are those of `tests/runtime/test_ram_copies.py`."""

import types

import pytest
import torch

from lib_lora_guard.hosts.neo.swapped import Swapped


class Copies:
    bytes = 0

    def __init__(self):
        self.moved, self.pinned, self.left, self.forgotten, self.at_once = [], [], [], [], 0

    def moving(self, layers):
        self.moved += layers
        return torch.no_grad()

    def pinning(self):
        self.at_once += 1
        return torch.no_grad()

    def pin(self, layers):
        self.pinned += layers
        return len(layers)

    def to_ram(self, layer):
        self.left.append(layer)

    def forget(self, layers):
        self.forgotten += layers


class JointTextEncoder(torch.nn.Module):
    __module__ = "backend.patcher.clip"


def patcher(model, device="cuda"):
    return types.SimpleNamespace(model=model, load_device=torch.device(device))


def denoiser():
    model = torch.nn.Module()
    model.diffusion_model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    for place in (0, 2):
        model.diffusion_model[place].parameters_manual_cast = False
    return model, [model.diffusion_model[0], model.diffusion_model[2]]


@pytest.fixture
def copies():
    return Copies()


def test_layers_of_a_denoiser_that_neo_can_swap_are_pinned_after_each_move(copies):
    model, layers = denoiser()
    with Swapped(copies).moving(patcher(model)):
        assert copies.pinned == []
    assert copies.moved == copies.pinned == layers
    assert copies.at_once == 1


@pytest.mark.parametrize("of", [lambda: patcher(denoiser()[0], "cpu"), lambda: patcher(torch.nn.Linear(2, 2))])
def test_nothing_is_pinned_on_the_cpu_or_of_a_model_of_few_calls(copies, of):
    with Swapped(copies).moving(of()):
        pass
    assert copies.pinned == []


def test_what_leaves_for_a_text_encoder_is_not_pinned_and_what_leaves_for_a_decode_is(copies):
    model, layers = denoiser()
    swapped = Swapped(copies)
    with swapped.coming([patcher(JointTextEncoder())]), swapped.moving(patcher(model)):
        pass
    assert (copies.moved, copies.pinned, copies.at_once) == (layers, [], 0)
    with swapped.coming([patcher(torch.nn.Linear(2, 2))]), swapped.moving(patcher(model)):
        pass
    assert copies.pinned == layers
    with pytest.raises(MemoryError), swapped.coming([patcher(JointTextEncoder())]):
        raise MemoryError
    with swapped.moving(patcher(model)):
        pass
    assert copies.pinned == [*layers, *layers]


def test_a_model_that_leaves_whole_goes_by_its_copies_and_other_weights_have_none(copies):
    model, layers = denoiser()
    swapped = Swapped(copies)
    swapped.to_ram(patcher(model))
    swapped.forget(model)
    assert (copies.left, copies.forgotten) == (layers, layers)
