"""Adapters of every kind as terms of a stack: order, parts, strengths, functions, shapes, identity."""

import copy

import pytest
import torch
from support.adapter_contract import CONV, LINEAR, assert_as_reference, entry, run_on
from support.make import host_value, rand
from support.measure import assert_same
from support.reference import merge_reference

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.adapters.base import check_values, own_copy
from lib_lora_guard.errors import LoraMismatchError

ADDITIVE = [
    ("lora", LINEAR),
    ("lora", CONV),
    ("lora_mid", CONV),
    ("loha", LINEAR),
    ("loha", CONV),
    ("loha_mid", CONV),
    ("lokr", LINEAR),
    ("lokr", CONV),
    ("lokr_factors", LINEAR),
    ("lokr_mid", CONV),
    ("diff", LINEAR),
    ("diff", CONV),
]
OTHERS = [("glora", LINEAR), ("set", LINEAR), ("nested", LINEAR)]


@pytest.mark.parametrize(("kind", "shape"), [*ADDITIVE, ("glora", LINEAR)])
def test_the_model_strength_scales_the_weight_before_the_change(kind, shape):
    assert_as_reference([entry(kind, shape, strength_model=0.5)], rand(*shape, seed=9).double())


@pytest.mark.parametrize("offset", [(0, 8, 8), (1, 4, 8)])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff", "glora"])
def test_an_offset_changes_only_its_part(kind, offset):
    shape = (8, LINEAR[1]) if offset[0] == 0 else (LINEAR[0], 8)
    weight = rand(*LINEAR, seed=9).double()
    wanted = entry(kind, shape, offset=offset)
    assert_as_reference([wanted], weight)
    patched = run_on(weight)([parse_term(wanted, {})])
    rest = [i for i in range(weight.shape[offset[0]]) if not offset[1] <= i < offset[1] + offset[2]]
    assert torch.equal(
        patched.index_select(offset[0], torch.tensor(rest)), weight.index_select(offset[0], torch.tensor(rest))
    )


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora"])
def test_a_function_of_the_host_is_applied_to_the_delta(kind):
    assert_as_reference([entry(kind, LINEAR, function=lambda d: d.flip(0))], rand(*LINEAR, seed=9).double())


def test_a_stack_is_applied_in_order():
    stack = [
        entry("lora", LINEAR, 1),
        entry("glora", LINEAR, 2),
        entry("diff", LINEAR, 3),
        entry("loha", LINEAR, 4, dora="output"),
        entry("lokr", LINEAR, 5),
    ]
    weight = rand(*LINEAR, seed=9).double()
    assert_as_reference(stack, weight)
    # GLoRA and DoRA look at the weight, so another order is another result: the test above is able to see it.
    with pytest.raises(AssertionError, match="contribution"):
        assert_same(
            run_on(weight)([parse_term(e, {}) for e in reversed(stack)]), merge_reference(stack, weight), weight, 1e-3
        )


@pytest.mark.parametrize(
    ("kind", "made_for", "applied_to", "message"),
    [
        ("lora", (24, 16), (24, 32), r"up @ down gives \[24, 16\], the weight is \[24, 32\]"),
        ("lora", (24, 16), (16, 24), r"up @ down gives \[24, 16\]"),
        ("lora_mid", CONV, (12, 8, 5, 5), r"up @ down gives \[12, 72\]"),
        ("loha", (24, 16), (24, 32), r"LoHa gives \[24, 16\]"),
        ("lokr", (24, 16), (24, 32), r"LoKr gives \[24, 16\]"),
        ("lokr_factors", (24, 16), (12, 16), r"LoKr gives \[24, 16\]"),
        ("glora", (24, 16), (24, 32), r"GLoRA"),
        ("diff", (24, 16), (24, 32), r"diff gives \[24, 16\]"),
        ("set", (24, 16), (24, 32), r"set gives \[24, 16\]"),
        ("nested", (24, 16), (24, 32), r"nested patch gives \[24, 16\]"),
    ],
)
def test_a_wrong_shape_is_named_before_anything_is_computed(kind, made_for, applied_to, message):
    term = parse_term(entry(kind, made_for), {})
    with pytest.raises(LoraMismatchError, match=message):
        term.check(applied_to, may_expand=False)


@pytest.mark.parametrize("offset", [(0, 20, 8), (2, 0, 4), (0, -1, 4), (0, 0, 0)])
def test_an_offset_outside_the_weight_is_refused(offset):
    with pytest.raises(LoraMismatchError, match="addresses entries"):
        parse_term(entry("lora", (8, 16), offset=offset), {}).check(LINEAR, may_expand=False)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e31])
@pytest.mark.parametrize("place", ["strength", "strength_model"])
def test_a_strength_that_is_no_usable_number_is_refused(place, number):
    with pytest.raises(LoraMismatchError, match="not a usable number"):
        parse_term(entry("lora", LINEAR, **{place: number}), {}).check(LINEAR, may_expand=False)


@pytest.mark.parametrize(("kind", "shape"), [*ADDITIVE, *OTHERS])
def test_converting_an_adapter_converts_every_tensor_and_its_bytes_are_counted(kind, shape):
    adapter = parse_term(entry(kind, shape), {}).adapter
    half = adapter.map(lambda t: t.half())
    assert all(t.dtype == torch.float16 for t in half.tensors())
    assert half.bytes * 2 == adapter.bytes > 0


def test_terms_are_the_same_only_with_the_same_tensors_and_numbers():
    value = host_value("lora", LINEAR, 1)
    term = parse_term([0.8, value, 1.0, None, None], {})
    assert term.identity() == parse_term([0.8, value, 1.0, None, None], {}).identity()
    assert term.identity() != parse_term([0.9, value, 1.0, None, None], {}).identity()
    assert term.identity() != parse_term([0.8, host_value("lora", LINEAR, 1), 1.0, None, None], {}).identity()


def test_a_copy_shares_no_memory_and_refuses_values_that_are_not_finite():
    tensor = rand(4, 4, seed=1)
    copy = own_copy(tensor)
    tensor.zero_()
    assert copy.abs().sum() > 0
    tensor[0, 0] = float("nan")
    with pytest.raises(LoraMismatchError, match="not finite"):
        own_copy(tensor)


def test_integers_are_values_only_where_they_are_allowed():
    check_values(torch.ones(2, dtype=torch.int64), whole_numbers=True)
    with pytest.raises(LoraMismatchError, match=r"torch\.int64"):
        check_values(torch.ones(2, dtype=torch.int64))


def test_a_deep_copy_has_an_identity_of_its_own():
    # Tensors that come to lie where the first one's were must not count as those of the copy.
    adapter = parse_term([1.0, host_value("lora", LINEAR, 1), 1.0, None, None], {}).adapter
    known = adapter.known_identity
    copied = copy.deepcopy(adapter)
    assert copied.known_identity == copied.identity() != known
    assert (copied.bytes, adapter.known_identity) == (adapter.bytes, known)
    assert all(map(torch.equal, copied.tensors(), adapter.tensors()))
