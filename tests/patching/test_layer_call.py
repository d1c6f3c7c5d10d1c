"""A layer that runs out of memory inside its bypass: slices of tokens first, then an error with advice."""

import pytest
import torch
from patching.patched_layers import call_hook, entry
from support.make import rand

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.errors import LayerError
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching.bypass import Bypass

OUT_OF_MEMORY = OutOfMemory[0]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_out_of_memory_the_tokens_are_taken_in_smaller_slices(monkeypatch):
    layer, x = torch.nn.Linear(16, 24), rand(2048, 16, seed=3)
    terms = [parse_term(entry("lora", (24, 16)), {})]
    wanted = call_hook(layer, terms, x, (24, 16))
    linear, sizes = torch.nn.functional.linear, []

    def short_of_memory(x, weight, bias=None):
        if weight.shape[0] == 4:
            sizes.append(x.shape[0])
            if x.shape[0] > 600:
                raise OUT_OF_MEMORY("planted")
        return linear(x, weight, bias)

    output = layer(x)
    monkeypatch.setattr(torch.nn.functional, "linear", short_of_memory)
    assert torch.equal(Bypass("k", tuple(terms), (24, 16))(layer, (x,), {}, output), wanted)
    assert sizes == [2048, 1024, 512, 512, 512, 512]


def test_the_error_when_no_slice_fits_names_the_layer_and_advice(monkeypatch):
    def no_memory(*args):
        raise OUT_OF_MEMORY("planted")

    layer, x = torch.nn.Linear(16, 24), rand(2048, 16, seed=3)
    output = layer(x)
    monkeypatch.setattr(torch.nn.functional, "linear", no_memory)
    with pytest.raises(
        LayerError, match=r"block\.qkv\.weight: no memory left .* slices of 256 tokens.*lower 'GPU Weights'"
    ):
        Bypass("block.qkv.weight", (parse_term(entry("lora", (24, 16)), {}),), (24, 16))(layer, (x,), {}, output)


def test_an_error_other_than_out_of_memory_in_a_layer_passes_unchanged(monkeypatch):
    def broken(*args):
        raise RuntimeError("planted")

    layer, x = torch.nn.Linear(16, 24), rand(2048, 16, seed=3)
    output = layer(x)
    monkeypatch.setattr(torch.nn.functional, "linear", broken)
    with pytest.raises(RuntimeError, match="planted") as error:
        Bypass("k", (parse_term(entry("lora", (24, 16)), {}),), (24, 16))(layer, (x,), {}, output)
    assert not isinstance(error.value, LayerError)
