"""LoKr with whole, factorised and Tucker sides, against the written-out reference."""

import pytest
from support.adapter_contract import CONV, LINEAR, assert_as_reference, entry
from support.make import rand

from lib_lora_guard.adapters import LokrAdapter, parse_term


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("lokr", LINEAR), ("lokr", CONV), ("lokr_factors", LINEAR), ("lokr_mid", CONV), ("lokr_left", LINEAR)],
)
def test_a_lokr_alone_is_as_the_reference(kind, shape):
    assert_as_reference([entry(kind, shape)], rand(*shape, seed=9).double())


def test_alpha_is_divided_by_the_rank_of_a_factorised_side_the_second_before_the_first():
    def sides(first, second):
        return {"w1a": rand(2, first, seed=1), "w1b": rand(first, 2, seed=2), "w2a": rand(12, second, seed=3), "w2b": rand(second, 8, seed=4)}  # fmt: skip

    assert LokrAdapter(**sides(3, 4), alpha=2.0).scale == 0.5
    assert LokrAdapter(w2=rand(12, 8, seed=5), w1a=rand(2, 5, seed=1), w1b=rand(5, 2, seed=2), alpha=2.0).scale == 0.4
    assert parse_term(entry("lokr", LINEAR), {}).adapter.scale == 1.0


def test_rows_that_cut_a_block_of_the_product_have_no_adapter():
    adapter = parse_term(entry("lokr", LINEAR), {}).adapter
    assert adapter.rows(12, 12) is not None
    assert adapter.rows(6, 12) is None
    assert adapter.rows(12, 6) is None
