"""Whether a stack can be carried by the layer's call instead of its weight: exactly, and for less. Pure.

The forms themselves are what an adapter's `cheap_forward` describes; `patching.forward_program` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..adapters import Term
from ..adapters.base import (
    CheapForward,
    Decomposed,
    InputScale,
    KhatriRao,
    Kronecker,
    LowRank,
    OutputScale,
    RowFunction,
    product_of,
)

KHATRI_RAO_RANK = 256
"""Largest r1 * r2 of a LoHa that goes through the layer's call (rank 16). Measured at 4608 tokens (docs/gpu.md): rank 16
costs as much as on the weight side and takes no memory there, rank 32 costs more."""


def has_cheap_form(terms: Sequence[Term], shape: tuple[int, ...]) -> bool:
    """True when every term of the stack has an exact cheap form in its place on a weight of `shape`."""
    return all(form_of(term, shape, is_first=index == 0) is not None for index, term in enumerate(terms))


def pays(terms: Sequence[Term], one_token: bool) -> bool:
    """True when the cheap forms of a stack cost less than the weight side. `one_token`: the layer sees one token a
    picture instead of thousands."""
    for form in (term.adapter.cheap_forward() for term in terms):
        if isinstance(form, KhatriRao) and form.rank > KHATRI_RAO_RANK:
            return False
        # With many tokens two products and two temporaries of the output's size cost more than the weight side, in time
        # and in memory (measured, docs/gpu.md: +25 % against +13 %, 254 MB against none).
        if isinstance(form, Kronecker) and not one_token:
            return False
    return True


def form_of(term: Term, shape: tuple[int, ...], is_first: bool) -> CheapForward | None:
    """The cheap form of one term, its row permutation already in the factors; None where only the weight side is exact."""
    form, part = term.adapter.cheap_forward(), term.part
    if form is None or (part is not None and part.dim > 1):
        return None
    on_input = part is not None and part.dim == 1
    if on_input and (term.strength_model != 1.0 or isinstance(form, (OutputScale, InputScale, Decomposed))):
        return None
    target = shape if part is None else part.shape_in(shape)
    scales_input = isinstance(form, InputScale) or (isinstance(form, Decomposed) and not form.by_row)
    # The input is scaled before the layer's own product: nothing may lie between.
    if scales_input and (not is_first or part is not None or term.strength_model != 1.0):
        return None
    low_rank = form.delta if isinstance(form, Decomposed) else form
    if isinstance(low_rank, LowRank) and not _fills(low_rank, target):
        return None
    if term.function is None:
        return form
    order = row_order(term.function, target[0])
    return replace(form, up=form.up[order]) if isinstance(form, LowRank) and order is not None else None


def row_order(function: RowFunction, rows: int) -> torch.Tensor | None:
    """`order` with `function(delta) == delta[order]`, or None where the function is anything but a reordering of rows."""
    probe = torch.arange(2.0 * rows).reshape(2, rows).t().contiguous()
    try:
        result = function(probe.clone())
    except Exception:
        # Whatever it is, it is not meant for rows alone: the weight side gives it the whole delta.
        return None
    if not isinstance(result, torch.Tensor) or result.shape != probe.shape:
        return None
    order = result[:, 0].long()
    is_permutation = torch.equal(order.sort().values, torch.arange(rows)) and torch.equal(result, probe[order])
    return order if is_permutation else None


def _fills(low_rank: LowRank, shape: tuple[int, ...]) -> bool:
    kernel = 1 if low_rank.mid is None else product_of(low_rank.mid.shape[2:])
    return (low_rank.up.shape[0], low_rank.down.shape[1] * kernel) == (shape[0], product_of(shape[1:]))
