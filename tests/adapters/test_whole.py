"""Whole tensors: differences, replacements, nested stacks, another extension's kinds."""

import pytest
import torch
from support.adapter_contract import CONV, LINEAR, assert_as_reference, entry, run_on
from support.make import rand
from support.measure import assert_same
from support.reference import merge_reference

from lib_lora_guard.adapters import apply_terms, parse_term


@pytest.mark.parametrize(("kind", "shape"), [("diff", LINEAR), ("diff", CONV), ("nested", LINEAR)])
def test_a_whole_tensor_alone_is_as_the_reference(kind, shape):
    assert_as_reference([entry(kind, shape)], rand(*shape, seed=9).double())


def test_a_replacement_ignores_the_strength():
    weight = rand(*LINEAR, seed=9).double()
    wanted = entry("set", LINEAR, strength=0.1)
    assert torch.equal(run_on(weight)([parse_term(wanted, {})]), wanted[1][1][0].double())


def test_a_nested_patch_can_be_applied_again_and_again():
    weight = rand(*LINEAR, seed=9).double()
    terms = [parse_term(entry("nested", LINEAR), {})]
    assert torch.equal(run_on(weight)(terms), run_on(weight)(terms))


def test_a_difference_may_have_ones_at_the_end_of_its_shape():
    weight, diff = rand(8, 6, seed=1), rand(8, 6, 1, 1, seed=2)
    term = parse_term([0.5, (diff,), 1.0, None, None], {})
    term.check((8, 6), may_expand=False)
    assert torch.allclose(apply_terms(weight.clone(), [term]), weight + 0.5 * diff[:, :, 0, 0])


def test_an_inpainting_difference_grows_a_convolution():
    weight, diff = rand(8, 4, 3, 3, seed=1), rand(8, 9, 3, 3, seed=2)
    patched = apply_terms(weight.clone(), [parse_term([1.0, (diff,), 1.0, None, None], {})])
    assert patched.shape == (8, 9, 3, 3)
    assert torch.allclose(patched[:, :4], weight + diff[:, :4])
    assert torch.allclose(patched[:, 4:], diff[:, 4:])


def test_a_kind_of_another_extension_is_calculated_by_that_extension():
    calculators = {"theirs": lambda weight, strength, v: weight + strength * v[0].to(weight)}
    value = rand(*LINEAR, seed=3)
    weight = rand(*LINEAR, seed=9).double()
    entries = [[0.5, ("theirs", (value,)), 1.0, None, None]]
    assert_same(
        run_on(weight)([parse_term(e, calculators) for e in entries]),
        merge_reference(entries, weight, calculators),
        weight,
        1e-12,
    )
