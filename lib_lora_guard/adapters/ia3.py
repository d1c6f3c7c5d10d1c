"""(IA)^3: a learned factor per output row or input column (arXiv 2205.05638), as LyCORIS and peft store it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .base import Adapter, RowFunction, Shape, mismatch
from .forms import InputScale, OutputScale


@dataclass(frozen=True, eq=False)
class Ia3Adapter(Adapter):
    """`W' = W * (1 + s (weight - centre))`, by input column where `on_input`, else by output row.

    `weight` holds one number per channel in any shape: `(n,)`, `(n, 1)`, `(1, n)`, `(1, n, 1, 1)`. `centre` is the value
    that changes nothing: 0 in LyCORIS (`modules/ia3.py`: a difference from one), 1 in peft (`tuners/ia3/layer.py`: the
    factor). A 1-D weight is a bias: peft scales it along with the rows, LyCORIS does not.
    """

    kind: ClassVar[str] = "ia3"
    additive: ClassVar[bool] = False
    weight: torch.Tensor
    on_input: bool
    centre: float = 0.0

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        axis = 1 if self.on_input else 0
        if len(shape) <= axis or self.weight.numel() != shape[axis]:
            raise mismatch("IA3 on the input" if self.on_input else "IA3 on the output", self.weight.shape, shape)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        channels = [1] * weight.dim()
        channels[1 if self.on_input else 0] = -1
        less_one = (self.weight.to(device=weight.device, dtype=wide) - self.centre).mul_(strength).reshape(channels)
        if function is not None:
            return weight.copy_(weight.to(wide) + function(weight.to(wide) * less_one))
        # In place and yet rounded once: torch multiplies in the wider of the two dtypes.
        return weight.mul_(less_one.add_(1.0))

    def rows(self, start: int, length: int) -> Ia3Adapter:
        """On the input every row is scaled alike, on the output each has its own factor."""
        return self if self.on_input else replace(self, weight=self.weight.flatten()[start : start + length])

    def cheap_forward(self) -> OutputScale | InputScale:
        difference = self.weight.flatten().float() - self.centre
        return InputScale(difference) if self.on_input else OutputScale(difference)
