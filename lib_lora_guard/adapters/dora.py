"""DoRA's magnitude step, as the host computes it or as the trainers mean it (arXiv 2402.09353).

A magnitude with one number per row makes the rows of the patched weight that long. The host (Forge
`backend/patcher/lora.py`) divides by the norms of the *unpatched* weight there, peft (`tuners/lora/variants.py`) and
LyCORIS (`functional/general.py`, `wd_on_out=True`, its default) by those of the *patched* one. A magnitude with one
number per input column (LyCORIS `wd_on_out=False`) divides by the norms of the patched weight for all of them.

Strength s goes straight from W to the result at strength 1, `(1 - s) W + s m (W + D) / norm`. The trainers go other
ways, which do not give W back at 0: peft scales D (`m (W + s D) / |W + s D|`, `set_scale`), LyCORIS the magnitude's part
(`(W + D) (1 + s (m / |W + D| - 1))`, `make_weight(scale)`).
"""

from __future__ import annotations

from ..lazy_torch import torch
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
    """Moves `weight`, in place, by `strength` towards its magnitude-normalised sum with `delta`.

    Computed in fp32 at least and rounded once: magnitude / norm is near 1, and in bf16 the steps there are larger than
    most of what a DoRA changes.

    Args:
        weight: `(out, in, ...)`.
        delta: as many values; holds alpha / rank.
        magnitude: `(out, ...)` scales rows; any other shape with one number per input channel scales columns.
        strength: the user's number.
        function: is applied to the delta first.
        as_trained: divide rows by the norms of the patched weight, as the trainers do.
    """
    base = weight.to(torch.promote_types(weight.dtype, torch.float32))
    delta = delta.reshape(weight.shape)
    if function is not None:
        delta = function(delta)
    patched = base + delta
    by_row = is_by_row(magnitude, tuple(weight.shape))
    norm = _norm(base if by_row and not as_trained else patched, keep_dim=0 if by_row else 1)
    patched.mul_(magnitude.to(base).reshape(norm.shape) / (norm + torch.finfo(base.dtype).eps))
    return weight.copy_(torch.lerp(base, patched, strength) if strength != 1.0 else patched)


def is_by_row(magnitude: torch.Tensor, shape: Shape) -> bool:
    """True if `magnitude` has one number for each row of `shape`. A square weight is read by rows."""
    return magnitude.dim() > 0 and magnitude.shape[0] == magnitude.numel() == shape[0]


def _norm(weight: torch.Tensor, keep_dim: int) -> torch.Tensor:
    others = [d for d in range(weight.dim()) if d != keep_dim]
    norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norm
