"""What is added to a stored weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    """

    up: torch.Tensor
    down: torch.Tensor
    alpha: float
    per_rank: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    times: tuple[torch.Tensor, torch.Tensor] | None = None
