"""What is added to a stored weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from .recipes import HADAMARD, KRONECKER, ROW_SCALED, rank_of_sides


@dataclass(frozen=True, eq=False)
class Factors:
    """Low-rank LoRAs joined along the rank, on the weight's device and in the compute dtype.

    Attributes:
        up: `(out, rank)`.
        down: `(rank, in)`.
        alpha: The factor on their product.
        per_rank: `(rank,)` in fp32, where strengths differ; else None.
        row_scale: `(out,)` in fp32, by which the rows of the stored weight are multiplied first (a DoRA's); None for none.
        times: A second pair of the same shapes, by whose product that of the first is multiplied value by value (a LoHa's). Not
            together with `per_rank`.
        known: What kernels keep of them.
    """

    up: torch.Tensor
    down: torch.Tensor
    alpha: float
    per_rank: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    times: tuple[torch.Tensor, torch.Tensor] | None = None
    known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def form(self) -> str:
        """What stands before the kind of the stored weight in the kernel's."""
        return ("" if self.row_scale is None else ROW_SCALED) + ("" if self.times is None else HADAMARD)

    @property
    def rank(self) -> int:
        """The rank."""
        return self.down.shape[0]


@dataclass(frozen=True, eq=False)
class Sides:
    """A LoKr: `left[i // height, j // width] * right[i % height, j % width] * alpha` at row `i` and column `j`.

    Attributes:
        left: `(out / height, in / width)`, on the weight's device and in the compute dtype.
        right: `(height, width)`, as left.
        alpha: The factor on each number.
        row_scale, known: As `Factors` has them.
    """

    left: torch.Tensor
    right: torch.Tensor
    alpha: float
    row_scale: torch.Tensor | None = None
    known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def form(self) -> str:
        """What stands before the kind of the stored weight in the kernel's."""
        return KRONECKER if self.row_scale is None else ROW_SCALED + KRONECKER

    @property
    def rank(self) -> int:
        """What stands in a rank's place."""
        return rank_of_sides(self.right.shape[1])


Change: TypeAlias = Factors | Sides
"""What is added to a stored weight."""
