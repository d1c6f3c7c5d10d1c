"""DoRA's magnitude step, as the host and as the trainers mean it. Their own numbers: tests/references."""

import pytest
import torch
from support.adapter_contract import LINEAR
from support.make import rand
from support.measure import assert_same, same_bits
from support.reference import merge_reference

from lib_lora_guard.adapters import apply_terms, parse_term
from lib_lora_guard.adapters.dora import decompose


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_on_a_16_bit_weight_is_rounded_once(dtype, axis):
    """Magnitudes near the norms, as training leaves them: one step of bf16 at 1.0 is more than what they change."""
    weight = rand(64, 96, seed=1, scale=0.02).to(dtype)
    up, down = rand(64, 4, seed=2, scale=0.01), rand(4, 96, seed=3, scale=0.01)
    norms = weight.double().norm(dim=1 if axis == "output" else 0, keepdim=True)
    magnitude = (norms * (1 + 0.005 * rand(*norms.shape, seed=4).double())).float()
    entries = [[1.0, ("lora", (up, down, 4.0, None, magnitude)), 1.0, None, None]]
    true = merge_reference(entries, weight.double())
    found = apply_terms(weight.clone(), [parse_term(entries[0], {})])
    once = (true.to(dtype).double() - true).norm()
    # The product of the factors is rounded before; it is small, so it adds little.
    assert float((found.double() - true).norm() / once) <= 1.1


def test_the_trainers_agree_with_the_host_on_the_input_axis_only():
    weight, delta = rand(*LINEAR, seed=9), rand(*LINEAR, seed=8, scale=0.3)
    columns, rows = rand(1, 16, seed=7).abs() + 1, rand(24, 1, seed=7).abs() + 1
    for strength in (1.0, 0.5):
        ours = decompose(weight.clone(), delta, columns, strength, None, as_trained=True)
        assert_same(ours, decompose(weight.clone(), delta, columns, strength, None), weight)
    trained = decompose(weight.clone(), delta, rows, 1.0, None, as_trained=True)
    # Rows of the trained weight are as long as the magnitude says; the host's are not.
    assert torch.allclose(trained.norm(dim=1, keepdim=True), rows, rtol=1e-5)
    assert not torch.allclose(decompose(weight.clone(), delta, rows, 1.0, None).norm(dim=1, keepdim=True), rows, 0.01)


def test_as_trained_a_16_bit_weight_is_rounded_once_with_the_function_on_the_delta():
    weight, delta = rand(*LINEAR, seed=9).bfloat16(), rand(*LINEAR, seed=8, scale=0.3)
    rows = rand(24, seed=7).abs() + 1
    wanted = decompose(weight.float(), delta.flip(0), rows, 0.8, None, as_trained=True)
    result = decompose(weight.clone(), delta, rows, 0.8, lambda d: d.flip(0), as_trained=True)
    assert same_bits(result, wanted.bfloat16())
