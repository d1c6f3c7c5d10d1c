"""Row and column norms of a stored weight, for DoRA: one pass over its rows, so that no dense copy of it is ever whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adapters import Term, apply_terms
from ..adapters.base import product_of
from ..adapters.forms import Decomposed
from ..planning.cheap import form_of
from ..weights.storage import widest_float
from .access import ModelAccess, Site

PASS_BYTES = 64 << 20
"""fp32 bytes of a weight that are dense at a time."""


def ratios_of(access: ModelAccess, site: Site, terms: Sequence[Term], device: torch.device) -> dict[int, torch.Tensor]:
    """Magnitude over norm of each DoRA in a stack (fp32, in RAM), by place in the stack. Computed on `device`.

    The norms are those of the weight as the terms before leave it, with or without the DoRA's own delta as its form says,
    plus eps as in the host (Forge `backend/patcher/lora.py`).
    """
    result = {}
    for index, term in enumerate(terms):
        form = form_of(term, site.shape, is_first=index == 0)
        if isinstance(form, Decomposed):
            norm = _pass(access, site, terms[:index], term, form, device)
            result[index] = form.magnitude.float() / norm
    return result


def ratio_identity(terms: Sequence[Term]) -> list[object]:
    """Equal for two stacks whose ratios are equal: all that comes before the last DoRA, and that without its strength."""
    last = max((i for i, t in enumerate(terms) if isinstance(t.adapter.cheap_forward(), Decomposed)), default=-1)
    if last < 0:
        return []
    end = terms[last]
    return [*(term.identity() for term in terms[:last]), (end.adapter.identity(), end.strength_model, end.part)]


def _pass(
    access: ModelAccess, site: Site, before: Sequence[Term], term: Term, form: Decomposed, device: torch.device
) -> torch.Tensor:
    rows = site.shape[0]
    step = max(1, PASS_BYTES // (4 * product_of(site.shape[1:])))
    if before or term.part is not None:
        # Other terms may need the whole weight, and a part may lie across two passes; such stacks are rare.
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
    # Kept in RAM like the factors: a device copy is made when the layer runs there.
    return norm.cpu() + torch.finfo(torch.float32).eps
