"""NF4: 4-bit indices into the quantiles of a normal distribution, one fp32 scale per 64 values.

Source: QLoRA, arXiv 2305.14314, appendix E gives the 16 levels. Packing: the earlier value in the high nibble, as
bitsandbytes stores it.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .codec import Codec, Parts

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Nf4Codec(Codec):
    format: ClassVar[str] = "nf4"
    block: ClassVar[int] = 64

    def encode(self, weight: torch.Tensor) -> Parts:
        blocks = self._blocks(weight)
        absmax = blocks.abs().amax(dim=2)
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        middles = (levels[1:] + levels[:-1]) / 2
        # A block of zeros has no scale to divide by; its indices are those of level 0.
        unit = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)
        index = torch.bucketize(unit, middles, out_int32=True).to(torch.uint8).flatten(1)
        return {"data": (index[:, 0::2] << 4) | index[:, 1::2], "absmax": absmax}

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        packed, absmax = parts["data"], parts["absmax"].to(dtype)
        # One look-up of a whole byte gives both values: half the memory traffic of unpacking first.
        levels = torch.tensor(NF4_LEVELS, dtype=dtype, device=packed.device)
        pairs = torch.cartesian_prod(levels, levels)
        values = pairs[packed.int()].view(packed.shape[0], -1, self.block)
        return values.mul_(absmax.unsqueeze(2)).flatten(1)
