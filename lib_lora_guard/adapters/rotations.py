"""Rotations of a weight's rows or columns by small blocks: the arithmetic that OFT and BOFT share.

A rotation is given as its difference from the identity, so that no digits cancel where it is near. A file's block `Q`
gives a skew matrix `S`, which Cayley's transform `(I + S)(I - S)^-1` makes a rotation.
"""

from __future__ import annotations

from ..errors import LoraMismatchError
from ..lazy_torch import torch
from .base import RowFunction, Shape, mismatch

LARGEST_TURN = 1e6
"""Of a block's values: the tangent of half an angle. Beyond it every rotation is half a turn in fp32, and the solver may fail."""


def check_turns(blocks: torch.Tensor) -> None:
    """Checks that the values of a file's blocks can be those of rotations.

    Raises:
        LoraMismatchError: A value is beyond LARGEST_TURN.
    """
    if blocks.is_meta or not blocks.numel():
        return
    largest = float(at_least_fp32(blocks).abs().max())
    if largest > LARGEST_TURN:
        raise LoraMismatchError.of("lora.no_usable_number", name="rotation", number=largest)


def skew_of(blocks: torch.Tensor) -> torch.Tensor:
    """`Q - Q^T` of each block."""
    return blocks - blocks.mT


def bounded(skew: torch.Tensor, alpha: float | None) -> torch.Tensor:
    """`skew` shortened to `alpha * n * b`, in the norm of the whole tensor.

    Args:
        skew: `(..., n, b, b)`.
        alpha: None or 0 is no bound.
    """
    if alpha is None or alpha <= 0.0:
        return skew
    bound = alpha * skew.shape[-3] * skew.shape[-1]
    norm: torch.Tensor = torch.linalg.vector_norm(skew) + 1e-8
    return skew * (norm.reciprocal() * bound).clamp(max=1.0)


def bounded_each(skew: torch.Tensor, bound: float | None) -> torch.Tensor:
    """Each block of `skew` `(n, b, b)` shortened to `bound / sqrt(n)` in its own norm; None for no bound."""
    if bound is None:
        return skew
    norm: torch.Tensor = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
    longest = bound / skew.shape[0] ** 0.5
    return torch.where(norm <= longest, skew, skew * (longest / norm))


def cayley_less_one(skew: torch.Tensor) -> torch.Tensor:
    """`(I + S)(I - S)^-1 - I` as `2 (I - S)^-1 S`."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    solved: torch.Tensor = torch.linalg.solve(eye - skew, skew)
    return solved.mul_(2.0)


def series_less_one(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """Cayley's transform as peft's Neumann series, `2 S + 2 S^2 + ... + S^last`.

    Args:
        skew: `(n, b, b)`.
        terms: by peft's count: 3 and 4 both end with `S^3`.
    """
    if terms < 2:
        return torch.zeros_like(skew)
    if terms == 2:
        return skew * 2.0
    last, power, total = max(terms - 1, 3), skew, skew * 2.0
    for exponent in range(2, last + 1):
        power = torch.bmm(power, skew)
        total.add_(power, alpha=1.0 if exponent == last else 2.0)
    return total


def turn_columns(matrix: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """`matrix` `(out, n * b)` times the block diagonal of `turn` `(n, b, b)`, or of one block for all `(1, b, b)`."""
    blocks = matrix.reshape(matrix.shape[0], -1, turn.shape[-1]).transpose(0, 1)
    turned: torch.Tensor = torch.matmul(blocks, turn)
    return turned.transpose(0, 1).reshape(matrix.shape)


def widened(weight: torch.Tensor) -> torch.Tensor:
    """`weight` in fp32 at least: near the identity, steps of bf16 are larger than the change."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in fp32, or in fp64 if it is so. torch does not promote fp8 by itself."""
    return tensor if tensor.element_size() == 8 else tensor.float()


def scale_rows(base: torch.Tensor, delta: torch.Tensor, factor: torch.Tensor | None, strength: float) -> torch.Tensor:
    """The delta of `f * (base + delta)`, where `f` is `factor` (a number per row) moved by `strength` from 1."""
    if factor is None:
        return delta
    less_one = (factor.to(base).reshape(-1, *[1] * (base.dim() - 1)) - 1.0).mul_(strength)
    return delta.addcmul(less_one, base + delta)


def finish(weight: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, function: RowFunction | None) -> torch.Tensor:
    """Sets `weight` to `base + function(delta)`, rounded once."""
    if function is not None:
        delta = function(delta)
    return weight.add_(delta) if base is weight else weight.copy_(base.add_(delta))


def check_rows(what: str, factor: torch.Tensor | None, shape: Shape) -> None:
    """Raises LoraMismatchError unless `factor` holds one number per row."""
    if factor is not None and factor.numel() != shape[0]:
        raise mismatch(what, factor.shape, shape)
