"""DoRA's magnitude step, in the host's meaning of it (arXiv 2402.09353; Forge `backend/patcher/lora.py`).

Axis and norm follow the host: on the output axis (`magnitude.shape[0] == out`) the norm is that of the *unpatched*
weight, on the input axis that of the patched one. docs/architecture.md says where training tools differ.
"""

from __future__ import annotations

import torch

from .as_trained import decompose_as_trained
from .base import RowFunction, Shape, mismatch


def check_magnitude(magnitude: torch.Tensor, shape: Shape) -> None:
    """Raises LoraMismatchError unless `magnitude` scales the rows or the columns of a weight of `shape`."""
    if not is_by_row(magnitude, shape) and not (len(shape) > 1 and magnitude.numel() == shape[1]):
        raise mismatch("dora_scale", magnitude.shape, shape)


def decompose(
    weight: torch.Tensor,
    delta: torch.Tensor,
    magnitude: torch.Tensor,
    strength: float,
    function: RowFunction | None,
    as_trained: bool = False,
) -> torch.Tensor:
    """`weight` moved by `strength` towards its magnitude-normalised sum with `delta` (the delta holds alpha / rank).

    `as_trained` asks for the trainer's meaning instead of the host's, see `as_trained.py`.
    Computed in fp32 and rounded once: magnitude / norm is near 1, and in bf16 the steps there are larger than most of what
    a DoRA changes.
    """
    if as_trained:
        return decompose_as_trained(weight, delta, magnitude, strength, function)
    base = weight.to(torch.promote_types(weight.dtype, torch.float32))
    delta = delta.reshape(weight.shape)
    if function is not None:
        delta = function(delta)
    patched = base + delta
    magnitude = magnitude.to(base)
    if is_by_row(magnitude, tuple(weight.shape)):
        norm = _norm(base, keep_dim=0)
        magnitude = magnitude.reshape(-1, *[1] * (weight.dim() - 1))
    else:
        norm = _norm(patched, keep_dim=1)
        magnitude = magnitude.reshape(1, -1, *[1] * (weight.dim() - 2))
    patched.mul_(magnitude / (norm + torch.finfo(base.dtype).eps))
    return weight.copy_(torch.lerp(base, patched, strength) if strength != 1.0 else patched)


def is_by_row(magnitude: torch.Tensor, shape: Shape) -> bool:
    """True where `magnitude` has one number per row of a weight of `shape` (a square weight is read by its first dimension)."""
    return magnitude.dim() > 0 and magnitude.shape[0] == magnitude.numel() == shape[0]


def _norm(weight: torch.Tensor, keep_dim: int) -> torch.Tensor:
    others = [d for d in range(weight.dim()) if d != keep_dim]
    norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norm
