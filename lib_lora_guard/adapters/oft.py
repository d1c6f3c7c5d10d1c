"""OFT: a weight turned by a block-diagonal rotation (arXiv 2306.07280), as LyCORIS, kohya's sd-scripts and peft train it.

A block `Q` of the file gives a skew matrix `S`, which Cayley's transform `(I + S)(I - S)^-1` makes a rotation.
Strength moves every factor, rotation and row scale, that part of the way from the identity: `I + s (F - I)`. LyCORIS
(`make_weight(scale)`) does so with the rotation, but leaves its row scale whole, so that strength 0 would still change
the weight; peft knows no strength for OFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import LoraMismatchError
from .base import Adapter, RowFunction, Shape, mismatch, product_of


@dataclass(frozen=True, eq=False)
class OftAdapter(Adapter):
    """Turns the output rows: `W' = rescale * R^T W` with `blocks` `(n, b, b)`, `n * b == out`.

    `alpha` times `out` bounds the norm of all skew blocks together; None or 0: no bound (LyCORIS `modules/diag_oft.py`;
    sd-scripts `networks/oft.py` has the same formula without `rescale` `(out, 1, ...)`). The bias is not turned.
    """

    kind: ClassVar[str] = "oft"
    additive: ClassVar[bool] = False
    blocks: torch.Tensor
    alpha: float | None = None
    rescale: torch.Tensor | None = None

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        count = self.blocks.shape
        if len(count) != 3 or count[1] != count[2]:
            raise LoraMismatchError.of("lora.wrong_form", what="OFT blocks", wanted="(n, b, b)", found=list(count))
        if len(shape) < 2 or count[0] * count[1] != shape[0]:
            raise mismatch("OFT", (count[0] * count[1],), shape)
        check_rows("rescale", self.rescale, shape)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        base = widened(weight)
        # R^T is Cayley's transform of -S.
        turn = cayley_less_one(-self._skew(base))
        delta = torch.bmm(turn, base.reshape(*self.blocks.shape[:2], -1)).reshape(base.shape).mul_(strength)
        return finish(weight, base, scale_rows(base, delta, self.rescale, strength), function)

    def rows(self, start: int, length: int) -> OftAdapter | None:
        """The adapter for these rows alone, None where they do not begin and end with a block."""
        size = self.blocks.shape[1]
        if start % size or length % size:
            return None
        blocks = self.blocks
        if self.alpha:
            # The bound looks at all blocks, so it is worked in before the others are left out: S is linear in Q.
            skew = skew_of(blocks.to(torch.promote_types(blocks.dtype, torch.float32)))
            blocks = bounded(skew, self.alpha) / 2
        rescale = None if self.rescale is None else self.rescale.flatten()[start : start + length]
        first, last = start // size, (start + length) // size
        return replace(self, blocks=blocks[first:last], alpha=None, rescale=rescale)

    def _skew(self, like: torch.Tensor) -> torch.Tensor:
        return bounded(skew_of(self.blocks.to(like)), self.alpha)


@dataclass(frozen=True, eq=False)
class PeftOftAdapter(Adapter):
    """Turns the input: `W' = W R^T` over the flattened input side. `packed` `(n, b (b - 1) / 2)` holds the upper triangle
    of each block, `n * b == in * kernel`; one block is shared by the whole input (`block_share`).

    `terms`: the length of the Neumann series that stands for Cayley's transform (peft's default 5), None: exact. The
    file does not say, `adapter_config.json` does (`use_cayley_neumann`, `num_cayley_neumann_terms`), and it has to be
    asked: the series approaches the transform of S, the exact formula is that of -S (peft `tuners/oft/layer.py`).
    """

    kind: ClassVar[str] = "oft"
    additive: ClassVar[bool] = False
    packed: torch.Tensor
    terms: int | None = 5

    @property
    def block_size(self) -> int:
        return (1 + math.isqrt(1 + 8 * self.packed.shape[-1])) // 2

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        size = self.block_size
        if self.packed.dim() != 2 or size * (size - 1) // 2 != self.packed.shape[1] or size < 2:
            found, wanted = list(self.packed.shape), "(n, b * (b - 1) / 2)"
            raise LoraMismatchError.of("lora.wrong_form", what="peft OFT", wanted=wanted, found=found)
        count, columns = self.packed.shape[0], product_of(shape[1:])
        if len(shape) < 2 or (count * size != columns and (count != 1 or columns % size)):
            raise mismatch("peft OFT", (count * size,), shape)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        base, size = widened(weight), self.block_size
        upper = torch.triu_indices(size, size, 1, device=base.device)
        skew = base.new_zeros(self.packed.shape[0], size, size)
        skew[:, upper[0], upper[1]] = self.packed.to(base)
        skew = skew - skew.mT
        turn = cayley_less_one(skew) if self.terms is None else _series_less_one(-skew, self.terms)
        delta = turn_columns(base.flatten(1), turn).reshape(base.shape).mul_(strength)
        return finish(weight, base, delta, function)

    def rows(self, start: int, length: int) -> PeftOftAdapter:
        """Every row is turned alike."""
        return self


def skew_of(blocks: torch.Tensor) -> torch.Tensor:
    return blocks - blocks.mT


def bounded(skew: torch.Tensor, alpha: float | None) -> torch.Tensor:
    """`skew` `(..., n, b, b)` made no longer than `alpha * n * b`, in the norm of the whole tensor."""
    if alpha is None or alpha <= 0.0:
        return skew
    bound = alpha * skew.shape[-3] * skew.shape[-1]
    norm: torch.Tensor = torch.linalg.vector_norm(skew) + 1e-8
    return skew * (norm.reciprocal() * bound).clamp(max=1.0)


def cayley_less_one(skew: torch.Tensor) -> torch.Tensor:
    """`(I + S)(I - S)^-1 - I` as `2 (I - S)^-1 S`: no digits cancel where S is small."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    solved: torch.Tensor = torch.linalg.solve(eye - skew, skew)
    return solved.mul_(2.0)


def _series_less_one(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """`2 S + 2 S^2 + ... + S^last`, with peft's count of terms: 3 and 4 both end with `S^3`."""
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
    """`weight` in fp32 at least: a rotation is near the identity, and bf16 steps there are larger than what it changes."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def scale_rows(base: torch.Tensor, delta: torch.Tensor, factor: torch.Tensor | None, strength: float) -> torch.Tensor:
    """The delta of `f * (base + delta)`, where `f` is `factor` (a number per row) moved by `strength` from 1."""
    if factor is None:
        return delta
    less_one = (factor.to(base).reshape(-1, *[1] * (base.dim() - 1)) - 1.0).mul_(strength)
    return delta.addcmul(less_one, base + delta)


def finish(weight: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, function: RowFunction | None) -> torch.Tensor:
    """`weight` set to `base + function(delta)`, rounded once."""
    if function is not None:
        delta = function(delta)
    return weight.add_(delta) if base is weight else weight.copy_(base.add_(delta))


def check_rows(what: str, factor: torch.Tensor | None, shape: Shape) -> None:
    """Raises LoraMismatchError unless `factor` holds one number per row."""
    if factor is not None and factor.numel() != shape[0]:
        raise mismatch(what, factor.shape, shape)
