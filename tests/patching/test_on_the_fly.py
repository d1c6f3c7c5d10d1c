"""A stack on the temporary weight of a forward pass: in place where that is safe, never in the parameter."""

import dataclasses

import pytest
import torch
from patching.terms import term
from support.make import rand
from support.measure import same_bits

from lib_lora_guard.adapters import apply_terms
from lib_lora_guard.errors import LayerError
from lib_lora_guard.hosts.forge.raw_weights import ForgeWeight
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching import on_the_fly
from lib_lora_guard.patching.access import plain_bias
from lib_lora_guard.patching.forward_program import lokr_pass
from lib_lora_guard.patching.fused import Fused
from lib_lora_guard.patching.on_the_fly import WeightTerms
from lib_lora_guard.planning.cheap import forms_of

SHAPE = (8, 6)


@pytest.fixture
def stack():
    return [term("lora", SHAPE, 1), term("loha", SHAPE, 2, -0.4)]


def test_a_temporary_weight_is_changed_in_place(stack):
    parameter = rand(*SHAPE, seed=5)
    weight = parameter.clone()
    patched = WeightTerms("k", stack).apply(weight, parameter)
    assert patched is weight
    assert same_bits(patched, apply_terms(parameter.clone(), stack))


@pytest.mark.parametrize("view", [lambda p: p, lambda p: p[:], lambda p: p.t().t()], ids=["itself", "slice", "view"])
def test_a_weight_that_shares_the_memory_of_the_parameter_is_copied(stack, view):
    parameter = rand(*SHAPE, seed=5)
    before = parameter.clone()
    patched = WeightTerms("k", stack).apply(view(parameter), parameter)
    assert same_bits(patched, apply_terms(before.clone(), stack))
    assert same_bits(parameter, before)


def test_other_strengths_count_at_the_next_call(stack):
    terms, base = WeightTerms("k", stack), rand(*SHAPE, seed=5)
    terms.apply(base.clone(), None)
    weaker = [dataclasses.replace(one, strength=one.strength / 2) for one in stack]
    terms.exchange(weaker)
    assert same_bits(terms.apply(base.clone(), None), apply_terms(base.clone(), weaker))


def test_device_copies_are_made_once_and_dropped(stack):
    """The meta device stands for a card; its copies have no values."""
    terms, weight = WeightTerms("k", stack), torch.empty(SHAPE, device="meta")
    assert not terms.is_resident
    terms.apply(weight, None)
    (made,) = terms._adapters._values.values()
    terms.exchange(stack)
    terms.apply(weight, None)
    assert list(terms._adapters._values.values()) == [made], "another strength moves no factor"
    assert terms.device_bytes == sum(one.adapter.bytes for one in stack)
    terms.drop_device_copies()
    assert not terms.is_resident


def test_the_error_when_memory_ends_names_the_layer(stack, monkeypatch):
    def no_memory(weight, terms):
        raise OutOfMemory[0]("planted")

    monkeypatch.setattr(on_the_fly, "apply_terms", no_memory)
    with pytest.raises(LayerError, match=r"^blocks\.0\.weight: "):
        WeightTerms("blocks.0.weight", stack).apply(rand(*SHAPE, seed=5), None)


def test_terms_that_a_call_is_about_to_keep_are_not_kept_beyond_an_exchange(stack, monkeypatch):
    """In another thread; the meta device stands for a card."""
    terms, weight = WeightTerms("k", stack), torch.empty(SHAPE, device="meta")
    others = [dataclasses.replace(one, strength=2 * one.strength) for one in stack]
    applied, make = [], WeightTerms._on

    def exchanged_meanwhile(self, *on):
        made = make(self, *on)
        self.exchange(others)
        return made

    monkeypatch.setattr(on_the_fly, "apply_terms", lambda weight, on: applied.append([t.strength for t in on]))
    monkeypatch.setattr(WeightTerms, "_on", exchanged_meanwhile)
    terms.apply(weight, None)
    monkeypatch.setattr(WeightTerms, "_on", make)
    terms.apply(weight, None)
    assert applied == [[one.strength for one in stack], [one.strength for one in others]]


@pytest.mark.parametrize(("kind", "strength"), [("lokr", 0.8), ("lokr_factors", -0.4), ("lokr_left", 0.0)])
def test_the_sides_of_a_lokr_are_what_its_terms_add_and_a_device_has_one_copy(kind, strength):
    shape = (24, 16)
    stack, weight = [term(kind, shape, 3, strength)], rand(24, 16, seed=5)
    terms = WeightTerms("k", stack)
    left, right, factor = terms.sides_on(weight.device, weight.dtype)
    added = terms.apply(weight.clone(), None) - weight
    assert (added - factor * torch.kron(left, right)).abs().max() <= 1e-6
    assert (added.abs().max() > 0.02) == (strength != 0.0)
    terms.exchange([dataclasses.replace(stack[0], strength=0.5)])
    assert terms.sides_on(weight.device, weight.dtype)[2] == pytest.approx(0.5 * stack[0].adapter.scale)
    # The meta device stands for a card.
    card = torch.device("meta")
    terms.apply(torch.empty(shape, device=card), None)
    (copies,) = terms._adapters._values.values()
    sides = terms.sides_on(card, torch.float32)
    assert list(terms._adapters._values.values()) == [copies]
    whole = [one for one in (copies[0].w1, copies[0].w2) if one is not None]
    assert all(any(side._base is one or side is one for side in sides[:2]) for one in whole), (
        "no copy in the same dtype"
    )


def test_the_short_way_of_terms_keeps_nothing_on_a_device_that_is_left():
    shape, card = (24, 16), torch.device("meta")
    stack = [dataclasses.replace(term("lokr", shape, 3), strength_model=0.9)]
    terms = WeightTerms("k", stack)
    one_pass = lokr_pass(stack, forms_of(stack, shape), shape, plain_bias)
    terms.fused = Fused(ForgeWeight(lambda: False), one_pass)
    sides = terms.fused._change(one_pass, 24, card, torch.bfloat16, terms)
    assert (sides.left.device, sides.right.shape, sides.row_scale.shape) == (card, (12, 8), (24,))
    assert terms.is_resident
    assert len(one_pass.row_scale._copies) == 1
    assert not one_pass.product.is_resident, "the copies are those of the terms"
    terms.drop_device_copies()
    assert not terms.is_resident
    assert len(one_pass.row_scale._copies) == len(one_pass.row_scale._of_rows) == 0
