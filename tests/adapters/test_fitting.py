"""One answer to "does it fit" for the engine, the host's file reader, plan and bake."""

import torch

from lib_lora_guard.adapters import DiffAdapter, LoraAdapter, Term
from lib_lora_guard.adapters.fitting import Blame, misfit


def lora(out, columns):
    return Term(LoraAdapter(up=torch.zeros(out, 2), down=torch.zeros(2, columns)), 1.0)


def difference(*shape):
    return Term(DiffAdapter(torch.zeros(shape)), 1.0)


def test_terms_that_fit():
    assert misfit([lora(8, 4), difference(8, 4)], (8, 4), may_expand=False) is None
    assert misfit([], (8, 4), may_expand=False) is None


def test_low_rank_factors_of_another_size_speak_for_their_file():
    found = misfit([lora(8, 6)], (8, 4), may_expand=False)
    assert found.blame is Blame.MODEL
    assert found.why == "up @ down gives [8, 6], the weight is [8, 4]"


def test_a_difference_of_another_size_speaks_for_itself_alone():
    found = misfit([difference(3)], (4,), may_expand=False)
    assert found.blame is Blame.LAYER
    assert found.why == "diff gives [3], the weight is [4]"


def test_a_difference_beside_factors_speaks_for_the_file():
    assert misfit([lora(8, 4), difference(8, 5)], (8, 4), may_expand=False).blame is Blame.MODEL


def test_an_input_projection_may_grow():
    assert misfit([lora(8, 8)], (8, 4), may_expand=True) is None
    assert misfit([lora(8, 8)], (8, 4), may_expand=False).blame is Blame.MODEL


def test_a_file_that_contradicts_itself_is_not_for_another_model():
    factors = Term(LoraAdapter(up=torch.zeros(8, 3), down=torch.zeros(2, 4)), 1.0)
    assert misfit([factors], (8, 4), may_expand=False).blame is Blame.FILE
    assert misfit([Term(lora(8, 4).adapter, float("nan"))], (8, 4), may_expand=False).blame is Blame.STRENGTH


def test_an_adapter_is_compared_once_with_weights_of_one_shape_and_anew_with_others(monkeypatch):
    term, asked, check = lora(8, 4), [], LoraAdapter.check
    monkeypatch.setattr(
        LoraAdapter, "check", lambda self, shape, **more: (asked.append(shape), check(self, shape, **more))
    )
    assert misfit([term], (8, 4), may_expand=False) is None
    assert misfit([Term(term.adapter, 0.5)], (8, 4), may_expand=False) is None
    assert asked == [(8, 4)]
    for _ in range(2):
        assert misfit([term], (8, 5), may_expand=False).blame is Blame.MODEL, "what does not fit is said each time"
    assert misfit([term], (8, 4), may_expand=True) is None
    assert asked == [(8, 4), (8, 5), (8, 5), (8, 4)]
    assert misfit([Term(term.adapter, float("inf"))], (8, 4), may_expand=True).blame is Blame.STRENGTH
