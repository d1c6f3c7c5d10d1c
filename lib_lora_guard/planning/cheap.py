"""Decides if a stack can run in the layer's call instead of its weight, exactly and for less. Pure.

`adapters.forms` describes the forms; `patching.forward_program` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from ..adapters import Term
from ..adapters.base import RowFunction
from ..adapters.forms import CheapForward
from ..lazy_torch import torch

Forms: TypeAlias = tuple[CheapForward | None, ...]
"""The cheap form of each term of a stack, in order; None for a term that only the weight side has exactly."""


def forms_of(terms: Sequence[Term], shape: tuple[int, ...]) -> Forms:
    """Derives the exact cheap form of every term of a stack in its place.

    Args:
        terms: the stack on one weight, in the order it is applied.
        shape: the weight's real shape, `(out, in)` or `(out, in / groups, *kernel)`.
    """
    return tuple([form_of(term, shape, is_first=index == 0) for index, term in enumerate(terms)])


def pays(forms: Forms, one_token: bool) -> bool:
    """True if these forms cost less than patching the weight.

    Args:
        forms: those of a stack.
        one_token: the layer sees one token a picture instead of thousands.
    """
    return all(form is None or form.pays(one_token) for form in forms)


def form_of(term: Term, shape: tuple[int, ...], is_first: bool) -> CheapForward | None:
    """The exact cheap form of one term; None if only patching the weight is exact.

    Args:
        term: its row function, if it reorders rows, is worked into the form.
        shape: the weight's real shape.
        is_first: no other term of the stack comes before this one.
    """
    form, part = term.adapter.cheap_forward(), term.part
    if form is None or (part is not None and part.dim > 1):
        return None
    if part is not None and part.dim == 1 and (term.strength_model != 1.0 or not form.adds_delta):
        return None
    # The input is scaled before the layer's own product: nothing may lie between.
    if form.scales_input and (not is_first or part is not None or term.strength_model != 1.0):
        return None
    target = shape if part is None else part.shape_in(shape)
    if not form.fits(target):
        return None
    if term.function is None:
        return form
    order = row_order(term.function, target[0])
    return None if order is None else form.with_rows(order)


def row_order(function: RowFunction, rows: int) -> torch.Tensor | None:
    """`order` with `function(delta) == delta[order]`; None if `function` does anything but reorder rows."""
    probe = torch.arange(2.0 * rows).reshape(2, rows).t().contiguous()
    try:
        result = function(probe.clone())
    except Exception:
        # It may need the whole delta, which only the weight side has.
        return None
    if not isinstance(result, torch.Tensor) or result.shape != probe.shape:
        return None
    order = result[:, 0].long()
    is_permutation = torch.equal(order.sort().values, torch.arange(rows)) and torch.equal(result, probe[order])
    return order if is_permutation else None
