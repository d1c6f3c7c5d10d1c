"""GLoRA in its two layouts against the written-out reference."""

import pytest
from support.adapter_contract import CONV, LINEAR, SQUARE, assert_as_reference, entry
from support.make import rand


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("glora", LINEAR), ("glora", SQUARE), ("glora_old", LINEAR), ("glora_old", SQUARE), ("glora_conv", CONV)],
)
def test_a_glora_alone_is_as_the_reference(kind, shape):
    assert_as_reference([entry(kind, shape)], rand(*shape, seed=9).double())
