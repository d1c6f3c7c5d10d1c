"""The cheap forms of a stack: one for each term or None, each in its place; and whether they pay."""

import pytest
from support.make import host_value

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.adapters.forms import Decomposed, KhatriRao, Kronecker, LowRank
from lib_lora_guard.planning.cheap import form_of, forms_of, pays

LINEAR = (24, 16)


def term(kind="lora", shape=LINEAR, offset=None, function=None, strength_model=1.0, **more):
    return parse_term([0.8, host_value(kind, shape, 1, **more), strength_model, offset, function], {})


def test_a_stack_has_one_form_for_each_term_in_order():
    forms = forms_of([term(), term("loha"), term("lokr"), term(dora="output")], LINEAR)
    assert [type(form) for form in forms] == [LowRank, KhatriRao, Kronecker, Decomposed]


def test_an_empty_stack_has_no_forms():
    assert forms_of([], LINEAR) == ()


def test_a_term_without_a_form_leaves_a_gap_in_its_place():
    first, second, third = forms_of([term(), term("glora"), term()], LINEAR)
    assert second is None
    assert None not in (first, third)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_dora_by_column_scales_the_input_and_so_must_be_first(is_first):
    by_column = term(dora="input")
    forms = forms_of([by_column] if is_first else [term(), by_column], LINEAR)
    assert (forms[-1] is not None) == is_first
    assert (form_of(by_column, LINEAR, is_first) is not None) == is_first


def test_factors_that_widen_the_weight_have_no_form():
    assert forms_of([term(shape=(24, 40))], LINEAR) == (None,)


def test_a_term_on_a_part_is_measured_by_that_part():
    assert None not in forms_of([term(shape=(8, 16), offset=(0, 8, 8))], LINEAR)
    assert forms_of([term(shape=(8, 16), offset=(0, 8, 16))], LINEAR) == (None,)


def test_a_function_that_reorders_rows_is_worked_into_the_factors_of_low_rank_terms_alone():
    plain, turned = term(), term(function=lambda delta: delta.flip(0))
    (form,), (flipped,) = forms_of([plain], LINEAR), forms_of([turned], LINEAR)
    assert (form.up.flip(0) == flipped.up).all()
    assert forms_of([term("loha", function=lambda delta: delta.flip(0))], LINEAR) == (None,)
    assert forms_of([term(function=lambda delta: 2 * delta)], LINEAR) == (None,)


@pytest.mark.parametrize(
    ("stack", "one_token", "many_tokens"),
    [
        ([term()], True, True),
        ([term("loha", rank=16)], True, True),
        ([term("loha", rank=17)], False, False),
        ([term("lokr")], True, False),
        ([term(), term("lokr")], True, False),
        ([], True, True),
    ],
)
def test_large_lohas_never_pay_and_lokrs_only_where_the_layer_sees_one_token(stack, one_token, many_tokens):
    forms = forms_of(stack, LINEAR)
    assert (pays(forms, one_token=True), pays(forms, one_token=False)) == (one_token, many_tokens)
