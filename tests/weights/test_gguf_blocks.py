"""GGUF decoders against blocks written bit by bit, whole and by rows, and against files that are damaged."""

import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_by_hand import BY_HAND
from support.measure import same_bits

from lib_lora_guard.errors import FileFormatError
from lib_lora_guard.weights import GGUF_DECODERS, codec

BLOCK_BYTES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip

each = pytest.mark.parametrize("name", GGUF_DECODERS)


def matrix(name, rows, blocks, seed=0):
    """`(parts, values in float64)` of rows of blocks, written by hand."""
    rng = random.Random(seed)
    made = [[BY_HAND[name](rng) for _ in range(blocks)] for _ in range(rows)]
    data = torch.tensor([[byte for block, _ in row for byte in block] for row in made], dtype=torch.uint8)
    values = torch.tensor([[v for _, block in row for v in block] for row in made], dtype=torch.float64)
    return {"data": data}, values


def test_every_type_has_a_decoder_a_hand_made_block_and_the_sizes_of_the_format():
    assert set(GGUF_DECODERS) == set(BY_HAND)
    assert {name: (d.block, d.block_bytes) for name, d in GGUF_DECODERS.items()} == BLOCK_BYTES
    assert all(name == decoder.format for name, decoder in GGUF_DECODERS.items())


@each
def test_hand_made_blocks_decode_to_their_values(name):
    parts, values = matrix(name, rows=3, blocks=2)
    decoder = GGUF_DECODERS[name]
    decoded = decoder.decode(parts, torch.float32)
    # Exact: all products fit fp32, so the one sum of a format with a minimum is rounded as float64 to fp32 is.
    assert same_bits(decoded, values.float())
    assert decoder.shape_of(parts) == tuple(values.shape)
    assert decoder.bytes_of(values.shape) == parts["data"].numel()


@each
def test_other_dtypes_are_the_fp32_values_rounded_once(name):
    parts, values = matrix(name, rows=2, blocks=2, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        assert same_bits(GGUF_DECODERS[name].decode(parts, dtype), values.float().to(dtype))


@each
@settings(max_examples=15, deadline=None)  # 15 formats; the blocks are made in Python, value by value
@given(data=st.data())
def test_rows_are_those_of_the_whole(name, data):
    rows = data.draw(st.integers(1, 6))
    parts, _ = matrix(name, rows, blocks=1, seed=rows)
    start = data.draw(st.integers(0, rows))
    length = data.draw(st.integers(0, rows - start))
    decoder = GGUF_DECODERS[name]
    whole = decoder.decode(parts, torch.float32)
    assert same_bits(decoder.decode_rows(parts, start, length, torch.float32), whole[start : start + length])
    some = {"data": parts["data"][start : start + length]}
    assert same_bits(decoder.decode(some, torch.float32), whole[start : start + length])
    picked = data.draw(st.lists(st.integers(0, rows - 1), max_size=4))
    assert same_bits(decoder.decode({"data": parts["data"][picked]}, torch.float32), whole[picked])


@each
def test_slices_of_the_work_do_not_show(name, monkeypatch):
    parts, values = matrix(name, rows=7, blocks=2)
    monkeypatch.setattr(codec, "SLICE_VALUES", 3 * values.shape[1] + 1)
    assert same_bits(GGUF_DECODERS[name].decode(parts, torch.bfloat16), values.float().bfloat16())


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_only_the_rows_asked_for_are_decoded(name, monkeypatch):
    decoder, seen = GGUF_DECODERS[name], []
    work = type(decoder)._block_values
    monkeypatch.setattr(type(decoder), "_block_values", lambda self, b: seen.append(tuple(b.shape)) or work(self, b))
    decoder.decode_rows(matrix(name, rows=9, blocks=2)[0], 4, 3, torch.float32)
    assert seen == [(3, 2, decoder.block_bytes)]


@each
@pytest.mark.parametrize("offset", [1, 3])
def test_bytes_may_lie_at_any_address_and_apart(name, offset):
    parts, values = matrix(name, rows=3, blocks=1)
    room = torch.zeros(3, parts["data"].shape[1] + 5, dtype=torch.uint8)
    odd = room[:, offset : offset + parts["data"].shape[1]]
    odd.copy_(parts["data"])
    assert same_bits(GGUF_DECODERS[name].decode({"data": odd}, torch.float32), values.float())
    assert same_bits(GGUF_DECODERS[name].decode({"data": odd[:1]}, torch.float32), values[:1].float())


@pytest.mark.parametrize("name", [n for n in GGUF_DECODERS if n not in ("F32", "F16", "BF16")])
def test_wrong_sizes_say_what_was_found_and_expected(name):
    decoder = GGUF_DECODERS[name]
    short = torch.zeros(2, decoder.block_bytes - 1, dtype=torch.uint8)
    with pytest.raises(
        FileFormatError,
        match=rf"^{name}: expected a matrix of uint8 whose rows are a multiple of {decoder.block_bytes} bytes, "
        rf"found \[2, {decoder.block_bytes - 1}\] uint8; the file is damaged or in another format$",
    ):
        decoder.decode({"data": short}, torch.float32)
    for wrong in (torch.zeros(decoder.block_bytes, dtype=torch.uint8), torch.zeros(2, decoder.block_bytes)):
        with pytest.raises(FileFormatError, match="expected a matrix of uint8"):
            decoder.decode_rows({"data": wrong}, 0, 1, torch.float32)
    with pytest.raises(FileFormatError, match=rf"{name}: expected rows of a multiple of {decoder.block} values"):
        decoder.bytes_of((4, decoder.block + 1))


def test_plain_bytes_of_half_a_number_are_refused():
    with pytest.raises(
        FileFormatError,
        match=r"BF16: expected a matrix of bf16, or of uint8 with 2 bytes a value, found \[2, 3\] uint8",
    ):
        GGUF_DECODERS["BF16"].decode({"data": torch.zeros(2, 3, dtype=torch.uint8)}, torch.float32)


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 3), (2, 1), (1, -1)])
@pytest.mark.parametrize("name", ["F32", "Q4_K"])
def test_rows_that_are_not_there_are_refused(name, start, length):
    parts, _ = matrix(name, rows=2, blocks=1)
    with pytest.raises(ValueError, match=rf"rows {start} to {start + length} were asked for, the weight has 2"):
        GGUF_DECODERS[name].decode_rows(parts, start, length, torch.float32)


@pytest.mark.parametrize("name", [n for n, s in BLOCK_BYTES.items() if s[0] > 1])
def test_zero_rows_are_no_error(name):
    decoder = GGUF_DECODERS[name]
    empty = torch.zeros(0, 2 * decoder.block_bytes, dtype=torch.uint8)
    assert decoder.decode({"data": empty}, torch.float16).shape == (0, 2 * decoder.block)


def test_scales_that_are_no_numbers_are_passed_on_as_they_are():
    for scale, wanted in ((float("nan"), torch.isnan), (float("inf"), torch.isinf)):
        data = torch.tensor([[*struct.pack("<e", scale), *([1] * 32)]], dtype=torch.uint8)
        assert wanted(GGUF_DECODERS["Q8_0"].decode({"data": data}, torch.float32)).all()


def test_products_that_fp16_cannot_hold_on_the_way_come_out_right():
    # d * scale = 2048 * 63 is above fp16's largest (65504) and minus dmin * minimum below it again.
    block = bytearray(144)
    block[:4] = struct.pack("<2e", 2048.0, 2000.0)
    block[4:8] = [63] * 4
    block[8:12] = [63] * 4
    block[16:] = [0x11] * 128
    values = GGUF_DECODERS["Q4_K"].decode({"data": torch.tensor([list(block)], dtype=torch.uint8)}, torch.float16)
    assert values[0, :128].tolist() == [63 * 48.0] * 128
    assert values[0, 128:].tolist() == [0.0] * 128
