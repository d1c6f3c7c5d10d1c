"""bitsandbytes' 4-bit weights: values written out by hand, numbers bitsandbytes made, rows, damaged files."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bnb_fixture import bnb_tensors
from support.measure import same_bits

from lib_lora_guard.errors import FileFormatError
from lib_lora_guard.weights.bnb4 import FP4_LEVELS, LEVELS, Bnb4Decoder, from_file_parts, from_quant_state
from lib_lora_guard.weights.nf4 import NF4_LEVELS

kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])


def random_weight(kind, shape, block=64, nested=0, seed=0):
    """`(decoder, parts, values)`; the values are made one by one."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    index = torch.randint(0, 16, (count + count % 2,), generator=generator)
    parts = {"data": ((index[0::2] << 4) | index[1::2]).to(torch.uint8)[:, None]}
    blocks = -(-count // block)
    if nested:
        parts["absmax"] = torch.randint(0, 256, (blocks,), generator=generator).to(torch.uint8)
        parts["nested_absmax"] = torch.rand(-(-blocks // nested), generator=generator)
        parts["nested_code"], parts["offset"] = torch.linspace(-1, 1, 256), torch.tensor(0.25)
        scales = [
            parts["nested_code"][q] * parts["nested_absmax"][b // nested] + 0.25
            for b, q in enumerate(parts["absmax"].tolist())
        ]
    else:
        parts["absmax"] = torch.rand(blocks, generator=generator)
        scales = list(parts["absmax"])
    levels = torch.tensor(LEVELS[kind])
    values = torch.stack([levels[q] * scales[i // block] for i, q in enumerate(index[:count].tolist())])
    return Bnb4Decoder(kind, shape, block, nested or 256), parts, values.view(shape)


def test_the_levels_of_fp4_are_its_sixteen_floats():
    # Sign, exponent, mantissa; over the largest, 12: the list is in the order of the bits.
    wanted = [0, 0.0625 / 12, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
    assert list(FP4_LEVELS) == pytest.approx(wanted + [-v for v in wanted])


@kinds
def test_a_block_by_hand(kind):
    # Indices 0..15 four times, the earlier in the high nibble; absmax 2.
    data = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4, dtype=torch.uint8)
    decoder = Bnb4Decoder(kind, (2, 32))
    decoded = decoder.decode({"data": data, "absmax": torch.tensor([2.0])}, torch.float32)
    levels = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}[kind]
    assert torch.equal(decoded, torch.tensor([levels * 2] * 2) * 2)
    assert (decoder.format, decoder.block, decoder.block_bytes, decoder.bytes_of((2, 32))) == (kind, 64, 32, 32)


@kinds
@pytest.mark.parametrize("layout", [lambda d: d, lambda d: d.t(), lambda d: d.flatten()], ids=["n1", "1n", "flat"])
def test_numbers_of_bitsandbytes_from_its_file_layout(kind, layout):
    tensors = bnb_tensors(kind)
    wanted = tensors.pop("dequantized")
    tensors["x.weight"] = layout(tensors["x.weight"])
    decoder, parts = from_file_parts(tensors, "x.weight")
    assert decoder.shape_of(parts) == (5, 48)
    assert same_bits(decoder.decode(parts, torch.float32), wanted)
    assert same_bits(decoder.decode(parts, torch.bfloat16), wanted.bfloat16())
    # Row 1 begins in the middle of block 0, row 4 ends in the short last block.
    for start, length in ((0, 1), (1, 2), (4, 1), (2, 3), (5, 0)):
        assert same_bits(decoder.decode_rows(parts, start, length, torch.float32), wanted[start : start + length])


@kinds
def test_numbers_of_bitsandbytes_from_a_quant_state(kind):
    tensors = bnb_tensors(kind)
    x = SimpleNamespace(**{key.removeprefix("x.weight."): value for key, value in tensors.items() if "." in key})
    state = SimpleNamespace(
        absmax=x.absmax,
        shape=torch.Size([5, 48]),
        code=x.quant_map,
        blocksize=64,
        quant_type=kind,
        offset=None,
        state2=None,
    )
    if kind == "nf4":
        said = json.loads(bytes(vars(x)["quant_state.bitsandbytes__nf4"].tolist()))
        state.offset = torch.tensor(said["nested_offset"])
        state.state2 = SimpleNamespace(absmax=x.nested_absmax, code=x.nested_quant_map, blocksize=256)
    decoder, parts = from_quant_state(tensors["x.weight"], state)
    assert same_bits(decoder.decode(parts, torch.float32), tensors["dequantized"])
    # Weights may be kept in another dtype than uint8 (quant_storage).
    decoder, parts = from_quant_state(tensors["x.weight"].flatten().view(torch.bfloat16), state)
    assert same_bits(decoder.decode(parts, torch.float32), tensors["dequantized"])
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="bitsandbytes has repacked this weight for its own CPU kernels"):
        from_quant_state(tensors["x.weight"], state)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["nf4", "fp4"]),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 40)),
    block=st.sampled_from([2, 32, 64]),
    nested=st.sampled_from([0, 2, 256]),
    data=st.data(),
)
def test_any_rows_of_any_shape(kind, shape, block, nested, data):
    decoder, parts, wanted = random_weight(kind, shape, block, nested)
    start = data.draw(st.integers(0, shape[0]))
    length = data.draw(st.integers(0, shape[0] - start))
    assert same_bits(decoder.decode(parts, torch.float32), wanted)
    assert same_bits(decoder.decode_rows(parts, start, length, torch.float32), wanted[start : start + length])
    assert same_bits(decoder.decode(parts, torch.float16), wanted.half())


def test_a_weight_of_more_dimensions_is_given_as_a_matrix():
    decoder, parts, wanted = random_weight("nf4", (3, 4, 5))
    assert same_bits(decoder.decode(parts, torch.float32), wanted.flatten(1))


def test_scales_may_be_fp16_and_no_numbers():
    decoder, parts, _ = random_weight("nf4", (2, 32))
    parts["absmax"] = torch.tensor([float("nan")], dtype=torch.float16)
    assert decoder.decode(parts, torch.float32).isnan().all()


def without(key):
    return lambda tensors: tensors.pop(key)


def changed(key, value):
    return lambda tensors: tensors.update({key: value})


def said(**changes):
    """Changes the JSON of the state; None takes a name out."""

    def change(tensors):
        state = json.loads(bytes(tensors[STATE].tolist()))
        state = {k: v for k, v in {**state, **changes}.items() if v is not None}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


STATE = "x.weight.quant_state.bitsandbytes__nf4"
DAMAGE = [
    (without("x.weight"), r"^x\.weight: x\.weight is missing"),
    (without("x.weight.absmax"), r"x\.weight\.absmax is missing"),
    (without("x.weight.nested_quant_map"), r"x\.weight\.nested_quant_map is missing"),
    (without(STATE), r"x\.weight: expected one x\.weight\.quant_state\.bitsandbytes__nf4 or __fp4, found 0"),
    (changed(STATE[:-3] + "fp4", torch.zeros(1)), r"found 2; the file is not of bitsandbytes' 4-bit layout"),
    (changed("x.weight", torch.zeros(119, 1, dtype=torch.uint8)), r"expected 120 bytes of data .* found 119"),
    (changed("x.weight.absmax", torch.zeros(5, dtype=torch.uint8)), r"expected 4 values of absmax .* found 5"),
    (changed("x.weight.absmax", torch.zeros(4)), r"expected absmax in float, or in uint8 with .* found fp32 with"),
    (without("x.weight.nested_absmax"), r"expected absmax in float, or in uint8 with .* found uint8 with none of them"),
    (changed("x.weight.nested_absmax", torch.zeros(2)), r"expected 1 values of nested_absmax .* found 2"),
    (changed("x.weight.nested_quant_map", torch.zeros(255)), r"expected 256 values of nested_code .* found 255"),
    (changed(STATE, torch.tensor([123], dtype=torch.uint8)), r"expected JSON, found JSONDecodeError"),
    (changed(STATE, torch.tensor([91] * 60000, dtype=torch.uint8)), r"expected JSON, found RecursionError"),
    (changed(STATE, torch.tensor([255], dtype=torch.uint8)), r"expected JSON, found UnicodeDecodeError"),
    (changed(STATE, torch.tensor([91, 93], dtype=torch.uint8)), r"expected a JSON object, found list"),
    (changed(STATE, torch.zeros(70000, dtype=torch.uint8)), r"expected JSON in at most 65536 bytes of uint8, found \[70000\]"),
    (said(quant_type="int4"), r"x\.weight: bitsandbytes 4-bit: expected quant_type nf4 or fp4, found 'int4'"),
    (said(quant_type=["nf4"]), r"expected quant_type nf4 or fp4"),
    (said(shape=[48, -5]), r"expected a shape of positive whole numbers, found \(48, -5\)"),
    (said(shape=[1 << 62, 1 << 62]), r"expected \d+ bytes of data .* found 120"),
    (said(shape="5x48"), r"expected a shape of positive whole numbers, found \(\)"),
    (said(shape=None), r"x\.weight: shape is missing"),
    (said(blocksize=0), r"expected an even number of values a block"),
    (said(blocksize=63), r"expected an even number of values a block .* found 63 and 256"),
    (said(blocksize=64.0), r"expected an even number of values a block"),
    (said(nested_blocksize=0), r"and a positive one of nested blocks, found 64 and 0"),
    (said(nested_offset="much"), r"x\.weight: could not convert string to float: 'much'"),
    (said(nested_offset=[]), r"x\.weight: float\(\) argument"),
    (said(nested_offset=10**400), r"x\.weight: int too large to convert to float"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[m for _, m in DAMAGE])
def test_a_damaged_file_is_refused_with_what_was_found(damage, message):
    tensors = bnb_tensors("nf4")
    damage(tensors)
    with pytest.raises(FileFormatError, match=message):
        from_file_parts(tensors, "x.weight")


def test_rows_that_are_not_there_are_refused():
    decoder, parts, _ = random_weight("nf4", (2, 32))
    with pytest.raises(ValueError, match="nf4: rows 1 to 3 were asked for, the weight has 2"):
        decoder.decode_rows(parts, 1, 2, torch.float32)


@kinds
def test_absmax_of_a_model_that_has_run_on_a_cpu_is_transposed(kind):
    """bitsandbytes 0.50.2 saves it as (blocks of a row, rows) in bf16, the weight beside it in the usual order."""
    decoder, parts, _ = random_weight(kind, (96, 128))
    usual = {**parts, "absmax": parts["absmax"].bfloat16()}
    state = torch.tensor(
        list(json.dumps({"quant_type": kind, "blocksize": 64, "shape": [96, 128]}).encode()), dtype=torch.uint8
    )
    file = {
        "x.weight": parts["data"],
        "x.weight.absmax": usual["absmax"].reshape(96, 2).t().contiguous(),
        f"x.weight.quant_state.bitsandbytes__{kind}": state,
    }
    found, read = from_file_parts(file, "x.weight")
    wanted = decoder.decode(usual, torch.float32)
    assert same_bits(found.decode(read, torch.float32), wanted)
    file["x.weight.absmax"] = usual["absmax"].reshape(192, 1)
    assert same_bits(found.decode(from_file_parts(file, "x.weight")[1], torch.float32), wanted)
    file["x.weight.absmax"] = usual["absmax"].reshape(96, 2)
    with pytest.raises(FileFormatError, match=r"as \[2, 96\] from a model that has run on a CPU, found \[96, 2\]"):
        from_file_parts(file, "x.weight")
