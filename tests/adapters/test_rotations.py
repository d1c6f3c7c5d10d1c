"""OFT, BOFT, IA3 and DoRA as trained: what fits, single rows, low precision. The numbers: tests/references."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.from_keys import patched
from support.make import rand
from support.measure import assert_same, same_bits

from lib_lora_guard.adapters.boft import BoftAdapter, PeftBoftAdapter
from lib_lora_guard.adapters.dora import decompose
from lib_lora_guard.adapters.ia3 import Ia3Adapter
from lib_lora_guard.adapters.oft import OftAdapter, PeftOftAdapter
from lib_lora_guard.errors import LoraMismatchError

LINEAR, CONV = (24, 16), (24, 8, 3, 3)


def oft(**more):
    return OftAdapter(rand(6, 4, 4, seed=1, scale=0.2), **more)


def adapters(shape):
    """One of each kind for a weight of `shape`."""
    columns = torch.Size(shape[1:]).numel()
    ones = [1] * (len(shape) - 1)
    factor = 1 + rand(24, *ones, seed=3, scale=0.3)
    yield "oft", oft()
    yield "oft bounded", oft(alpha=0.02, rescale=factor)
    yield "peft oft", PeftOftAdapter(rand(columns // 4, 6, seed=2, scale=0.2))
    yield "peft oft shared", PeftOftAdapter(rand(1, 6, seed=2, scale=0.2), terms=None)
    yield "boft", BoftAdapter(rand(3, 4, 6, 6, seed=4, scale=0.1), alpha=0.02, rescale=factor)
    yield "peft boft", PeftBoftAdapter(rand(2, columns // 4, 4, 4, seed=5, scale=0.2), factor.reshape(24, 1))
    yield "ia3 rows", Ia3Adapter(rand(24, seed=6, scale=0.2), on_input=False)
    yield "ia3 columns", Ia3Adapter(1 + rand(1, shape[1], *ones[1:], seed=7, scale=0.2), on_input=True, centre=1.0)


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_strength_0_is_the_weight_and_low_precision_is_rounded_once(shape):
    weight = rand(*shape, seed=9, scale=0.3)
    for name, adapter in adapters(shape):
        assert same_bits(patched(adapter, weight, 0.0), weight), name
        for dtype in (torch.bfloat16, torch.float16):
            low = weight.to(dtype)
            result = patched(adapter, low, 0.8)
            assert result.dtype == dtype, name
            # Computed in fp32: equal to the fp32 result of the same weight, rounded to the dtype.
            assert same_bits(result, patched(adapter, low.float(), 0.8).to(dtype)), name
        double = patched(adapter, weight.double(), 0.8)
        assert double.dtype == torch.float64
        assert_same(patched(adapter, weight, 0.8), double, weight)


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_a_part_of_a_larger_weight_is_patched_in_place(shape):
    fused = rand(3 * shape[0], *shape[1:], seed=9, scale=0.3)
    for name, adapter in adapters(shape):
        whole = fused.clone()
        part = whole.narrow(0, shape[0], shape[0])
        result = adapter.patch(part, 0.8, None)
        wanted = patched(adapter, fused.narrow(0, shape[0], shape[0]), 0.8)
        assert torch.equal(result, wanted), name
        assert torch.equal(part, wanted), name
        assert torch.equal(whole[: shape[0]], fused[: shape[0]]), name


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_function_is_applied_to_the_delta(shape):
    weight = rand(*shape, seed=9, scale=0.3)
    for name, adapter in adapters(shape):
        delta = patched(adapter, weight, 0.8) - weight
        result = adapter.patch(weight.clone(), 0.8, lambda d: d.flip(0))
        assert torch.allclose(result - weight, delta.flip(0), atol=1e-6), name


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 5), length=st.integers(1, 6), strength=st.floats(-1.5, 1.5))
def test_rows_alone_are_what_they_are_in_the_whole(start, length, strength):
    weight = rand(*LINEAR, seed=9, scale=0.3).double()
    first, count = 4 * start, 4 * min(length, 6 - start)
    for name, adapter in adapters(LINEAR):
        part = adapter.rows(first, count)
        if name == "boft":
            assert part is None
            continue
        wanted = patched(adapter, weight, strength)[first : first + count]
        assert torch.allclose(patched(part, weight[first : first + count], strength), wanted, atol=1e-8), name


def test_rows_that_cut_a_block_have_no_adapter():
    assert oft().rows(2, 4) is None
    assert oft().rows(4, 6) is None


def test_the_bound_counts_all_blocks():
    weight = rand(*LINEAR, seed=9)
    free = oft()
    skew = free.blocks - free.blocks.mT
    above = float(skew.norm()) / 24 * 1.01
    assert torch.equal(patched(oft(alpha=above), weight, 1.0), patched(free, weight, 1.0))
    halved = dataclasses.replace(free, blocks=free.blocks / 2)
    bound = oft(alpha=float(skew.norm()) / 48)
    assert_same(patched(bound, weight, 1.0), patched(halved, weight, 1.0), weight)


def test_rotations_keep_the_length():
    weight = rand(*LINEAR, seed=9)
    for adapter in (
        oft(),
        BoftAdapter(rand(3, 4, 6, 6, seed=4)),
        PeftOftAdapter(rand(4, 6, seed=2), terms=None),
        PeftBoftAdapter(rand(3, 4, 4, 4, seed=5)),
    ):
        axis = 0 if isinstance(adapter, OftAdapter | BoftAdapter) else 1
        result = patched(adapter, weight, 1.0)
        assert not torch.allclose(result, weight, atol=0.1)
        assert torch.allclose(result.norm(dim=axis), weight.norm(dim=axis), rtol=1e-5)


class TestMismatch:
    wrong: ClassVar = [
        (oft(), (20, 16), "OFT gives [24], the weight is [20, 16]"),
        (oft(), (24,), "OFT gives [24], the weight is [24]"),
        (OftAdapter(rand(6, 4, 3, seed=1)), LINEAR, "OFT blocks must be (n, b, b), found [6, 4, 3]"),
        (oft(rescale=rand(20, 1, seed=1)), LINEAR, "rescale gives [20, 1], the weight is [24, 16]"),
        (PeftOftAdapter(rand(4, 5, seed=1)), LINEAR, "peft OFT must be (n, b * (b - 1) / 2), found [4, 5]"),
        (PeftOftAdapter(rand(4, 6, seed=1)), (24, 20), "peft OFT gives [16], the weight is [24, 20]"),
        (PeftOftAdapter(rand(1, 6, seed=1)), (24, 18), "peft OFT gives [4], the weight is [24, 18]"),
        (BoftAdapter(rand(3, 4, 6, 6, seed=1)), (32, 16), "BOFT gives [24], the weight is [32, 16]"),
        (BoftAdapter(rand(4, 4, 6, 6, seed=1)), LINEAR, "BOFT gives [24], the weight is [24, 16]"),
        (BoftAdapter(rand(1, 8, 3, 3, seed=1)), LINEAR, "BOFT blocks must have an even size, found [1, 8, 3, 3]"),
        (BoftAdapter(rand(4, 6, 6, seed=1)), LINEAR, "BOFT blocks must be (m, n, b, b), found [4, 6, 6]"),
        (
            PeftBoftAdapter(rand(1, 4, 4, 4, seed=1), rand(16, 1, seed=1)),
            LINEAR,
            "boft_s gives [16, 1], the weight is [24, 16]",
        ),
        (Ia3Adapter(rand(16, seed=1), on_input=False), LINEAR, "IA3 on the output gives [16], the weight is [24, 16]"),
        (Ia3Adapter(rand(24, seed=1), on_input=True), LINEAR, "IA3 on the input gives [24], the weight is [24, 16]"),
        (Ia3Adapter(rand(24, seed=1), on_input=True), (24,), "IA3 on the input gives [24], the weight is [24]"),
    ]

    @pytest.mark.parametrize(("adapter", "shape", "message"), wrong)
    def test_says_what_was_found_and_wanted(self, adapter, shape, message):
        with pytest.raises(LoraMismatchError) as caught:
            adapter.check(shape, may_expand=False)
        assert str(caught.value) == message


def test_dora_as_trained_agrees_with_the_host_on_the_input_axis_only():
    weight, delta = rand(*LINEAR, seed=9), rand(*LINEAR, seed=8, scale=0.3)
    columns, rows = rand(1, 16, seed=7).abs() + 1, rand(24, 1, seed=7).abs() + 1
    for strength in (1.0, 0.5):
        ours = decompose(weight.clone(), delta, columns, strength, None, as_trained=True)
        assert_same(ours, decompose(weight.clone(), delta, columns, strength, None), weight)
    trained = decompose(weight.clone(), delta, rows, 1.0, None, as_trained=True)
    # Rows of the trained weight are as long as the magnitude says; the host's are not.
    assert torch.allclose(trained.norm(dim=1, keepdim=True), rows, rtol=1e-5)
    assert not torch.allclose(decompose(weight.clone(), delta, rows, 1.0, None).norm(dim=1, keepdim=True), rows, 0.01)


def test_dora_as_trained_in_low_precision_and_with_a_function():
    weight, delta = rand(*LINEAR, seed=9).bfloat16(), rand(*LINEAR, seed=8, scale=0.3)
    rows = rand(24, seed=7).abs() + 1
    wanted = decompose(weight.float(), delta.flip(0), rows, 0.8, None, as_trained=True)
    result = decompose(weight.clone(), delta, rows, 0.8, lambda d: d.flip(0), as_trained=True)
    assert same_bits(result, wanted.bfloat16())
