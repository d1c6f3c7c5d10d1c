"""The bound on a rotation's skew matrices, and its two transforms."""

import dataclasses

import pytest
import torch
from support.from_keys import patched
from support.make import rand
from support.measure import assert_same

from lib_lora_guard.adapters import OftAdapter
from lib_lora_guard.adapters.rotations import cayley_less_one, series_less_one, skew_of

LINEAR = (24, 16)


def oft(**more):
    return OftAdapter(rand(6, 4, 4, seed=1, scale=0.2), **more)


def test_the_bound_counts_all_blocks():
    weight = rand(*LINEAR, seed=9)
    free = oft()
    skew = free.blocks - free.blocks.mT
    above = float(skew.norm()) / 24 * 1.01
    assert torch.equal(patched(oft(alpha=above), weight, 1.0), patched(free, weight, 1.0))
    halved = dataclasses.replace(free, blocks=free.blocks / 2)
    bound = oft(alpha=float(skew.norm()) / 48)
    assert_same(patched(bound, weight, 1.0), patched(halved, weight, 1.0), weight)


def test_the_exact_transform_of_a_skew_matrix_is_a_rotation():
    turn = cayley_less_one(skew_of(rand(3, 4, 4, seed=1)).double()) + torch.eye(4, dtype=torch.float64)
    assert torch.allclose(turn @ turn.mT, torch.eye(4, dtype=torch.float64).expand(3, 4, 4), atol=1e-12)


@pytest.mark.parametrize("terms", [4, 6, 8])
def test_the_series_comes_near_the_exact_transform_of_a_small_skew_matrix(terms):
    skew = skew_of(rand(3, 4, 4, seed=1, scale=0.02)).double()
    exact = cayley_less_one(skew)
    assert float((series_less_one(skew, terms) - exact).norm() / exact.norm()) < 0.01


def test_a_series_without_a_term_turns_nothing():
    assert not series_less_one(skew_of(rand(3, 4, 4, seed=1)), 1).any()
