"""LoRA and LoCon: `delta = alpha / rank * up @ down` (arXiv 2106.09685), for convolutions with an optional Tucker core."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import LoraMismatchError
from .base import Adapter, RowFunction, Shape, check_rank, mismatch, product_of
from .dora import check_magnitude, decompose, is_by_row
from .forms import Decomposed, LowRank
from .whole import WIDEST


@dataclass(frozen=True, eq=False)
class LoraAdapter(Adapter):
    """`up` `(out, rank, ...)`, `down` `(rank, in, ...)`; with `mid` `(rank, rank, *kernel)` both outer ones are 1x1.

    `alpha` None means that the file states no scale (1 is used). `magnitude` makes it a DoRA, by default in the host's
    meaning, with `as_trained` in that of the trainers (`as_trained.py`).
    """

    kind: ClassVar[str] = "lora"
    up: torch.Tensor
    down: torch.Tensor
    alpha: float | None = None
    mid: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    as_trained: bool = False

    @property
    def additive(self) -> bool:  # type: ignore[override]  # an instance answers what the class only defaults
        return self.magnitude is None

    @property
    def scale(self) -> float:
        """alpha / rank; the rank is that of `down`, as the host counts it."""
        return 1.0 if self.alpha is None else self.alpha / self.down.shape[0]

    def delta_shape(self) -> tuple[int, int]:
        """`(out, in * kernel)` of the product."""
        kernel = 1 if self.mid is None else product_of(self.mid.shape[2:])
        return self.up.shape[0], product_of(self.down.shape[1:]) * kernel

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        if self.up.dim() < 2 or self.down.dim() < 2 or not all(self.up.shape) or not all(self.down.shape):
            raise LoraMismatchError.of("lora.no_pair", up=list(self.up.shape), down=list(self.down.shape))
        inner_up = product_of(self.up.shape[1:])
        if self.mid is None:
            pairs = inner_up == self.down.shape[0]
        else:
            pairs = self.mid.dim() > 2 and inner_up == self.mid.shape[0] and self.mid.shape[1] == self.down.shape[0]
        if not pairs:
            core = "" if self.mid is None else f" over mid {list(self.mid.shape)}"
            up, down = list(self.up.shape), list(self.down.shape)
            raise LoraMismatchError.of("lora.up_down", up=up, down=down, core=core)
        check_rank(max(inner_up, self.down.shape[0]), shape)
        rows, columns = self.delta_shape()
        wanted = (shape[0], product_of(shape[1:]))
        if rows != wanted[0] or (
            columns != wanted[1] and not (may_expand and len(shape) == 2 and columns <= WIDEST * shape[1])
        ):
            raise mismatch("up @ down", (rows, columns), shape)
        if self.magnitude is not None:
            # Widened, an input projection has the columns of the LoRA.
            check_magnitude(self.magnitude, shape if columns <= wanted[1] else (rows, columns))

    def rows(self, start: int, length: int) -> LoraAdapter | None:
        magnitude = self.magnitude
        if magnitude is not None:
            if not is_by_row(magnitude, (self.up.shape[0],)):
                return None
            magnitude = magnitude.narrow(0, start, length)
        return replace(self, up=self.up.narrow(0, start, length), magnitude=magnitude)

    def cheap_forward(self) -> LowRank | Decomposed:
        delta = LowRank(up=self.up.flatten(1), down=self.down.flatten(1), scale=self.scale, mid=self.mid)
        if self.magnitude is None:
            return delta
        by_row = is_by_row(self.magnitude, (self.up.shape[0],))
        return Decomposed(delta, self.magnitude.flatten(), by_row, patched_norm=not by_row or self.as_trained)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        dtype, device = weight.dtype, weight.device
        up = self.up.flatten(1).to(device=device, dtype=dtype)
        down = LowRank(self.up, self.down.flatten(1), 1.0, self.mid).dense_down(dtype, device)
        weight, down = _widen(weight, down)
        if self.magnitude is not None:
            return decompose(weight, (up @ down).mul_(self.scale), self.magnitude, strength, function, self.as_trained)
        factor = strength * self.scale
        if function is not None:
            return weight.add_(function((up @ down).mul_(factor).reshape(weight.shape)))
        if weight.dim() == 2:
            return weight.addmm_(up, down, alpha=factor)
        return weight.add_((up @ down).reshape(weight.shape), alpha=factor)


def _widen(weight: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads the narrower of a 2-D weight and a low-rank input side with zeros (FLUX-tools input channels)."""
    missing = down.shape[1] - (weight.numel() // weight.shape[0])
    if missing > 0:
        weight = torch.nn.functional.pad(weight, (0, missing))
    elif missing < 0:
        down = torch.nn.functional.pad(down, (0, -missing))
    return weight, down
