"""The cost of the stack on one weight, in memory and per step, in each mode. Pure: shapes and dtypes decide.

Sources: for the guard the code of `patching.forward_steps` and `adapters`; for Forge its `merge_lora_to_weight`.
Traffic is counted in passes: one for each time a kernel reads or writes a tensor of the weight's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..adapters import Term
from ..adapters.base import PatchCost, Shape, product_of
from ..units import FP32_BYTES
from .cheap import Forms


@dataclass(frozen=True)
class Cost:
    """The cost of one weight's stack.

    Attributes:
        resident_bytes: on the GPU while sampling.
        workspace_bytes: on the GPU while this layer runs.
        step_flops: operations of one step.
        step_bytes: bytes read and written on the GPU in one step.
    """

    resident_bytes: int = 0
    workspace_bytes: int = 0
    step_flops: float = 0.0
    step_bytes: float = 0.0


def bypass_bytes(forms: Forms, compute_bytes: int) -> int:
    """Device bytes of the factors, as `patching.bypass.Bypass.device_bytes` counts them. Terms without a form: 0.

    Args:
        forms: of `planning.cheap.forms_of`.
        compute_bytes: bytes of one value in the compute dtype.
    """
    return sum(form.device_bytes(compute_bytes) for form in forms if form is not None)


def bypass_cost(terms: Sequence[Term], forms: Forms, shape: Shape, tokens: int, compute_bytes: int) -> Cost:
    """The cost of a bypass.

    The input is read once; each part of the output that is added to is read and written. The rank activation between
    them is small and not counted.

    Args:
        terms: the stack on the weight.
        forms: the cheap form of each term.
        shape: the weight's real shape.
        tokens: rows of the layer's input in one step.
        compute_bytes: bytes of one value in the compute dtype.
    """
    flops, inputs, outputs = 0.0, set(), dict[object, int]()
    for index, (term, form) in enumerate(zip(terms, forms, strict=True)):
        if form is None:
            continue
        target = shape if term.part is None else term.part.shape_in(shape)
        flops += form.flops(target, tokens)
        inputs.add((target[1], term.part if term.part is not None and term.part.dim == 1 else None))
        # Joined forms are added at once; others have a pass of their own.
        outputs[term.part if form.joins else index] = target[0]
    moved = tokens * (sum(width for width, _ in inputs) + 2 * sum(outputs.values())) * compute_bytes
    return Cost(bypass_bytes(forms, compute_bytes), 0, flops, float(moved))


def on_the_fly_cost(terms: Sequence[Term], shape: Shape, is_called: bool, compute_bytes: int) -> Cost:
    """The cost of the guard's own way: each delta is added to the temporary weight.

    Args:
        terms: the stack on the weight.
        shape: the weight's real shape.
        is_called: the layer runs in every step.
        compute_bytes: bytes of one value in the compute dtype.
    """
    resident = sum(term.adapter.bytes for term in terms)
    costs = (term.adapter.patch_cost() for term in terms)
    return _on_the_fly(terms, costs, resident, product_of(shape), is_called, compute_bytes)


def forge_on_the_fly_cost(terms: Sequence[Term], shape: Shape, is_called: bool, compute_bytes: int) -> Cost:
    """The cost of Forge's "fp16 LoRA": factors in the compute dtype; one delta at a time is made, scaled and added.

    Takes what `on_the_fly_cost` takes.
    """
    resident = sum(tensor.numel() for term in terms for tensor in term.adapter.tensors()) * compute_bytes
    costs = (term.adapter.forge_patch_cost() for term in terms)
    return _on_the_fly(terms, costs, resident, product_of(shape), is_called, compute_bytes)


def _on_the_fly(
    terms: Sequence[Term],
    costs: Iterable[PatchCost],
    resident_bytes: int,
    values: int,
    is_called: bool,
    compute_bytes: int,
) -> Cost:
    costs = list(costs)
    copies = (cost.copies * (FP32_BYTES if cost.in_fp32 else compute_bytes) for cost in costs)
    workspace = max(copies, default=0) * values
    if not is_called:
        return Cost(resident_bytes, workspace)
    flops = sum(2.0 * (term.adapter.rank or 1) * values for term in terms)
    passes = sum(cost.passes for cost in costs)
    return Cost(resident_bytes, workspace, flops, float(passes * values * compute_bytes))
