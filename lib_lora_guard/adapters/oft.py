"""OFT: a weight turned by a block-diagonal rotation (arXiv 2306.07280), as LyCORIS, sd-scripts and peft train it.

Strength moves every factor, rotation and row scale, by that share from the identity: `I + s (F - I)`. LyCORIS
(`make_weight(scale)`) does so with the rotation but leaves its row scale whole, so that strength 0 would still change
the weight. peft has no strength for OFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import LoraMismatchError
from ..lazy_torch import torch
from .base import Adapter, RowFunction, Shape, mismatch, product_of
from .boft import BoftAdapter
from .kinds import Found, Kind, register
from .rotations import (
    bounded,
    cayley_less_one,
    check_rows,
    finish,
    scale_rows,
    series_less_one,
    skew_of,
    turn_columns,
    widened,
)


@dataclass(frozen=True, eq=False)
class OftAdapter(Adapter):
    """Turns the output rows: `W' = rescale * R^T W` with `blocks` `(n, b, b)`, `n * b == out`.

    `alpha` times `out` bounds the norm of all skew blocks together; None or 0: no bound (LyCORIS `modules/diag_oft.py`;
    sd-scripts `networks/oft.py` has the same formula without `rescale` `(out, 1, ...)`). The bias is not turned.
    """

    kind: ClassVar[str] = "oft"
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
        size = self.blocks.shape[1]
        if start % size or length % size:
            return None
        blocks = self.blocks
        if self.alpha:
            # The bound is the norm of all blocks, so it is worked in before some are left out: S is linear in Q.
            skew = skew_of(blocks.to(torch.promote_types(blocks.dtype, torch.float32)))
            blocks = bounded(skew, self.alpha) / 2
        rescale = None if self.rescale is None else self.rescale.flatten()[start : start + length]
        first, last = start // size, (start + length) // size
        return replace(self, blocks=blocks[first:last], alpha=None, rescale=rescale)

    def _skew(self, like: torch.Tensor) -> torch.Tensor:
        return bounded(skew_of(self.blocks.to(like)), self.alpha)


@dataclass(frozen=True, eq=False)
class PeftOftAdapter(Adapter):
    """Turns the input: `W' = W R^T` over the flattened input side.

    `packed` `(n, b (b - 1) / 2)` holds the upper triangle of each block, `n * b == in * kernel`; one block is shared by
    the whole input (`block_share`).

    `terms` is the length of the Neumann series that peft takes for Cayley's transform (its default is 5); None is the
    exact one. Only `adapter_config.json` says (`use_cayley_neumann`, `num_cayley_neumann_terms`), and it matters: the
    series approaches the transform of S, the exact formula is that of -S (peft `tuners/oft/layer.py`).
    """

    kind: ClassVar[str] = "oft"
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
        turn = cayley_less_one(skew) if self.terms is None else series_less_one(-skew, self.terms)
        delta = turn_columns(base.flatten(1), turn).reshape(base.shape).mul_(strength)
        return finish(weight, base, delta, function)

    def rows(self, start: int, length: int) -> PeftOftAdapter:
        """Every row is turned alike."""
        return self


def _make(found: Found) -> OftAdapter | BoftAdapter:
    """LyCORIS writes OFT and BOFT under one name: a block diagonal, or several stages of it."""
    alpha = found.shared.get("alpha")
    if found.fields["blocks"].dim() == 4:
        return BoftAdapter(**found.fields, alpha=alpha)
    return OftAdapter(**found.fields, alpha=alpha)


def _make_peft(found: Found) -> PeftOftAdapter:
    return PeftOftAdapter(**found.fields, terms=found.settings.cayley_terms)


register(Kind("oft", _make, keys={"oft_blocks": "blocks", "rescale": "rescale"}))
register(Kind("peft_oft", _make_peft, peft_keys={"oft_R.weight": "packed"}))
