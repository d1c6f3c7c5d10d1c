"""The cheap forward against the patched weight, for every shape of layer, with planted faults; and what it allocates."""

import dataclasses

import pytest
import torch
from support.make import host_value, rand
from support.measure import assert_same_and_faults_seen, contribution_error
from support.reference import merge_reference
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.errors import LayerError
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching import layer_call
from lib_lora_guard.patching.bypass import Bypass
from lib_lora_guard.patching.low_rank import Entry, JoinedLowRank

OUT_OF_MEMORY = OutOfMemory[0]


def joined_of(terms, shape):
    return JoinedLowRank([Entry(t.adapter.cheap_forward(), t.strength, t.part) for t in terms], shape)


def entry(kind, shape, seed=1, strength=0.8, offset=None, **more):
    return [strength, host_value(kind, shape, seed, **more), 1.0, offset, None]


def run(layer, terms, x, shape):
    output = layer(x)
    return Bypass("layer.weight", tuple(terms), shape)(layer, (x,), {}, output)


def check(layer, entries, x):
    shape = tuple(layer.weight.shape)
    base = layer(x).clone()
    patched = merge_reference(entries, layer.weight.detach().double()).float()
    with torch.no_grad():
        reference = torch.func.functional_call(layer, {"weight": patched}, (x,))
    assert_same_and_faults_seen(
        lambda terms: run(layer, terms, x, shape), [parse_term(e, {}) for e in entries], reference, base
    )


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("tokens", [(16,), (5, 16), (2, 7, 16), (2, 3, 4, 16)])
def test_linear(tokens):
    check(torch.nn.Linear(16, 24), [entry("lora", (24, 16))], rand(*tokens, seed=3))


def test_linear_with_several_loras_of_different_ranks_and_scales():
    stack = [
        entry("lora", (24, 16), 1),
        entry("lora", (24, 16), 2, -0.3, rank=8, alpha=3.0),
        entry("lora", (24, 16), 3, 0.1, rank=1, alpha=None),
    ]
    check(torch.nn.Linear(16, 24), stack, rand(2, 7, 16, seed=3))


def test_q_k_v_slices_of_a_fused_layer_with_one_lora_on_the_whole():
    slices = [entry("lora", (8, 16), n, 0.5 + n / 10, (0, 8 * n, 8), rank=2 + n) for n in range(3)]
    check(torch.nn.Linear(16, 24), [*slices, entry("lora", (24, 16), 9)], rand(2, 7, 16, seed=3))


def test_slices_of_the_input():
    slices = [entry("lora", (24, 8), n, 0.5, (1, 8 * n, 8)) for n in range(2)]
    check(torch.nn.Linear(16, 24), slices, rand(2, 7, 16, seed=3))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2},
        {"dilation": 2},
        {"padding": 0},
        {"padding": "same"},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["lora", "lora_mid"])
def test_convolution(kind, settings):
    layer = torch.nn.Conv2d(8, 12, 3, **{"padding": 1, **settings})
    check(layer, [entry(kind, (12, 8, 3, 3)), entry("lora", (12, 8, 3, 3), 4, 0.3, rank=2)], rand(2, 8, 9, 9, seed=3))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(torch.nn.Conv1d, (12, 8, 3)), (torch.nn.Conv2d, (12, 8, 1, 1)), (torch.nn.Conv3d, (12, 8, 3, 3, 3))],
)
def test_convolutions_of_other_ranks(layer, shape):
    values = ("lora", (rand(12, 4, *[1] * (len(shape) - 2), seed=1), rand(4, *shape[1:], seed=2), 2.0, None, None))
    check(
        layer(8, 12, shape[2], padding=shape[2] // 2),
        [[0.8, values, 1.0, None, None]],
        rand(2, 8, *[6] * (len(shape) - 2), seed=3),
    )


def test_convolution_in_channels_last_and_with_output_and_input_slices():
    layer = torch.nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last)
    x = rand(2, 8, 9, 9, seed=3).contiguous(memory_format=torch.channels_last)
    check(
        layer, [entry("lora", (4, 8, 3, 3), 1, offset=(0, 4, 4)), entry("lora", (12, 4, 3, 3), 2, offset=(1, 2, 4))], x
    )


def test_a_matrix_lora_on_a_1x1_convolution_and_a_convolution_lora_on_a_linear():
    value = ("lora", (rand(12, 4, seed=1), rand(4, 8, seed=2), 2.0, None, None))
    check(torch.nn.Conv2d(8, 12, 1), [[0.8, value, 1.0, None, None]], rand(2, 8, 5, 5, seed=3))
    value = ("lora", (rand(12, 4, 1, 1, seed=1), rand(4, 8, 1, 1, seed=2), 2.0, None, None))
    check(torch.nn.Linear(8, 12), [[0.8, value, 1.0, None, None]], rand(2, 8, seed=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_nearer_than_twice_the_error_of_merging_into_a_16_bit_weight(dtype):
    # The yardstick of the design: Forge's fp16-LoRA path, which adds the delta to the weight in the compute dtype.
    layer = torch.nn.Linear(256, 256, bias=False).to(dtype)
    layer.weight.data.mul_(8)
    value = (
        "lora",
        (rand(256, 8, seed=1, scale=0.1).to(dtype), rand(8, 256, seed=2, scale=0.1).to(dtype), 4.0, None, None),
    )
    entries, x = [[0.8, value, 1.0, None, None]], rand(64, 256, seed=3).to(dtype)
    base = layer.weight.double() @ x.double().T
    true = merge_reference(entries, layer.weight.double()) @ x.double().T
    online = merge_reference(entries, layer.weight.detach())
    theirs = contribution_error(torch.nn.functional.linear(x, online).T, true, base)
    ours = contribution_error(run(layer, [parse_term(e, {}) for e in entries], x, (256, 256)).T, true, base)
    assert ours <= 2 * theirs


def test_strengths_are_not_rounded_to_the_activations_dtype():
    # 0.85 would be 0.8516 in bf16: 0.2 % of the LoRA, more than all other rounding of a mean over many tokens.
    down, up = torch.eye(4).to(torch.bfloat16), torch.eye(4).to(torch.bfloat16)
    terms = [parse_term([s, ("lora", (up, down, None, None, None)), 1.0, None, None], {}) for s in (0.85, 0.0001)]
    joined = joined_of(terms, (4, 4))
    scales = list(joined._make_scales(torch.device("cpu"), join=True))
    assert scales[0].per_rank.dtype == torch.float32
    assert torch.equal(scales[0].per_rank, torch.tensor([0.85] * 4 + [0.0001] * 4))
    blocks = list(joined._make_blocks(torch.device("cpu"), torch.bfloat16, join=True))
    assert blocks[0].down.shape == (8, 4), "the down factors are joined"


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_joined_blocks_give_the_same_as_single_ones(monkeypatch, kind):
    if kind == "linear":
        entries = [entry("lora", (8, 16), n, 0.5 + n / 10, (0, 8 * n, 8), rank=2 + n) for n in range(3)]
        entries += [entry("lora", (24, 16), 9), entry("lora", (24, 8), 4, 0.2, (1, 4, 8))]
        layer, x, shape = torch.nn.Linear(16, 24), rand(2, 7, 16, seed=3), (24, 16)
    else:
        entries = [entry("lora", (12, 8, 3, 3), 1, 0.7), entry("lora_mid", (12, 8, 3, 3), 2, -0.3, rank=2)]
        entries += [entry("lora", (4, 8, 3, 3), 3, 0.5, (0, 4, 4))]
        layer, x, shape = torch.nn.Conv2d(8, 12, 3, padding=1), rand(2, 8, 5, 5, seed=3), (12, 8, 3, 3)
    terms = [parse_term(e, {}) for e in entries]
    single = run(layer, terms, x, shape)
    make_blocks, make_scales = JoinedLowRank._make_blocks, JoinedLowRank._make_scales
    monkeypatch.setattr(JoinedLowRank, "_make_blocks", lambda self, d, t, join: make_blocks(self, d, t, True))
    monkeypatch.setattr(JoinedLowRank, "_make_scales", lambda self, d, join: make_scales(self, d, True))
    joined = run(layer, terms, x, shape)
    assert contribution_error(joined, single, layer(x)) < 1e-6


def test_fp16_does_not_overflow_between_the_factors():
    """Inputs up to 3e4 and unbalanced factors: the activation between them would be far above 65504."""
    layer = torch.nn.Linear(256, 64, bias=False).half()
    layer.weight.data.zero_()
    value = ("lora", (rand(64, 4, seed=1, scale=1e-6), rand(4, 256, seed=2, scale=3.0), 4.0, None, None))
    x = (rand(32, 256, seed=3).sign() * 3e4).half()
    output = run(layer, [parse_term([1.0, value, 1.0, None, None], {})], x, (64, 256))
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


def test_no_memory_for_the_factors_is_said_with_their_size(monkeypatch):
    layer, x = torch.nn.Linear(16, 24), rand(8, 16, seed=3)
    hook, output = Bypass("block.qkv.weight", (parse_term(entry("lora", (24, 16)), {}),), (24, 16)), layer(x)

    def no_memory(*args):
        raise OUT_OF_MEMORY("planted")

    monkeypatch.setattr(JoinedLowRank, "_make_blocks", no_memory)
    with pytest.raises(
        LayerError, match=r"block\.qkv\.weight: no memory left for 0\.0 MB of LoRA factors\. Use fewer LoRAs"
    ):
        hook(layer, (x,), {}, output)


class OutputSized(TorchDispatchMode):
    """Counts new storages of at least `numel` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.seen = numel, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= 4 * self.numel:
                self.seen[tensor.untyped_storage().data_ptr()] = tensor
        return result


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_only_the_rank_activation_is_allocated_beyond_the_base_forward(kind):
    if kind == "linear":
        layer, x, value = torch.nn.Linear(64, 96), rand(500, 64, seed=3), entry("lora", (96, 64))
    else:
        layer, x, value = torch.nn.Conv2d(64, 96, 1), rand(1, 64, 20, 20, seed=3), entry("lora", (96, 64, 1, 1))
    output = layer(x)
    with OutputSized(96 * 64) as counted:
        result = Bypass("k", (parse_term(value, {}),), tuple(layer.weight.shape))(layer, (x,), {}, output)
    assert result.data_ptr() == output.data_ptr(), "added in place"
    assert set(counted.seen) <= {x.untyped_storage().data_ptr(), output.untyped_storage().data_ptr()}


def test_when_memory_ends_the_tokens_are_taken_in_slices(monkeypatch):
    layer, x = torch.nn.Linear(16, 24), rand(2048, 16, seed=3)
    terms = [parse_term(entry("lora", (24, 16)), {})]
    wanted = run(layer, terms, x, (24, 16))
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


def test_when_not_even_slices_fit_the_image_stops_with_the_layer_and_advice(monkeypatch):
    def no_memory(*args):
        raise OUT_OF_MEMORY("planted")

    layer, x = torch.nn.Linear(16, 24), rand(2048, 16, seed=3)
    output = layer(x)
    monkeypatch.setattr(torch.nn.functional, "linear", no_memory)
    with pytest.raises(
        LayerError, match=r"block\.qkv\.weight: no memory left .* slices of 256 tokens.*lower 'GPU Weights'"
    ):
        Bypass("block.qkv.weight", (parse_term(entry("lora", (24, 16)), {}),), (24, 16))(layer, (x,), {}, output)


def test_other_errors_are_not_called_out_of_memory(monkeypatch):
    def broken(*args):
        raise RuntimeError("planted")

    layer, x = torch.nn.Linear(16, 24), rand(2048, 16, seed=3)
    output = layer(x)
    monkeypatch.setattr(torch.nn.functional, "linear", broken)
    with pytest.raises(RuntimeError, match="planted") as error:
        Bypass("k", (parse_term(entry("lora", (24, 16)), {}),), (24, 16))(layer, (x,), {}, output)
    assert not isinstance(error.value, LayerError)


def test_a_change_of_strength_takes_the_device_factors_over_and_another_lora_does_not():
    terms = [parse_term(entry("lora", (24, 16)), {})]
    first = joined_of(terms, (24, 16))
    stronger = joined_of([dataclasses.replace(terms[0], strength=0.1)], (24, 16))
    stronger.share_factors_with(first)
    assert stronger._blocks is first._blocks
    assert stronger._scales == (0.1 * first._entries[0].factors.scale,) != first._scales
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
