"""What the stack on one weight costs in memory and per step, by the way it is carried. Pure: shapes and dtypes decide.

Sources: for the guard the forms that `patching.forward_steps` and `adapters` run; for Forge its `merge_lora_to_weight`.
Traffic is counted in passes: one for each time a kernel reads or writes a tensor of the weight's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..adapters import Adapter, GloraAdapter, LoraAdapter, Term
from ..adapters.base import Shape, product_of
from .cheap import form_of

FP32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """`resident_bytes` on the GPU while sampling; `workspace_bytes` there while this layer runs; the rest per step."""

    resident_bytes: int = 0
    workspace_bytes: int = 0
    step_flops: float = 0.0
    step_bytes: float = 0.0


def bypass_bytes(terms: Sequence[Term], shape: Shape, compute_bytes: int) -> int:
    """Device bytes of the factors, as `patching.bypass.Bypass.device_bytes` counts them. Terms without a cheap form: 0."""
    forms = (form_of(term, shape, is_first=index == 0) for index, term in enumerate(terms))
    return sum(form.device_bytes(compute_bytes) for form in forms if form is not None)


def bypass_cost(terms: Sequence[Term], shape: Shape, tokens: int, compute_bytes: int) -> Cost:
    """Low-rank terms: 2 * tokens * rank * (in + out) operations; the input is read once, each part of the output that
    is added to is read and written. The rank activation between them is small and not counted."""
    flops, inputs, outputs = 0.0, set(), dict[object, int]()
    for index, term in enumerate(terms):
        form = form_of(term, shape, is_first=index == 0)
        if form is None:
            continue
        target = shape if term.part is None else term.part.shape_in(shape)
        flops += form.flops(target, tokens)
        inputs.add((target[1], term.part if term.part is not None and term.part.dim == 1 else None))
        # What is joined is added at once; other kinds have a pass of their own.
        outputs[term.part if form.joins else index] = target[0]
    moved = tokens * (sum(width for width, _ in inputs) + 2 * sum(outputs.values())) * compute_bytes
    return Cost(bypass_bytes(terms, shape, compute_bytes), 0, flops, float(moved))


def on_the_fly_cost(terms: Sequence[Term], shape: Shape, is_called: bool, compute_bytes: int) -> Cost:
    """The guard's own: the delta is added to the temporary weight, for a LoRA by one product in place."""
    values = product_of(shape)
    resident = sum(term.adapter.bytes for term in terms)
    passes = sum(_guard_passes(term.adapter) for term in terms)
    workspace = max((_guard_workspace(term.adapter, compute_bytes) for term in terms), default=0) * values
    if not is_called:
        return Cost(resident, workspace)
    return Cost(resident, workspace, _product_flops(terms, values), float(passes * values * compute_bytes))


def forge_on_the_fly_cost(terms: Sequence[Term], shape: Shape, is_called: bool, compute_bytes: int) -> Cost:
    """Forge's "fp16 LoRA": the factors in the compute dtype; the delta is made, scaled and added, one LoRA at a time."""
    values = product_of(shape)
    resident = sum(tensor.numel() for term in terms for tensor in term.adapter.tensors()) * compute_bytes
    passes = sum(_forge_passes(term.adapter) for term in terms)
    copies = max((2 if _is_plain_lora(term.adapter) else 3 for term in terms), default=0)
    workspace = copies * values * compute_bytes
    if not is_called:
        return Cost(resident, workspace)
    return Cost(resident, workspace, _product_flops(terms, values), float(passes * values * compute_bytes))


def rank_of(adapter: Adapter) -> int | None:
    """The rank the file shows; None for kinds without one and for whole sides of a LoKr."""
    for name in ("down", "w1b", "w2b"):
        factor = getattr(adapter, name, None)
        if factor is not None and factor.dim() > 1:
            return int(factor.shape[0])
    if isinstance(adapter, GloraAdapter):
        return min(adapter.b1.shape)  # (out, rank) or, in the old layout, (rank, in)
    return None


def _product_flops(terms: Sequence[Term], values: int) -> float:
    return sum(2.0 * (rank_of(term.adapter) or 1) * values for term in terms)


def _is_plain_lora(adapter: Adapter) -> bool:
    return isinstance(adapter, LoraAdapter) and adapter.magnitude is None


def _guard_passes(adapter: Adapter) -> int:
    """A LoRA is one product added in place (read, write); LoHa two products, one times the other, added; LoKr one product,
    added. Everything else, DoRA above all, works in fp32 on some ten tensors."""
    if _is_plain_lora(adapter):
        return 2
    return {"loha": 8, "lokr": 4, "diff": 3, "set": 2}.get(adapter.kind, 20) if not _is_dora(adapter) else 20


def _guard_workspace(adapter: Adapter, compute_bytes: int) -> int:
    """Bytes per value of the weight, beside the temporary weight."""
    if _is_plain_lora(adapter):
        return 0
    if not _is_dora(adapter) and adapter.kind in ("loha", "lokr", "diff", "set"):
        return 2 * compute_bytes
    return 3 * FP32_BYTES


def _forge_passes(adapter: Adapter) -> int:
    """LoRA: product (1), times alpha (2), added (3). Other kinds have a second product and multiply the two; DoRA takes a
    norm and mixes."""
    if _is_dora(adapter):
        return 14
    return 6 if _is_plain_lora(adapter) else 3 if adapter.kind == "diff" else 10


def _is_dora(adapter: Adapter) -> bool:
    return getattr(adapter, "magnitude", None) is not None
