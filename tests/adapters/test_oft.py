"""OFT of LyCORIS and of peft: what fits, single rows, low precision. The numbers: tests/references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import adapter_contract as contract
from support.from_keys import patched
from support.make import rand

from lib_lora_guard.adapters import OftAdapter, PeftOftAdapter
from lib_lora_guard.errors import LoraMismatchError

LINEAR, CONV = (24, 16), (24, 8, 3, 3)


def oft(**more):
    return OftAdapter(rand(6, 4, 4, seed=1, scale=0.2), **more)


def adapters(shape):
    columns = torch.Size(shape[1:]).numel()
    factor = 1 + rand(24, *[1] * (len(shape) - 1), seed=3, scale=0.3)
    return {
        "rows": oft(),
        "rows, bounded": oft(alpha=0.02, rescale=factor),
        "columns": PeftOftAdapter(rand(columns // 4, 6, seed=2, scale=0.2)),
        "columns, one block for all": PeftOftAdapter(rand(1, 6, seed=2, scale=0.2), terms=None),
    }


@pytest.mark.parametrize("shape", [LINEAR, CONV])
@pytest.mark.parametrize("name", adapters(LINEAR))
class TestContract:
    def test_strength_0_is_the_weight_and_low_precision_is_rounded_once(self, name, shape):
        contract.assert_rounds_once_and_keeps_the_weight_at_0(adapters(shape)[name], shape)

    def test_a_part_of_a_larger_weight_is_patched_in_place(self, name, shape):
        contract.assert_patches_a_part_in_place(adapters(shape)[name], shape)

    def test_a_function_of_the_host_is_applied_to_the_delta(self, name, shape):
        contract.assert_applies_a_function_to_the_delta(adapters(shape)[name], shape)


@pytest.mark.parametrize("name", adapters(LINEAR))
@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 5), length=st.integers(1, 6), strength=st.floats(-1.5, 1.5))
def test_rows_alone_are_what_they_are_in_the_whole(name, start, length, strength):
    contract.assert_rows_are_those_of_the_whole(adapters(LINEAR)[name], 4 * start, 4 * min(length, 6 - start), strength)


def test_rows_that_cut_a_block_have_no_adapter():
    assert oft().rows(2, 4) is None
    assert oft().rows(4, 6) is None


@pytest.mark.parametrize("adapter", [oft(), PeftOftAdapter(rand(4, 6, seed=2), terms=None)], ids=["rows", "columns"])
def test_a_rotation_keeps_the_length_of_what_it_turns(adapter):
    weight = rand(*LINEAR, seed=9)
    axis = 0 if isinstance(adapter, OftAdapter) else 1
    result = patched(adapter, weight, 1.0)
    assert not torch.allclose(result, weight, atol=0.1)
    assert torch.allclose(result.norm(dim=axis), weight.norm(dim=axis), rtol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "shape", "message"),
    [
        (oft(), (20, 16), "OFT gives [24], the weight is [20, 16]"),
        (oft(), (24,), "OFT gives [24], the weight is [24]"),
        (OftAdapter(rand(6, 4, 3, seed=1)), LINEAR, "OFT blocks must be (n, b, b), found [6, 4, 3]"),
        (oft(rescale=rand(20, 1, seed=1)), LINEAR, "rescale gives [20, 1], the weight is [24, 16]"),
        (PeftOftAdapter(rand(4, 5, seed=1)), LINEAR, "peft OFT must be (n, b * (b - 1) / 2), found [4, 5]"),
        (PeftOftAdapter(rand(4, 6, seed=1)), (24, 20), "peft OFT gives [16], the weight is [24, 20]"),
        (PeftOftAdapter(rand(1, 6, seed=1)), (24, 18), "peft OFT gives [4], the weight is [24, 18]"),
    ],
)
def test_a_mismatch_says_what_was_found_and_wanted(adapter, shape, message):
    with pytest.raises(LoraMismatchError) as caught:
        adapter.check(shape, may_expand=False)
    assert str(caught.value) == message
