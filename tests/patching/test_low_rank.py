"""Low-rank terms joined along the rank: the same product, no overflow in fp16, strengths that are not rounded."""

import dataclasses
import weakref

import pytest
import torch
from patching.patched_layers import call_hook, entry, joined_of
from support.make import rand
from support.measure import contribution_error

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.patching import layer_call, low_rank
from lib_lora_guard.patching.device_cache import DeviceCache
from lib_lora_guard.patching.low_rank import JoinedLowRank


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_strengths_are_not_rounded_to_the_dtype_of_the_activations():
    # 0.85 would be 0.8516 in bf16: 0.2 % of the LoRA, more than all other rounding of a mean over many tokens.
    down, up = torch.eye(4).to(torch.bfloat16), torch.eye(4).to(torch.bfloat16)
    terms = [parse_term([s, ("lora", (up, down, None, None, None)), 1.0, None, None], {}) for s in (0.85, 0.0001)]
    joined = joined_of(terms, (4, 4))
    scales = list(joined._make_scales(joined.scaling, torch.device("cpu"), join=True))
    assert scales[0].per_rank.dtype == torch.float32
    assert torch.equal(scales[0].per_rank, torch.tensor([0.85] * 4 + [0.0001] * 4))
    blocks = list(joined._make_blocks(torch.device("cpu"), torch.bfloat16, join=True))
    assert blocks[0].down.shape == (8, 4), "the down factors are joined"


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_joined_loras_give_the_same_as_single_ones(monkeypatch, kind):
    if kind == "linear":
        entries = [entry("lora", (8, 16), n, 0.5 + n / 10, (0, 8 * n, 8), rank=2 + n) for n in range(3)]
        entries += [entry("lora", (24, 16), 9), entry("lora", (24, 8), 4, 0.2, (1, 4, 8))]
        layer, x, shape = torch.nn.Linear(16, 24), rand(2, 7, 16, seed=3), (24, 16)
    else:
        entries = [entry("lora", (12, 8, 3, 3), 1, 0.7), entry("lora_mid", (12, 8, 3, 3), 2, -0.3, rank=2)]
        entries += [entry("lora", (4, 8, 3, 3), 3, 0.5, (0, 4, 4))]
        layer, x, shape = torch.nn.Conv2d(8, 12, 3, padding=1), rand(2, 8, 5, 5, seed=3), (12, 8, 3, 3)
    terms = [parse_term(e, {}) for e in entries]
    single = call_hook(layer, terms, x, shape)
    make_blocks, make_scales = JoinedLowRank._make_blocks, JoinedLowRank._make_scales
    monkeypatch.setattr(JoinedLowRank, "_make_blocks", lambda self, d, t, join: make_blocks(self, d, t, True))
    monkeypatch.setattr(JoinedLowRank, "_make_scales", lambda self, s, d, join: make_scales(self, s, d, True))
    joined = call_hook(layer, terms, x, shape)
    assert contribution_error(joined, single, layer(x)) < 1e-6


def test_layers_of_one_stack_share_their_strengths_on_a_device(monkeypatch):
    device, made = torch.device("meta"), []
    original = DeviceCache.get
    monkeypatch.setattr(low_rank.ScaleVectors, "_present", None)
    monkeypatch.setattr(
        DeviceCache,
        "get",
        lambda self, *a: original(self, *a[:2], lambda: made.append(0) or torch.empty(1, device=device)),
    )

    def vectors(count, strengths):
        terms = [parse_term(entry("lora", (24, 16), n, strength), {}) for n, strength in enumerate(strengths)]
        layers = [joined_of(terms, (24, 16)) for _ in range(count)]
        made.clear()
        found = [next(iter(one._make_scales(one.scaling, device, join=True))).per_rank for one in layers]
        return layers, {id(vector) for vector in found}

    layers, found = vectors(20, (0.5, 0.25))
    assert len(found) == len(made) == 1
    present = weakref.ref(layers[0].scaling.vectors)
    kept = [vectors(1, (0.5, n / 100)) for n in range(low_rank.MOST_VECTORS + 5)]
    assert len(present()._vectors) == low_rank.MOST_VECTORS
    del layers, kept
    assert present() is None


def test_fp16_does_not_overflow_between_the_two_factors():
    """Inputs up to 3e4 and unbalanced factors: the activation between them would be far above 65504."""
    layer = torch.nn.Linear(256, 64, bias=False).half()
    layer.weight.data.zero_()
    value = ("lora", (rand(64, 4, seed=1, scale=1e-6), rand(4, 256, seed=2, scale=3.0), 4.0, None, None))
    x = (rand(32, 256, seed=3).sign() * 3e4).half()
    output = call_hook(layer, [parse_term([1.0, value, 1.0, None, None], {})], x, (64, 256))
    true = x.double() @ (value[1][0].double() @ value[1][1].double()).T
    assert torch.isfinite(output).all()
    # fp16 keeps 11 bits: factors, activation and result are each rounded once.
    assert contribution_error(output, true, torch.zeros_like(true)) < 4 * 2**-11


def test_balancing_keeps_the_product_to_the_last_bits_of_fp16():
    value = ("lora", (rand(64, 4, seed=1).half(), rand(4, 256, seed=2).half(), 4.0, None, None))
    joined = joined_of([parse_term([1.0, value, 1.0, None, None], {})], (64, 256))
    (block,) = joined._make_blocks(torch.device("cpu"), torch.float16, join=True)
    true = value[1][0].double() @ value[1][1].double()
    assert not torch.equal(block.down, value[1][1])
    # Powers of two change no bit but where the smallest entries of `down` become subnormal.
    assert contribution_error(block.outputs[0].up.double() @ block.down.double(), true, torch.zeros_like(true)) < 2**-13


def test_device_copies_are_taken_over_for_another_strength_and_not_for_another_lora():
    terms = [parse_term(entry("lora", (24, 16)), {})]
    first = joined_of(terms, (24, 16))
    stronger = joined_of([dataclasses.replace(terms[0], strength=0.1)], (24, 16))
    stronger.share_factors_with(first)
    assert stronger._blocks is first._blocks
    assert stronger.scaling.scales == (0.1 * first._entries[0].factors.scale,) != first.scaling.scales
    other = joined_of([parse_term(entry("lora", (24, 16), 5), {})], (24, 16))
    other.share_factors_with(first)
    assert other._blocks is not first._blocks


def test_device_bytes_are_those_of_the_factors_in_the_compute_dtype():
    joined = joined_of(
        [parse_term(entry("lora", (24, 16)), {}), parse_term(entry("lora", (8, 16), offset=(0, 0, 8)), {})], (24, 16)
    )
    assert joined.device_bytes(torch.bfloat16) == 2 * (4 * (24 + 16) + 4 * (8 + 16))
    tucker = joined_of([parse_term(entry("lora_mid", (12, 8, 3, 3)), {})], (12, 8, 3, 3))
    assert tucker.device_bytes(torch.float32) == 4 * (4 * 12 + 4 * 8 * 9)
    assert layer_call.SMALLEST_CHUNK_TOKENS == 256
