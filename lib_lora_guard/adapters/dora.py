"""DoRA's magnitude step, in the host's meaning of it (arXiv 2402.09353; Forge `backend/patcher/lora.py`).

Axis and norm follow the host: on the output axis (`magnitude.shape[0] == out`) the norm is that of the *unpatched*
weight, on the input axis that of the patched one. docs/architecture.md says where training tools differ.
"""

from __future__ import annotations

import torch

from .base import RowFunction, Shape, mismatch


def check_magnitude(magnitude: torch.Tensor, shape: Shape) -> None:
    """Raises LoraMismatchError unless `magnitude` scales the rows or the columns of a weight of `shape`."""
    size = magnitude.numel()
    by_row = magnitude.shape[0] == shape[0] and size == shape[0]
    by_column = len(shape) > 1 and size == shape[1]
    if not (by_row or by_column):
        raise mismatch("dora_scale", magnitude.shape, shape)


def decompose(
    weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor, strength: float, function: RowFunction | None
) -> torch.Tensor:
    """`weight` moved by `strength` towards its magnitude-normalised sum with `delta` (the delta holds alpha / rank)."""
    delta = delta.reshape(weight.shape)
    if function is not None:
        delta = function(delta)
    patched = weight + delta.to(weight.dtype)
    magnitude = magnitude.to(device=weight.device)
    if magnitude.shape[0] == weight.shape[0]:
        norm = _norm(weight, keep_dim=0)
        magnitude = magnitude.reshape(-1, *[1] * (weight.dim() - 1))
    else:
        norm = _norm(patched, keep_dim=1)
        magnitude = magnitude.reshape(1, -1, *[1] * (weight.dim() - 2))
    norm += torch.finfo(weight.dtype).eps
    patched.mul_((magnitude.to(norm.dtype) / norm).to(weight.dtype))
    return weight.lerp_(patched, strength) if strength != 1.0 else weight.copy_(patched)


def _norm(weight: torch.Tensor, keep_dim: int) -> torch.Tensor:
    """L2 norm over all dimensions but `keep_dim`, summed in fp32 without an fp32 copy of the weight."""
    others = [d for d in range(weight.dim()) if d != keep_dim]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True, dtype=wide)
    return norm
