"""LoRA, LoCon and Tucker LoCon against the written-out reference, and the widening of an input projection."""

import pytest
import torch
from support.adapter_contract import CONV, LINEAR, assert_as_reference, entry
from support.make import host_value, rand
from support.measure import assert_same

from lib_lora_guard.adapters import LoraAdapter, Term, apply_terms, parse_term
from lib_lora_guard.errors import LoraMismatchError


@pytest.mark.parametrize(("kind", "shape"), [("lora", LINEAR), ("lora", CONV), ("lora_mid", CONV)])
def test_a_lora_alone_is_as_the_reference(kind, shape):
    assert_as_reference([entry(kind, shape)], rand(*shape, seed=9).double())


def test_flux_tools_lora_widens_an_input_projection():
    weight = rand(24, 16, seed=9).double()
    term = parse_term(entry("lora", (24, 40)), {})
    term.check((24, 16), may_expand=True)
    patched = apply_terms(weight.clone(), [term])
    up, down, alpha = term.adapter.up.double(), term.adapter.down.double(), 2.0
    wanted = torch.cat([weight, torch.zeros(24, 24, dtype=torch.double)], 1) + 0.8 * (alpha / 4) * up @ down
    assert patched.shape == (24, 40)
    assert_same(patched, wanted, torch.cat([weight, torch.zeros(24, 24, dtype=torch.double)], 1), 1e-12)
    with pytest.raises(LoraMismatchError, match=r"gives \[24, 40\], the weight is \[24, 16\]"):
        term.check((24, 16), may_expand=False)


def test_a_widening_dora_may_scale_the_columns_it_brings():
    value = host_value("lora", (24, 40), 1, dora="input")
    parse_term([1.0, value, 1.0, None, None], {}).check((24, 16), may_expand=True)


def test_factors_of_zero_rank_are_refused():
    term = parse_term([1.0, ("lora", (torch.zeros(24, 0), torch.zeros(0, 16), 1.0, None, None)), 1.0, None, None], {})
    with pytest.raises(LoraMismatchError, match="no pair of matrices"):
        term.check(LINEAR, may_expand=False)


@pytest.mark.parametrize("magnitude", [None, "rows", "columns"])
def test_rows_of_a_lora_are_its_rows_alone_unless_columns_are_normed(magnitude):
    size = {"rows": (24, 1), "columns": (1, 16)}.get(magnitude)
    scale = None if size is None else rand(*size, seed=3).abs() + 1
    adapter = LoraAdapter(rand(24, 4, seed=1), rand(4, 16, seed=2), alpha=2.0, magnitude=scale)
    part = adapter.rows(8, 4)
    if magnitude == "columns":
        assert part is None
        return
    weight = rand(*LINEAR, seed=9)
    whole = adapter.patch(weight.clone(), 0.8, None)
    assert torch.allclose(part.patch(weight[8:12].clone(), 0.8, None), whole[8:12], atol=1e-6)


def test_an_adapter_that_is_moved_is_not_compared_with_its_weight_again(monkeypatch):
    """Hundreds of weights of a change, each in copies of its factors on the card."""
    term = Term(LoraAdapter(torch.randn(6, 2), torch.randn(2, 4), alpha=None), 1.0)
    term.check((6, 4), may_expand=False)
    asked = []
    monkeypatch.setattr(LoraAdapter, "check", lambda self, shape, may_expand: asked.append(shape))
    there = {id(one): one.clone() for one in term.adapter.tensors()}
    moved = Term(term.adapter.moved(lambda one: there[id(one)]), 1.0)
    assert [*map(id, moved.adapter.tensors())] == [*map(id, there.values())]
    moved.check((6, 4), may_expand=False)
    assert asked == []
    # Another weight is asked for, and so is the copy of one that was never compared.
    moved.check((6, 8), may_expand=False)
    other = Term(LoraAdapter(torch.randn(6, 2), torch.randn(2, 4), alpha=None), 1.0)
    Term(other.adapter.moved(torch.clone), 1.0).check((6, 4), may_expand=False)
    assert asked == [(6, 8), (6, 4)]
