"""BOFT: a rotation built of butterfly stages (arXiv 2311.06243), as LyCORIS (output rows) and peft (input) train it.

Every stage is block-diagonal after a shuffle of the channels, so that `m` stages of small blocks mix channels that are
far apart. Strength moves each stage and the row scale from the identity, as for OFT (`oft.py`); LyCORIS
`make_weight(scale)` does so with the stages. Files of LyCORIS are read by `oft.py`: their keys are those of OFT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import LoraMismatchError
from ..lazy_torch import torch
from .base import Adapter, RowFunction, Shape, channels_of, filled, mismatch
from .kinds import Found, Kind, register
from .rotations import (
    bounded,
    cayley_less_one,
    check_rows,
    check_turns,
    finish,
    scale_rows,
    skew_of,
    turn_columns,
    widened,
)


@dataclass(frozen=True, eq=False)
class BoftAdapter(Adapter):
    """`W' = rescale * R_m ... R_1 W` over the output rows: `blocks` `(m, n, b, b)`, `n * b == out`.

    `alpha` times `out` bounds the norm of all skew blocks together; None or 0: no bound (LyCORIS `modules/boft.py`,
    `functional/boft.py`). `rescale` `(out, 1, ...)`. The bias is not turned.
    """

    kind: ClassVar[str] = "boft"
    blocks: torch.Tensor
    alpha: float | None = None
    rescale: torch.Tensor | None = None

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        size, channels = _check_blocks(self.blocks, shape)
        if len(shape) < 2 or channels != shape[0]:
            raise mismatch("BOFT", (channels,), shape)
        if size % 2:
            raise LoraMismatchError.of("lora.odd_blocks", found=list(self.blocks.shape))
        check_rows("rescale", self.rescale, shape)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        base = widened(weight)
        stages, count, size, _ = self.blocks.shape
        turns = cayley_less_one(bounded(skew_of(self.blocks.to(base)), self.alpha)).mul_(strength)
        rows = base.flatten(1)
        columns = rows.shape[1]
        for stage in range(stages):
            # Rows that lie `half` apart become neighbours, are turned block by block and go back.
            half = 2**stage * (size // 2)
            mixed = rows.reshape(-1, 2, half, columns).transpose(1, 2).reshape(count, size, columns)
            mixed = torch.baddbmm(mixed, turns[stage], mixed)
            rows = mixed.reshape(-1, half, 2, columns).transpose(1, 2).reshape(-1, columns)
        delta = rows.reshape(base.shape) - base
        return finish(weight, base, scale_rows(base, delta, self.rescale, strength), function)


@dataclass(frozen=True, eq=False)
class PeftBoftAdapter(Adapter):
    """`W' = factor * W B^T` over the flattened input side.

    `blocks` `(m, n, b, b)` (`boft_R`), `n * b == in * kernel`; `factor` (`boft_s`) has one number per output row. Stages
    and shuffle as in peft `tuners/boft/layer.py`. Of a wider input projection the blocks turn the columns that they are
    for; the others stay as they are.
    """

    kind: ClassVar[str] = "boft"
    blocks: torch.Tensor
    factor: torch.Tensor | None = None

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        size, columns = _check_blocks(self.blocks, shape)
        if channels_of(columns, shape, may_expand=may_expand) is None:
            raise mismatch("BOFT", (columns,), shape)
        if size % 2 and self.blocks.shape[0] > 1:
            raise LoraMismatchError.of("lora.odd_blocks", found=list(self.blocks.shape))
        check_rows("boft_s", self.factor, shape)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        base = widened(weight)
        stages, count, size, _ = self.blocks.shape
        # The block of the file is Cayley's transform of -S; from the right it stands transposed.
        turns = cayley_less_one(skew_of(self.blocks.to(base)).div_(2.0)).mul_(strength)
        known = base.flatten(1)[:, : count * size]
        columns, out = known, known.shape[0]
        for stage in range(stages):
            # Half blocks 2**stage apart become neighbours, are turned and go back; the first stage has no shuffle.
            pairs = (2**stage, size // 2)
            mixed = columns if stage == 0 else columns.reshape(out, -1, 2, *pairs).transpose(2, 3).reshape(out, -1)
            mixed = mixed + turn_columns(mixed, turns[stage])
            columns = mixed if stage == 0 else mixed.reshape(out, -1, pairs[0], 2, pairs[1]).transpose(2, 3).flatten(1)
        delta = filled(columns - known, base.shape)
        return finish(weight, base, scale_rows(base, delta, self.factor, strength), function)

    def rows(self, start: int, length: int) -> PeftBoftAdapter:
        """Every row is turned alike, each with its own factor."""
        factor = None if self.factor is None else self.factor.flatten()[start : start + length]
        return replace(self, factor=factor)


def _check_blocks(blocks: torch.Tensor, shape: Shape) -> tuple[int, int]:
    """The block size, and the number of channels that the blocks turn.

    Raises:
        LoraMismatchError: they are no stages of blocks for a weight of any `shape`.
    """
    if blocks.dim() != 4 or blocks.shape[2] != blocks.shape[3] or not all(blocks.shape):
        raise LoraMismatchError.of(
            "lora.wrong_form", what="BOFT blocks", wanted="(m, n, b, b)", found=list(blocks.shape)
        )
    stages, count, size, _ = blocks.shape
    # The last stage pairs channels across groups of 2**(m - 1) blocks.
    if count % 2 ** (stages - 1):
        raise mismatch("BOFT", (count * size,), shape)
    check_turns(blocks)
    return size, count * size


def _make_peft(found: Found) -> PeftBoftAdapter:
    return PeftBoftAdapter(**found.fields)


register(Kind("peft_boft", _make_peft, peft_keys={"boft_R": "blocks", "boft_s": "factor"}))
