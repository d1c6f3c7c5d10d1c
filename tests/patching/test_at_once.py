"""The short way of a low-rank bypass gives the bits of the long one, and leaves to it what is out of the usual.

The card's copies are kept on the CPU here, as they would be on a card.
"""

import pytest
import torch
from support.make import rand

from lib_lora_guard.adapters import LoraAdapter, Slice, Term
from lib_lora_guard.patching import device_cache, forward_steps, low_rank
from lib_lora_guard.patching.bypass import Bypass

WIDTH, HEIGHT = 48, 32


@pytest.fixture(autouse=True)
def copies_on_the_cpu(monkeypatch):
    def known(cache, device, dtype):
        return cache._values.get((device, dtype, 0))

    def get(cache, device, dtype, make):
        value = known(cache, device, dtype)
        if value is None:
            value = cache._values[device, dtype, 0] = device_cache._outside_inference(make)
        return value

    monkeypatch.setattr(device_cache.DeviceCache, "known", known)
    monkeypatch.setattr(device_cache.DeviceCache, "get", get)
    for module in (low_rank, forward_steps):
        monkeypatch.setattr(module, "joins_on", lambda device: True)


@pytest.fixture
def long_ways(monkeypatch):
    """The layers that went the long way."""
    gone, original = [], forward_steps.add_to_linear

    def add_to_linear(call, *rest):
        gone.append(call.key)
        return original(call, *rest)

    monkeypatch.setattr(forward_steps, "add_to_linear", add_to_linear)
    return gone


def lora(rank, strength=0.7, part=None, seed=1):
    rows = HEIGHT if part is None or part.dim == 1 else part.length
    columns = WIDTH if part is None or part.dim == 0 else part.length
    up, down = rand(rows, rank, seed=seed), rand(rank, columns, seed=seed + 1)
    return Term(LoraAdapter(up=up, down=down, alpha=rank / 2), strength, part=part)


def layer_with(terms, dtype=torch.bfloat16):
    layer = torch.nn.Linear(WIDTH, HEIGHT).to(dtype).requires_grad_(False)
    bypass = Bypass("w", tuple(terms), (HEIGHT, WIDTH))
    bypass.owns_output = True
    bypass.attach(layer)
    return layer


def both_ways(layer, x, monkeypatch):
    """The layer's outputs by the short way and by the long one."""
    short = layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(forward_steps.LowRankStep, "_add_at_once", lambda step, call: False)
        return short, layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", [[lora(4)], [lora(4), lora(8, seed=5)], [lora(4), lora(8, -0.3, seed=5)]])
@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH), (2, 5, WIDTH), (0, WIDTH)])
def test_the_short_way_gives_the_bits_of_the_long_one(terms, dtype, shape, long_ways, monkeypatch):
    layer, x = layer_with(terms, dtype), rand(*shape, seed=9).to(dtype)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    layer(x)
    long_ways.clear()
    short, long = both_ways(layer, x, monkeypatch)
    assert long_ways == ["w"], "the second call"
    assert torch.equal(short, long)
    assert torch.equal(short, plain) == (x.numel() == 0)


def test_a_change_of_strength_is_seen_by_the_next_call(long_ways, monkeypatch):
    layer, x = layer_with([lora(4)]), rand(3, WIDTH, seed=9).to(torch.bfloat16)
    layer(x)
    long_ways.clear()
    joined = next(iter(layer._forward_hooks.values())).low_rank
    joined.exchange(low_rank.Scaling(joined.scales_at([-0.2]), low_rank.ScaleVectors()))
    short, long = both_ways(layer, x, monkeypatch)
    assert torch.equal(short, long)
    other = layer_with([lora(4, -0.2)])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), short)


@pytest.mark.parametrize("strengths", [[-0.2, -0.2], [-0.2, 0.4]])
def test_a_change_of_strength_while_another_thread_makes_the_scales_counts_from_the_next_call_on(
    strengths, monkeypatch
):
    layer, x = layer_with([lora(4), lora(8, seed=5)]), rand(3, WIDTH, seed=9).to(torch.bfloat16)
    joined = next(iter(layer._forward_hooks.values())).low_rank
    make_scales = low_rank.JoinedLowRank._make_scales

    def exchanged_meanwhile(self, *arguments):
        for place, scale in enumerate(make_scales(self, *arguments)):
            if place == 0:
                joined.exchange(low_rank.Scaling(joined.scales_at(strengths), low_rank.ScaleVectors()))
            yield scale

    with monkeypatch.context() as patch:
        patch.setattr(low_rank.JoinedLowRank, "_make_scales", exchanged_meanwhile)
        early = layer(x)
    before, after = (layer_with([lora(4, a), lora(8, b, seed=5)]) for a, b in ([0.7, 0.7], strengths))
    for other in (before, after):
        other.load_state_dict(layer.state_dict())
    assert torch.equal(early, before(x))
    assert not torch.equal(before(x), after(x))
    assert torch.equal(layer(x), after(x)), "the long way"
    assert torch.equal(layer(x), after(x)), "the short way"


@pytest.mark.parametrize(
    ("terms", "x"),
    [
        ([lora(4, part=Slice(0, 8, 16))], rand(3, WIDTH, seed=9)),
        ([lora(4, part=Slice(1, 8, 16))], rand(3, WIDTH, seed=9)),
        ([lora(4, part=Slice(0, 0, 16)), lora(4, part=Slice(0, 16, 16))], rand(3, WIDTH, seed=9)),
        ([lora(4)], rand(4, 6, WIDTH, seed=9)[:, 1:3].transpose(0, 1)),
    ],
)
def test_parts_and_inputs_that_are_no_view_go_the_long_way(terms, x, long_ways, monkeypatch):
    layer, x = layer_with(terms), x.to(torch.bfloat16)
    layer(x)
    long_ways.clear()
    short, long = both_ways(layer, x, monkeypatch)
    assert torch.equal(short, long)
    assert len(long_ways) >= 2


@pytest.mark.parametrize("failing", ["linear", "addmm_"])
def test_without_memory_the_long_way_begins_anew(failing, long_ways, monkeypatch):
    layer, x = layer_with([lora(4)]), rand(600, WIDTH, seed=9).to(torch.bfloat16)
    right = layer(x).clone()
    long_ways.clear()
    place = torch.nn.functional if failing == "linear" else torch.Tensor
    original, calls = getattr(place, failing), []

    def fails_once(*arguments, **named):
        calls.append(1)
        # The layer's own product comes first.
        if len(calls) == (2 if failing == "linear" else 1):
            raise torch.cuda.OutOfMemoryError
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(place, failing, fails_once)
        found = layer(x)
    assert long_ways == ["w"]
    assert torch.equal(found, right)
