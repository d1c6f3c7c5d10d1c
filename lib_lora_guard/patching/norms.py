"""Row and column norms of a stored weight, for DoRA. One pass over its rows: it is never dense as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adapters import Term, apply_terms
from ..adapters.base import product_of
from ..adapters.forms import Decomposed
from ..inference_mode import outside_inference
from ..planning.cheap import Forms
from ..units import FP32_BYTES, MB
from ..weights.storage import widest_float
from .access import ModelAccess, Site

PASS_BYTES = 64 * MB
"""Bytes of a weight, in fp32, that are dense at a time."""


def has_dora(forms: Forms) -> bool:
    """Returns True if a stack with these cheap forms needs norms."""
    return any(isinstance(form, Decomposed) for form in forms)


@outside_inference
def ratios_of(
    access: ModelAccess, site: Site, terms: Sequence[Term], forms: Forms, device: torch.device
) -> dict[int, torch.Tensor]:
    """Computes magnitude over norm of each DoRA in a stack.

    The norms are those of the weight as the terms before leave it, with or without the DoRA's own delta as its form says,
    plus eps as in the host (Forge `backend/patcher/lora.py`).

    Args:
        access: The model.
        site: The weight, `(out, in, ...)`.
        terms: The stack on it, in order.
        forms: The cheap form of each term.
        device: The device to compute on.

    Returns:
        One value per row `(out,)` or column `(in,)`, fp32 and in RAM, by place in the stack.
    """
    result = {}
    for index, (term, form) in enumerate(zip(terms, forms, strict=True)):
        if isinstance(form, Decomposed):
            norm = _pass(access, site, terms[:index], term, form, device)
            result[index] = form.magnitude.float() / norm
    return result


def ratio_identity(terms: Sequence[Term], forms: Forms) -> list[object]:
    """Returns a value that is equal for two stacks with equal ratios.

    It holds everything before the last DoRA, and that DoRA without its strength. `forms`: the cheap form of each term.
    """
    last = max((i for i, form in enumerate(forms) if isinstance(form, Decomposed)), default=-1)
    if last < 0:
        return []
    end = terms[last]
    return [*(term.identity() for term in terms[:last]), (end.adapter.identity(), end.strength_model, end.part)]


def _pass(
    access: ModelAccess, site: Site, before: Sequence[Term], term: Term, form: Decomposed, device: torch.device
) -> torch.Tensor:
    rows = site.shape[0]
    step = max(1, PASS_BYTES // (FP32_BYTES * product_of(site.shape[1:])))
    if before or term.part is not None:
        # Other terms may need the whole weight, and a part may extend over two passes. Such stacks are rare.
        step = rows
    by_row: list[torch.Tensor] = []
    wide = widest_float(device)
    by_column = torch.zeros(site.shape[1], dtype=wide, device=device)
    for start in range(0, rows, step):
        length = min(step, rows - start)
        weight = apply_terms(access.rows(site, start, length, device), before)
        target = weight if term.part is None else term.part.of(weight)
        if term.strength_model != 1.0:
            target = target * term.strength_model
        if form.patched_norm:
            up = form.delta.up if step == rows else form.delta.up.narrow(0, start, length)
            up = up.to(device=device, dtype=torch.float32)
            delta = (up @ form.delta.dense_down(torch.float32, device)).mul_(form.delta.scale)
            target = target + delta.reshape(target.shape)
        if form.by_row:
            by_row.append(torch.linalg.vector_norm(target.flatten(1), dim=1))
        else:
            others = [d for d in range(target.dim()) if d != 1]
            by_column += target.square().sum(dim=others, dtype=wide)
    norm = torch.cat(by_row) if form.by_row else by_column.sqrt().float()
    # In RAM, like the factors: a device copy is made when the layer runs there.
    return norm.cpu() + torch.finfo(torch.float32).eps
