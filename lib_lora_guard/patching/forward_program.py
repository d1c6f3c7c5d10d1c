"""Turns a stack into the steps of a bypass. Forms and rules: design table "What equals what" in docs/architecture.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..adapters import Slice, Term
from ..adapters.forms import (
    CheapForward,
    Decomposed,
    InputScale,
    KhatriRao,
    Kronecker,
    LowRank,
    OutputScale,
)
from ..planning.cheap import form_of
from .forward_steps import KhatriRaoStep, KroneckerStep, LowRankStep, ScaleStep, Step
from .low_rank import Entry

BiasOf = Callable[[torch.nn.Module], "torch.Tensor | None"]


@dataclass(frozen=True, eq=False)
class Program:
    """`input_scale` (fp32, per input channel) is for what the layer's own product sees; the steps see the true input.
    `forms` has the cheap form of each term: all of it that does not depend on strengths."""

    steps: tuple[Step, ...]
    input_scale: torch.Tensor | None
    forms: tuple[CheapForward, ...]


def compile_program(
    terms: Sequence[Term],
    shape: tuple[int, ...],
    ratios: Mapping[int, torch.Tensor],
    bias_of: BiasOf,
    forms: Sequence[CheapForward] | None = None,
) -> Program:
    """`terms` must satisfy `planning.cheap.has_cheap_form` for `shape`; `ratios` has, by place in the stack, each DoRA's
    magnitude over the norm (fp32); `forms` are those of an earlier program for the same adapters. Raises TypeError for a
    term without a cheap form."""
    forms = _forms_of(terms, shape) if forms is None else forms
    steps: list[Step] = []
    low_ranks: list[Entry] = []
    input_scale: torch.Tensor | None = None

    def scale_rows(factor: torch.Tensor | float, part: Slice | None) -> None:
        # What was added before is scaled too, so it must be in the output by then.
        flush()
        steps.append(ScaleStep(factor, part, bias_of))

    def flush() -> None:
        if low_ranks:
            steps.append(LowRankStep(tuple(low_ranks), shape))
            low_ranks.clear()

    for index, (term, form) in enumerate(zip(terms, forms, strict=True)):
        if term.strength_model != 1.0:
            scale_rows(term.strength_model, term.part)
        strength = term.strength
        if isinstance(form, LowRank):
            low_ranks.append(Entry(form, strength, term.part))
        elif isinstance(form, KhatriRao):
            steps.append(KhatriRaoStep(form, strength, term.part))
        elif isinstance(form, Kronecker):
            steps.append(KroneckerStep(form, strength, term.part))
        elif isinstance(form, OutputScale):
            scale_rows(1 + strength * form.difference.float(), term.part)
        elif isinstance(form, InputScale):
            input_scale = 1 + strength * form.difference.float()
        elif isinstance(form, Decomposed):
            ratio = ratios[index]
            scale = 1 + strength * (ratio - 1)
            if form.by_row:
                scale_rows(scale, term.part)
                low_ranks.append(Entry(replace(form.delta, row_scale=ratio), strength, term.part))
            else:
                input_scale = scale
                low_ranks.append(Entry(replace(form.delta, column_scale=ratio), strength, term.part))
    flush()
    return Program(tuple(steps), input_scale, tuple(forms))


def _forms_of(terms: Sequence[Term], shape: tuple[int, ...]) -> list[CheapForward]:
    forms = []
    for index, term in enumerate(terms):
        form = form_of(term, shape, is_first=index == 0)
        if form is None:
            raise TypeError(f"a term of kind '{term.adapter.kind}' has no cheap form")
        forms.append(form)
    return forms
