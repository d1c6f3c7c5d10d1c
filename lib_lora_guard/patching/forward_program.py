"""Compiles a stack into the steps of a bypass. The forms and rules are in docs/architecture.md, "What equals what"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..adapters import Slice, Term
from ..adapters.forms import (
    Decomposed,
    InputScale,
    KhatriRao,
    Kronecker,
    LowRank,
    OutputScale,
)
from ..planning.cheap import Forms
from .forward_steps import KhatriRaoStep, KroneckerStep, LowRankStep, ScaleStep, Step, whole_scale
from .low_rank import Entry

BiasOf = Callable[[torch.nn.Module], "torch.Tensor | None"]
"""Returns the bias of a layer as its forward pass adds it; None if it has none."""


class OnePass(NamedTuple):
    """A stack as one new weight: its rows times a factor, plus one product.

    Attributes:
        product: The step that adds the product, low-rank or a LoKr's.
        row_scale: The step that scales the rows; None for none.
    """

    product: LowRankStep | KhatriRaoStep | KroneckerStep
    row_scale: ScaleStep | None

    def two_pairs(self, dtype: torch.dtype) -> KhatriRaoStep | None:
        """Returns the product if it is a LoHa's, of two pairs as they are; None if it is one pair."""
        product = self.product
        return product if isinstance(product, KhatriRaoStep) and product.is_two_pairs(dtype) else None


@dataclass(frozen=True, eq=False)
class Program:
    """The steps of a bypass, in order.

    `input_scale` (fp32, one per input channel) is multiplied into the input before the layer's own product. The steps see
    the unscaled input.
    """

    steps: tuple[Step, ...]
    input_scale: torch.Tensor | None

    @property
    def one_pass(self) -> OnePass | None:
        """The stack as one new weight; None where it is not one product on the whole input of a linear layer."""
        *before, last = self.steps or (None,)
        if (
            self.input_scale is not None
            or not isinstance(last, (LowRankStep, KhatriRaoStep, KroneckerStep))
            or not last.is_one_product
        ):
            return None
        if not before:
            return OnePass(last, None)
        scale = before[0]
        return OnePass(last, scale) if len(before) == 1 and isinstance(scale, ScaleStep) else None


def compile_program(
    terms: Sequence[Term],
    forms: Forms,
    shape: tuple[int, ...],
    ratios: Mapping[int, torch.Tensor],
    bias_of: BiasOf,
) -> Program:
    """Compiles `terms`, at their strengths, into steps.

    Args:
        terms: The stack, in order.
        forms: The cheap form of each term.
        shape: The shape of the weight.
        ratios: By place in the stack, each DoRA's magnitude over the norm (fp32), from `norms.ratios_of`.
        bias_of: Returns the bias of a layer.

    Raises:
        TypeError: A term has no cheap form.
    """
    steps: list[Step] = []
    scales: list[tuple[torch.Tensor | float, Slice | None]] = []
    low_ranks: list[Entry] = []
    input_scale: torch.Tensor | None = None

    def scale_rows(factor: torch.Tensor | float, part: Slice | None) -> None:
        # Earlier terms on these rows are scaled too, so they must be in the output by then.
        if any(_overlap(entry.part, part) for entry in low_ranks):
            flush()
        scales.append((factor, part))

    def flush_scales() -> None:
        if scales:
            # Of query, key and value, for example: one pass over the output.
            factor, part = scales[0] if len(scales) == 1 else (whole_scale(scales, shape[0]), None)
            steps.append(ScaleStep(factor, part, bias_of))
            scales.clear()

    def flush() -> None:
        flush_scales()
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
            flush_scales()
            steps.append(KhatriRaoStep(form, strength, term.part, shape))
        elif isinstance(form, Kronecker):
            flush_scales()
            steps.append(KroneckerStep(form, strength, term.part, shape))
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
        else:
            raise TypeError(f"a term of kind '{term.adapter.kind}' has no cheap form")
    flush()
    return Program(tuple(steps), input_scale)


def lokr_pass(terms: Sequence[Term], forms: Forms, shape: tuple[int, ...], bias_of: BiasOf) -> OnePass | None:
    """Returns a stack that goes onto the layer's temporary weight as one new weight; None where it is not a LoKr alone.

    Args:
        terms: The stack.
        forms: The cheap form of each term; None for one that has none.
        shape: The shape of the weight.
        bias_of: Returns the bias of a layer.
    """
    if len(terms) != 1 or not isinstance(forms[0], Kronecker):
        return None
    return compile_program(terms, forms, shape, {}, bias_of).one_pass


def _overlap(part: Slice | None, rows: Slice | None) -> bool:
    """Returns True if a term on `part` of a weight changes some of `rows`."""
    if part is None or rows is None or part.dim != 0:
        return True
    return part.start < rows.start + rows.length and rows.start < part.start + part.length
