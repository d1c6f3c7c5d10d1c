"""Tests for every adapter, whatever its kind; and stacks of host patches against the written-out reference."""

import torch

from lib_lora_guard.adapters import apply_terms, parse_term

from .from_keys import patched
from .make import host_value, rand
from .measure import assert_same, assert_same_and_faults_seen, same_bits
from .reference import merge_reference

LINEAR, CONV, SQUARE = (24, 16), (12, 8, 3, 3), (16, 16)


def entry(kind, shape, seed=1, strength=0.8, strength_model=1.0, offset=None, function=None, **more):
    """A host patch of `kind` for a weight of `shape`."""
    return [strength, host_value(kind, shape, seed, **more), strength_model, offset, function]


def run_on(weight):
    return lambda terms: apply_terms(weight.clone(), terms)


def assert_as_reference(entries, weight):
    """The stack fits, gives the reference in float64, and planted faults would be seen."""
    terms = [parse_term(e, {}) for e in entries]
    for term in terms:
        term.check(tuple(weight.shape), may_expand=False)
    assert_same_and_faults_seen(run_on(weight), terms, merge_reference(entries, weight), weight, limit=1e-10)


def assert_rounds_once_and_keeps_the_weight_at_0(adapter, shape):
    weight = rand(*shape, seed=9, scale=0.3)
    assert same_bits(patched(adapter, weight, 0.0), weight)
    for dtype in (torch.bfloat16, torch.float16):
        low = weight.to(dtype)
        result = patched(adapter, low, 0.8)
        assert result.dtype == dtype
        # Computed in fp32: equal to the fp32 result of the same weight, rounded to the dtype.
        assert same_bits(result, patched(adapter, low.float(), 0.8).to(dtype))
    double = patched(adapter, weight.double(), 0.8)
    assert double.dtype == torch.float64
    assert_same(patched(adapter, weight, 0.8), double, weight)


def assert_patches_a_part_in_place(adapter, shape):
    fused = rand(3 * shape[0], *shape[1:], seed=9, scale=0.3)
    whole = fused.clone()
    part = whole.narrow(0, shape[0], shape[0])
    result = adapter.patch(part, 0.8, None)
    wanted = patched(adapter, fused.narrow(0, shape[0], shape[0]), 0.8)
    assert torch.equal(result, wanted)
    assert torch.equal(part, wanted)
    assert torch.equal(whole[: shape[0]], fused[: shape[0]])


def assert_applies_a_function_to_the_delta(adapter, shape):
    weight = rand(*shape, seed=9, scale=0.3)
    delta = patched(adapter, weight, 0.8) - weight
    result = adapter.patch(weight.clone(), 0.8, lambda d: d.flip(0))
    assert torch.allclose(result - weight, delta.flip(0), atol=1e-6)


def assert_rows_are_those_of_the_whole(adapter, first, count, strength):
    """`first` and `count` in rows of a linear weight."""
    weight = rand(*LINEAR, seed=9, scale=0.3).double()
    part = adapter.rows(first, count)
    wanted = patched(adapter, weight, strength)[first : first + count]
    assert torch.allclose(patched(part, weight[first : first + count], strength), wanted, atol=1e-8)
