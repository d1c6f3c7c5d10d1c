"""The twin is the host's dequantisation bit for bit, and rounds once more for the LoRA."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lib_lora_guard.kernels import stored as kinds_of_storage
from lib_lora_guard.kernels.factors import Factors
from lib_lora_guard.kernels.fused import fused_weight
from lib_lora_guard.kernels.probe import sample, sample_sides
from lib_lora_guard.kernels.recipes import recipe_of
from lib_lora_guard.kernels.stored import Bnb4, Fp8, Gguf, Int8, Nested, stored_weight
from lib_lora_guard.kernels.twin import dequantised
from lib_lora_guard.weights.bnb4 import Bnb4Decoder
from lib_lora_guard.weights.gguf_decoders import GGUF_DECODERS

CPU, FP16, BF16 = torch.device("cpu"), torch.float16, torch.bfloat16
KINDS = (
    "fp8 e4m3", "fp8 e5m2 scaled odd", "fp8 e4m3 scaled by bf16", "int8 scaled by fp16", "nf4 64 by bf16", "fp4 32 nested256 by fp16",
    "nf4 64 crossing by fp16", "Q8_0", "Q8_0 baked by bf16", "Q4_0 by fp16", "Q4_0 baked by bf16", "Q5_0 by bf16", "Q4_K",
    "Q4_K baked by fp16", "Q5_K by bf16", "Q6_K by fp16",
)  # fmt: skip


def made(kind, rows=3, columns=None, dtype=FP16):
    recipe = recipe_of(kind)
    columns = columns or {"scaled": 13 if "odd" in kind else 32, "bnb4": 44 if "crossing" in kind else 128}.get(
        recipe.function, 512
    )
    return sample(kind, rows, columns, dtype, torch.Generator().manual_seed(1), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_says_its_kind_and_a_factor_of_zero_changes_no_bit(kind):
    stored = made(kind)
    assert stored.kind == kind
    plain = fused_weight(stored, None, BF16)
    rows, columns = stored.shape
    nothing = fused_weight(
        stored, Factors(torch.ones(rows, 2, dtype=BF16), torch.ones(2, columns, dtype=BF16), 0.0), BF16
    )
    assert torch.equal(plain.view(torch.int16), dequantised(stored, BF16).view(torch.int16))
    assert torch.equal(plain.nan_to_num(), nothing.nan_to_num())


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf_is_as_its_decoder_in_fp32_and_as_the_host_rounds_in_16_bits(form):
    stored = made(form)
    decoder = GGUF_DECODERS[form]
    blocks = stored.data
    expected = decoder.decode({"data": blocks.view(stored.shape[0], -1)}, BF16)
    assert torch.equal(dequantised(stored, BF16), expected)
    host = dequantised(dataclasses.replace(stored, values=BF16), BF16)
    if form.endswith("_0"):
        # The scale is rounded first: with a scale of 1 the decoder gives the integers.
        scale = blocks[:, :2].clone().view(FP16).to(BF16)
        blocks[:, :2] = torch.ones(len(blocks), 1, dtype=FP16).view(torch.uint8)
        whole = decoder.decode({"data": blocks.view(stored.shape[0], -1)}, BF16).view(len(blocks), 32)
        assert torch.equal(host.view(-1, 32), scale * whole)
    else:
        assert not torch.equal(host, expected)
        assert (host - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("kind", ["nf4 64", "fp4 32 nested256", "nf4 64 crossing"])
def test_bitsandbytes_is_as_its_decoder(kind):
    stored = made(kind)
    parts = {"data": stored.data, "absmax": stored.absmax}
    if stored.nested is not None:
        nested = stored.nested
        parts |= {"nested_absmax": nested.scales, "nested_code": nested.code, "offset": nested.offset}
    decoder = Bnb4Decoder(stored.form, stored.shape, stored.block)
    assert torch.equal(dequantised(stored, BF16), decoder.decode(parts, BF16))


def test_the_weight_is_rounded_as_the_hosts_and_the_sum_once():
    data = torch.tensor([[1.5, -0.875]], dtype=torch.float8_e4m3fn)
    stored = Fp8(data, scale=torch.tensor(0.0131).to(BF16).float())
    plain = data.to(BF16) * torch.tensor(0.0131).to(BF16)
    assert torch.equal(fused_weight(stored, None, BF16), plain)
    up, down = torch.tensor([[0.5, 0.25]], dtype=BF16), torch.tensor([[0.01, 0.0], [0.0, 0.02]], dtype=BF16)
    both = fused_weight(stored, Factors(up, down, 0.5, torch.tensor([1.0, 2.0])), BF16)
    exact = plain.double() + (up.double() * torch.tensor([1.0, 2.0])) @ down.double() * 0.5
    assert torch.equal(both, exact.to(BF16))


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lokr_is_added_and_rounded_once(kind, dtype):
    stored = made(kind, rows=6, dtype=dtype)
    rows, columns = stored.shape
    plain = dequantised(stored, dtype)
    height, width = 3, columns if "odd" in kind else columns // 4
    for strength, has_scale in ((0.0, False), (0.8, False), (-0.3, True), (0.0, True)):
        sides = sample_sides(rows, columns, height, width, dtype, torch.Generator().manual_seed(2), CPU)
        scale = torch.rand(rows) + 0.5 if has_scale else None
        sides = dataclasses.replace(sides, alpha=strength, row_scale=scale)
        added = torch.kron(sides.left.double(), sides.right.double()) * strength
        exact = plain.double() * (1.0 if scale is None else scale.double().unsqueeze(1)) + added
        found = fused_weight(stored, sides, dtype)
        if strength == 0.0 and scale is None:
            assert torch.equal(found.nan_to_num(), plain.nan_to_num())
        # Half a step of the dtype, and fp32's own roundings: nothing of the LoRA's size.
        step = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
        finite = exact.isfinite() & found.isfinite()
        assert finite.sum() > 0.9 * finite.numel()
        assert ((found.double() - exact).abs() <= 0.51 * step)[finite].all()


def test_parameters_of_the_hosts_are_read_and_others_are_left():
    fp8 = torch.zeros(4, 8).to(torch.float8_e5m2)
    assert (stored_weight(fp8).kind, stored_weight(fp8).data.data_ptr()) == ("fp8 e5m2 odd", fp8.data_ptr())
    assert stored_weight(fp8, torch.tensor(2.0)).kind == "fp8 e5m2 scaled odd"
    assert stored_weight(fp8.t()) is None
    assert stored_weight(torch.zeros(4, 8)) is None
    assert stored_weight(torch.zeros(4, 8, 3, 3).to(torch.float8_e4m3fn)) is None


def with_attributes(tensor, **attributes):
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def test_gguf_of_forge_is_read_where_it_is_baked():
    q8 = type("Q8_0", (), {})
    bytes_ = torch.zeros(6, 34, dtype=torch.uint8)
    facts = {"gguf_cls": q8, "real_shape": torch.Size([3, 64]), "computation_dtype": BF16, "baked": True}
    stored = stored_weight(with_attributes(bytes_, **facts))
    assert isinstance(stored, Gguf)
    assert (stored.kind, stored.shape) == ("Q8_0 baked by bf16", (3, 64))
    assert stored_weight(with_attributes(bytes_, baked=False)) is None
    assert stored_weight(with_attributes(bytes_, baked=True, gguf_cls=type("Q2_K", (), {}))) is None


def test_four_bits_of_bitsandbytes_are_read_once_they_are_quantised():
    data, absmax = torch.zeros(64, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    second = SimpleNamespace(code=torch.zeros(256), absmax=torch.zeros(1), blocksize=256)
    state = SimpleNamespace(
        shape=(2, 64),
        absmax=absmax,
        nested=True,
        state2=second,
        offset=torch.tensor(0.5),
        dtype=FP16,
        quant_type="nf4",
        blocksize=64,
    )
    stored = stored_weight(with_attributes(data, bnb_quantized=True, quant_state=state))
    assert isinstance(stored, Bnb4)
    assert isinstance(stored.nested, Nested)
    assert stored.kind == "nf4 64 nested256 by fp16"
    assert torch.equal(dequantised(stored, FP16), torch.full((2, 64), -0.5, dtype=FP16))  # level -1 of an absmax of 0.5
    assert stored_weight(with_attributes(data, bnb_quantized=False)) is None


def test_tensors_of_comfy_kitchen_are_read_and_rotated_ones_are_left():
    def tensor(layout, data, **params):
        return with_attributes(torch.zeros(2, 16), _layout_cls=layout, _qdata=data, _params=SimpleNamespace(**params))

    int8 = torch.ones(2, 16, dtype=torch.int8)
    scale = torch.tensor([[0.5], [0.25]])
    stored = stored_weight(tensor("TensorWiseINT8Layout", int8, scale=scale, orig_dtype=BF16, convrot=False))
    assert isinstance(stored, Int8)
    assert stored.kind == "int8 scaled by bf16"
    assert dequantised(stored, BF16)[:, 0].tolist() == [0.5, 0.25]
    assert stored_weight(tensor("TensorWiseINT8Layout", int8, scale=scale, orig_dtype=BF16, convrot=True)) is None
    fp8 = torch.ones(2, 16).to(torch.float8_e4m3fn)
    stored = stored_weight(tensor("TensorCoreFP8Layout", fp8, scale=torch.tensor(0.0131), orig_dtype=BF16))
    assert stored.scale.item() == torch.tensor(0.0131).to(BF16).item()  # rounded as the library rounds it
    assert stored_weight(tensor("TensorCoreNVFP4Layout", fp8, scale=scale, orig_dtype=BF16)) is None


def test_every_format_with_a_kernel_has_a_recipe_and_others_have_none():
    assert all(recipe_of(form) is not None for form in kinds_of_storage.BLOCKS)
    assert [recipe_of(kind) for kind in ("fp8 fp8_e4m3fnuz", "nf4 48", "Q2_K")] == [None, None, None]
