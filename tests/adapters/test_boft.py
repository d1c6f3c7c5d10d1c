"""BOFT of LyCORIS and of peft: what fits, single rows, low precision. The numbers: tests/references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import adapter_contract as contract
from support.from_keys import patched
from support.make import rand

from lib_lora_guard.adapters import BoftAdapter, PeftBoftAdapter
from lib_lora_guard.errors import LoraMismatchError

LINEAR, CONV = (24, 16), (24, 8, 3, 3)


def adapters(shape):
    columns = torch.Size(shape[1:]).numel()
    factor = 1 + rand(24, *[1] * (len(shape) - 1), seed=3, scale=0.3)
    return {
        "rows": BoftAdapter(rand(3, 4, 6, 6, seed=4, scale=0.1), alpha=0.02, rescale=factor),
        "columns": PeftBoftAdapter(rand(2, columns // 4, 4, 4, seed=5, scale=0.2), factor.reshape(24, 1)),
    }


@pytest.mark.parametrize("shape", [LINEAR, CONV])
@pytest.mark.parametrize("name", ["rows", "columns"])
class TestContract:
    def test_strength_0_is_the_weight_and_low_precision_is_rounded_once(self, name, shape):
        contract.assert_rounds_once_and_keeps_the_weight_at_0(adapters(shape)[name], shape)

    def test_a_part_of_a_larger_weight_is_patched_in_place(self, name, shape):
        contract.assert_patches_a_part_in_place(adapters(shape)[name], shape)

    def test_a_function_of_the_host_is_applied_to_the_delta(self, name, shape):
        contract.assert_applies_a_function_to_the_delta(adapters(shape)[name], shape)


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 5), length=st.integers(1, 6), strength=st.floats(-1.5, 1.5))
def test_rows_alone_are_what_they_are_in_the_whole_where_columns_are_turned(start, length, strength):
    adapter = adapters(LINEAR)["columns"]
    contract.assert_rows_are_those_of_the_whole(adapter, 4 * start, 4 * min(length, 6 - start), strength)


@pytest.mark.parametrize(("first", "count"), [(0, 4), (4, 8), (0, 24)])
def test_rows_that_are_turned_together_have_no_adapter_of_their_own(first, count):
    assert adapters(LINEAR)["rows"].rows(first, count) is None


@pytest.mark.parametrize(
    "adapter",
    [BoftAdapter(rand(3, 4, 6, 6, seed=4)), PeftBoftAdapter(rand(3, 4, 4, 4, seed=5))],
    ids=["rows", "columns"],
)
def test_a_rotation_keeps_the_length_of_what_it_turns(adapter):
    weight = rand(*LINEAR, seed=9)
    axis = 0 if isinstance(adapter, BoftAdapter) else 1
    result = patched(adapter, weight, 1.0)
    assert not torch.allclose(result, weight, atol=0.1)
    assert torch.allclose(result.norm(dim=axis), weight.norm(dim=axis), rtol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "shape", "message"),
    [
        (BoftAdapter(rand(3, 4, 6, 6, seed=1)), (32, 16), "BOFT gives [24], the weight is [32, 16]"),
        (BoftAdapter(rand(4, 4, 6, 6, seed=1)), LINEAR, "BOFT gives [24], the weight is [24, 16]"),
        (BoftAdapter(rand(1, 8, 3, 3, seed=1)), LINEAR, "BOFT blocks must have an even size, found [1, 8, 3, 3]"),
        (BoftAdapter(rand(4, 6, 6, seed=1)), LINEAR, "BOFT blocks must be (m, n, b, b), found [4, 6, 6]"),
        (
            PeftBoftAdapter(rand(1, 4, 4, 4, seed=1), rand(16, 1, seed=1)),
            LINEAR,
            "boft_s gives [16, 1], the weight is [24, 16]",
        ),
    ],
)
def test_a_mismatch_says_what_was_found_and_wanted(adapter, shape, message):
    with pytest.raises(LoraMismatchError) as caught:
        adapter.check(shape, may_expand=False)
    assert str(caught.value) == message
