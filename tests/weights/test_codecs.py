"""Codecs: decoding against formats written out by hand, rows on their own, bytes counted, error of a round trip."""

import numpy as np
import pytest
import torch
from support.make import rand
from support.measure import same_bits

from lib_lora_guard.weights import Nf4Codec, PlainCodec, Q4_0Codec, Q8_0Codec, ScaledFp8Codec, StoredLinear
from lib_lora_guard.weights.nf4 import NF4_LEVELS

CODECS = [PlainCodec(torch.bfloat16, "bf16"), ScaledFp8Codec(), Nf4Codec(), Q8_0Codec(), Q4_0Codec()]
# Largest error over the largest value of a block, by the step of the format: half a step of 8 bits, of 4 bits, ...
WORST = {"bf16": 2**-8, "fp8": 2**-4, "nf4": 0.16, "Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 1 / 8 + 2**-11}
BYTES = {"bf16": 2.0, "fp8": 1 + 4 / 128, "nf4": 0.5 + 4 / 64, "Q8_0": 34 / 32, "Q4_0": 18 / 32}

each = pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.format)


@each
def test_a_round_trip_stays_within_the_step_of_the_format(codec):
    weight = rand(24, 128, seed=1)
    parts = codec.encode(weight)
    decoded = codec.decode(parts, torch.float32)
    blocks = (24, -1, codec.block if codec.block > 1 else 128)
    worst = (decoded - weight).reshape(blocks).abs().amax(2) / weight.reshape(blocks).abs().amax(2)
    assert decoded.shape == weight.shape
    assert decoded.dtype == torch.float32
    assert float(worst.max()) <= WORST[codec.format]
    assert sum(p.numel() * p.element_size() for p in parts.values()) == BYTES[codec.format] * weight.numel()


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@each
def test_small_weights_keep_their_precision(codec, size):
    # fp16 scales become subnormal for the smallest: their step is 6e-8, a few per cent of 1e-4 / 127.
    weight = rand(8, 128, seed=1)
    error = [
        float((codec.decode(codec.encode(w), torch.float32) - w).norm() / w.norm()) for w in (weight, weight * size)
    ]
    assert error[1] <= error[0] * 1.1 + (0.05 if size == 1e-4 else 0.0)


@each
def test_rows_can_be_decoded_on_their_own(codec):
    parts = codec.encode(rand(24, 128, seed=1))
    whole = codec.decode(parts, torch.float32)
    rows = codec.decode({k: v[5:9] for k, v in parts.items()}, torch.float32)
    assert same_bits(rows, whole[5:9])


@each
def test_zeros_stay_zeros(codec):
    assert not codec.decode(codec.encode(torch.zeros(2, 64)), torch.float32).any()


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec.block > 1], ids=lambda c: c.format)
def test_columns_must_fill_whole_blocks(codec):
    with pytest.raises(
        ValueError,
        match=rf"{codec.format} needs a matrix whose columns are a multiple of {codec.block}, found \[4, 40\]",
    ):
        codec.encode(torch.zeros(4, 40))


def test_q8_0_decodes_the_bytes_of_the_format():
    rng = np.random.default_rng(0)
    blocks = np.zeros((3, 2), dtype=[("d", "<f2"), ("qs", "i1", 32)])
    blocks["d"], blocks["qs"] = rng.random((3, 2)), rng.integers(-127, 128, (3, 2, 32))
    data = torch.from_numpy(blocks.view(np.uint8).reshape(3, -1).copy())
    wanted = (blocks["d"][..., None].astype(np.float32) * blocks["qs"]).reshape(3, 64)
    assert np.array_equal(Q8_0Codec().decode({"data": data}, torch.float32).numpy(), wanted)


def test_q4_0_decodes_the_bytes_of_the_format():
    rng = np.random.default_rng(0)
    blocks = np.zeros((3, 2), dtype=[("d", "<f2"), ("qs", "u1", 16)])
    blocks["d"], blocks["qs"] = rng.random((3, 2)), rng.integers(0, 256, (3, 2, 16))
    data = torch.from_numpy(blocks.view(np.uint8).reshape(3, -1).copy())
    values = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], -1).astype(np.float32) - 8
    wanted = (blocks["d"][..., None].astype(np.float32) * values).reshape(3, 64)
    assert np.array_equal(Q4_0Codec().decode({"data": data}, torch.float32).numpy(), wanted)


def test_nf4_picks_the_nearest_level_with_the_earlier_value_in_the_high_nibble():
    levels = torch.tensor(NF4_LEVELS)
    weight = levels.repeat(4).reshape(1, 64) * 0.5
    parts = Nf4Codec().encode(weight)
    assert parts["absmax"].tolist() == [[0.5]]
    assert parts["data"][0, :8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    nearest = (rand(1, 64, seed=3)[..., None] / rand(1, 64, seed=3).abs().max() - levels).abs().argmin(-1)
    packed = Nf4Codec().encode(rand(1, 64, seed=3))["data"]
    assert torch.stack([packed >> 4, packed & 15], -1).flatten().tolist() == nearest.flatten().tolist()


@each
def test_a_stored_linear_answers_like_its_decoded_weight(codec):
    weight, bias, x = rand(24, 128, seed=1), rand(24, seed=2), rand(5, 128, seed=3)
    layer = StoredLinear(codec, weight, bias)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.decode(torch.float32), bias))
    assert layer.storage().shape == (24, 128)
    assert layer.storage().bytes == BYTES[codec.format] * weight.numel()
    assert layer.storage().wide == (codec.format == "bf16")
