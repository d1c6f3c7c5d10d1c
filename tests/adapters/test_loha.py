"""LoHa, with and without Tucker cores, against the written-out reference."""

import pytest
from support.adapter_contract import CONV, LINEAR, assert_as_reference, entry
from support.make import rand


@pytest.mark.parametrize(
    ("kind", "shape"), [("loha", LINEAR), ("loha", CONV), ("loha_mid", CONV), ("loha_plain", LINEAR)]
)
def test_a_loha_alone_is_as_the_reference(kind, shape):
    assert_as_reference([entry(kind, shape)], rand(*shape, seed=9).double())
