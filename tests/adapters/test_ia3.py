"""IA3 on rows and on columns: what fits, single rows, low precision. The numbers: tests/references."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import adapter_contract as contract
from support.make import rand

from lib_lora_guard.adapters import Ia3Adapter
from lib_lora_guard.errors import LoraMismatchError

LINEAR, CONV = (24, 16), (24, 8, 3, 3)


def adapters(shape):
    columns = 1 + rand(1, shape[1], *[1] * (len(shape) - 2), seed=7, scale=0.2)
    return {
        "rows": Ia3Adapter(rand(24, seed=6, scale=0.2), on_input=False),
        "columns": Ia3Adapter(columns, on_input=True, centre=1.0),
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


@pytest.mark.parametrize("name", ["rows", "columns"])
@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 5), length=st.integers(1, 6), strength=st.floats(-1.5, 1.5))
def test_rows_alone_are_what_they_are_in_the_whole(name, start, length, strength):
    contract.assert_rows_are_those_of_the_whole(adapters(LINEAR)[name], 4 * start, 4 * min(length, 6 - start), strength)


@pytest.mark.parametrize(
    ("adapter", "shape", "message"),
    [
        (Ia3Adapter(rand(16, seed=1), on_input=False), LINEAR, "IA3 on the output gives [16], the weight is [24, 16]"),
        (Ia3Adapter(rand(24, seed=1), on_input=True), LINEAR, "IA3 on the input gives [24], the weight is [24, 16]"),
        (Ia3Adapter(rand(24, seed=1), on_input=True), (24,), "IA3 on the input gives [24], the weight is [24]"),
    ],
)
def test_a_mismatch_says_what_was_found_and_wanted(adapter, shape, message):
    with pytest.raises(LoraMismatchError) as caught:
        adapter.check(shape, may_expand=False)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("on_input", "centre", "covers"), [(False, 1.0, True), (True, 1.0, False), (False, 0.0, False)]
)
def test_only_pefts_factors_of_the_output_are_for_the_bias_too(on_input, centre, covers):
    assert Ia3Adapter(rand(24, seed=1), on_input, centre).covers_bias == covers
