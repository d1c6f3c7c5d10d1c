"""NF4: 4-bit indices into the quantiles of a normal distribution, one fp32 scale per 64 values.

Source: QLoRA, arXiv 2305.14314, appendix E lists the 16 levels. The earlier value is in the high nibble, as in
bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import FileFormatError
from .codec import AnyParts, Codec, Parts, found

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def values_of_bytes(packed: torch.Tensor, levels: Sequence[float]) -> torch.Tensor:
    """Decodes every byte to its two fp32 levels, in order, as a flat tensor. The earlier value is in the high nibble."""
    table = torch.tensor(levels, dtype=torch.float32, device=packed.device)
    # One look-up per byte returns both values as one 8-byte number: half the memory traffic of unpacking first.
    pairs = torch.cartesian_prod(table, table).view(torch.int64).flatten()
    return pairs.index_select(0, packed.flatten().int()).view(torch.float32)


class Nf4Codec(Codec):
    """NF4 in our own layout, which can be sliced by rows: `data` `(rows, columns / 2)` in uint8, `absmax` `(rows,
    columns / 64)`. `bnb4` decodes bitsandbytes' layout.
    """

    format = "nf4"
    block = 64
    block_bytes = 32

    def encode(self, weight: torch.Tensor) -> Parts:
        blocks = self._blocks(weight)
        absmax = blocks.abs().amax(dim=2)
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        middles = (levels[1:] + levels[:-1]) / 2
        # A block of zeros has absmax 0; its indices are those of level 0.
        unit = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)
        index = torch.bucketize(unit, middles, out_int32=True).to(torch.uint8).flatten(1)
        return {"data": (index[:, 0::2] << 4) | index[:, 1::2], "absmax": absmax}

    def shape_of(self, parts: AnyParts) -> tuple[int, int]:
        data, absmax = parts["data"], parts["absmax"]
        rows, row_bytes = data.shape if data.dim() == 2 else (0, 0)
        blocks = (rows, row_bytes // self.block_bytes)
        if data.dim() != 2 or data.dtype != torch.uint8 or row_bytes % self.block_bytes or absmax.shape != blocks:
            raise FileFormatError(
                f"{self.format}: expected a matrix of uint8 with {self.block_bytes} bytes a block and one absmax a block, "
                f"found {found(data)} and {found(absmax)}"
            )
        return rows, row_bytes * 2

    def _values(self, parts: AnyParts, start: int, length: int) -> torch.Tensor:
        rows = slice(start, start + length)
        absmax = parts["absmax"][rows]
        values = values_of_bytes(parts["data"][rows], NF4_LEVELS).view(*absmax.shape, self.block)
        return values.mul_(absmax.float().unsqueeze(2)).flatten(1)
