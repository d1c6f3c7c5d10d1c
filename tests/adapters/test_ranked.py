"""Alpha over rank, and a magnitude, on every kind that has them."""

import pytest
from support.adapter_contract import CONV, LINEAR, assert_as_reference, entry
from support.make import rand

from lib_lora_guard.adapters import parse_term


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize(
    ("kind", "shape"), [("lora", LINEAR), ("lora", CONV), ("loha", LINEAR), ("lokr", LINEAR), ("glora", LINEAR)]
)
def test_a_dora_of_every_ranked_kind_is_as_the_reference(kind, shape, axis):
    assert_as_reference([entry(kind, shape, dora=axis)], rand(*shape, seed=9).double())


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora"])
def test_only_an_adapter_with_a_magnitude_is_taken_as_trained(kind):
    plain = parse_term(entry(kind, LINEAR), {}).adapter
    dora = parse_term(entry(kind, LINEAR, dora="output"), {}).adapter
    assert (plain.is_dora, dora.is_dora) == (False, True)
    assert plain.with_dora_as_trained() is plain
    assert dora.with_dora_as_trained().as_trained


@pytest.mark.parametrize(("kind", "rank"), [("lora", 4), ("loha", 4), ("lokr", None), ("lokr_factors", 4)])
def test_scale_is_alpha_over_rank_or_1_without_either(kind, rank):
    adapter = parse_term(entry(kind, LINEAR, alpha=3.0), {}).adapter
    assert adapter.rank == rank
    assert adapter.scale == (1.0 if rank is None else 0.75)
    assert parse_term(entry(kind, LINEAR, alpha=None), {}).adapter.scale == 1.0


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora"])
def test_a_magnitude_costs_passes_in_fp32(kind):
    plain = parse_term(entry(kind, LINEAR), {}).adapter
    dora = parse_term(entry(kind, LINEAR, dora="output"), {}).adapter
    assert dora.patch_cost().in_fp32
    assert dora.patch_cost().passes >= plain.patch_cost().passes
    assert dora.forge_patch_cost().passes > plain.forge_patch_cost().passes
