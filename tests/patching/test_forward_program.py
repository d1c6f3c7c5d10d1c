"""Several cheap forms on one weight, in order and on parts of it, against the patched weight computed apart."""

import pytest
import torch
from patching.patched_layers import CONV, LINEAR, check, entry, make_input, make_layer

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.patching.bypass import Bypass


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=str)
def test_adapters_of_several_kinds_apply_in_their_order(shape):
    stack = [
        entry("lora", shape, 1, 0.6),
        entry("lora", shape, 2, 0.9, dora="output"),
        entry("loha", shape, 3, -0.4, rank=2),
        entry("lora", shape, 4, 0.7, model=0.8),
        entry("lokr", shape, 5, 0.3),
    ]
    check(make_layer(shape), stack, make_input(shape))
    check(make_layer(shape), [stack[1], stack[1], stack[3]], make_input(shape))
    check(make_layer(shape), [entry("lora", shape, 2, 0.5, dora="input"), *stack[2:]], make_input(shape))


def test_adapters_on_parts_of_the_output_and_of_the_input():
    stack = [
        entry("lora", (8, 16), 1, 0.6, (0, 8, 8), dora="output"),
        entry("lokr", (8, 16), 2, 0.9, (0, 16, 8)),
        entry("loha", (8, 16), 3, 0.9, (0, 0, 8), rank=2),
        entry("lokr", (24, 8), 4, 0.5, (1, 8, 8)),
        entry("loha", (24, 8), 5, 0.5, (1, 4, 8), rank=2),
        entry("lora", (8, 16), 6, 0.5, (0, 4, 8), model=0.6),
    ]
    for item in stack:
        check(make_layer(LINEAR), [item], make_input(LINEAR))
    check(make_layer(LINEAR), stack, make_input(LINEAR))
    parts = [entry("lokr", (4, 8, 3, 3), 1, 0.6, (0, 4, 4)), entry("loha", (12, 4, 3, 3), 2, 0.6, (1, 2, 4), rank=2)]
    check(make_layer(CONV), parts, make_input(CONV))


def test_a_term_without_a_cheap_form_raises():
    with pytest.raises(TypeError, match="a term of kind 'glora' has no cheap form"):
        Bypass("k", (parse_term(entry("glora", LINEAR), {}),), LINEAR)
