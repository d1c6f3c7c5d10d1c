"""Cheap forms: the change an adapter makes, written for a layer's input or output instead of its weight.

Each form is exact and answers for its own fit and cost. `patching.forward_program` runs them. The formulas are in
docs/architecture.md, "What equals what".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from ..lazy_torch import torch

KHATRI_RAO_RANK = 256
"""Largest r1 * r2 of a LoHa that uses bypass (rank 16). Measured at 4608 tokens (docs/gpu.md): rank 16 costs as much as
on the weight side and needs no memory there, rank 32 costs more."""


class CheapForward(ABC):
    """One exact change of what a layer takes or returns."""

    adds_delta: ClassVar[bool] = True
    """True if the form adds a product of its own factors; False if it scales what the weight itself gives."""
    joins: ClassVar[bool] = False
    """True if all such forms on one part of the output share one pass over it."""

    @property
    def scales_input(self) -> bool:
        """True if the layer's input is scaled before the layer multiplies it."""
        return False

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """True if the form changes every value of a weight of `shape`, and none outside it."""

    @abstractmethod
    def device_bytes(self, compute_bytes: int) -> int:
        """Bytes of the factors on the device that runs the layer.

        Args:
            compute_bytes: bytes of one value in the compute dtype.
        """

    @abstractmethod
    def flops(self, shape: tuple[int, ...], tokens: int) -> float:
        """Operations of one call of the layer.

        Args:
            shape: the weight, or the part of it that the form changes.
            tokens: rows of the layer's input; for convolutions, positions of the output.
        """

    def pays(self, one_token: bool) -> bool:
        """True if the form costs less than patching the weight.

        Args:
            one_token: the layer sees one token a picture instead of thousands.
        """
        return True

    def with_rows(self, order: torch.Tensor) -> CheapForward | None:
        """The form with its output rows reordered, `delta[order]`; None if it cannot be reordered."""
        return None


@dataclass(frozen=True, eq=False)
class LowRank(CheapForward):
    """A delta `scale * up @ down`: `up` is `(out, rank)`, `down` is `(rank, in * kernel)`, both flattened.

    `mid` is the Tucker core `(rank_up, rank_down, *kernel)` of a LoCon; then `down` is `(rank_down, in)`.
    `row_scale` `(out,)` and `column_scale` `(in,)`, fp32, multiply the rows of `up` and the input channels of `down`.
    They stay apart because a product in the factors' own dtype would be rounded.
    """

    joins: ClassVar[bool] = True
    up: torch.Tensor
    down: torch.Tensor
    scale: float
    mid: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.up.shape[1]

    @property
    def is_pair(self) -> bool:
        """True if the delta is these two matrices as they are."""
        return self.mid is None and self.row_scale is None and self.column_scale is None

    @property
    def columns(self) -> int:
        """Input channels times kernel size."""
        kernel = 1 if self.mid is None else math.prod(self.mid.shape[2:])
        return self.down.shape[1] * kernel

    def fits(self, shape: tuple[int, ...]) -> bool:
        return (self.up.shape[0], self.columns) == (shape[0], math.prod(shape[1:]))

    def device_bytes(self, compute_bytes: int) -> int:
        return (self.up.numel() + self.rank * self.columns) * compute_bytes

    def flops(self, shape: tuple[int, ...], tokens: int) -> float:
        return 2.0 * tokens * _low_rank_values(self.rank, shape)

    def with_rows(self, order: torch.Tensor) -> LowRank:
        return replace(self, up=self.up[order])

    def dense_up(self, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """`up` as `(out, rank)` with the row scale multiplied in."""
        if self.row_scale is None:
            return self.up.to(device=device, dtype=dtype)
        up = self.up.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
        return (up * self.row_scale.to(device).unsqueeze(1)).to(dtype)

    def dense_down(self, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """`down` as `(rank, in * kernel)` with the Tucker core and the column scale multiplied in."""
        wide = dtype if self.column_scale is None else torch.promote_types(dtype, torch.float32)
        down = self.down.to(device=device, dtype=wide)
        if self.mid is not None:
            mid = self.mid.to(device=device, dtype=wide)
            down = torch.einsum("ri...,ij->rj...", mid, down).flatten(1)
        if self.column_scale is not None:
            columns = self.column_scale.to(device)
            kernel = down.shape[1] // columns.shape[0]
            down = down * columns.repeat_interleave(kernel)
        return down.to(dtype)


@dataclass(frozen=True, eq=False)
class KhatriRao(CheapForward):
    """A delta `scale * (a1 @ b1) * (a2 @ b2)`, elementwise: a low-rank term of rank r1 * r2."""

    a1: torch.Tensor
    b1: torch.Tensor
    a2: torch.Tensor
    b2: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r1 * r2."""
        return self.a1.shape[1] * self.a2.shape[1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        return (self.a1.shape[0], self.b1.shape[1]) == (shape[0], math.prod(shape[1:]))

    def device_bytes(self, compute_bytes: int) -> int:
        # They stay in the file's dtype: the low-rank pair is made anew for each call.
        return sum(t.numel() * t.element_size() for t in (self.a1, self.b1, self.a2, self.b2))

    def flops(self, shape: tuple[int, ...], tokens: int) -> float:
        return 2.0 * tokens * _low_rank_values(self.rank, shape)

    def pays(self, one_token: bool) -> bool:
        return self.rank <= KHATRI_RAO_RANK


@dataclass(frozen=True, eq=False)
class Kronecker(CheapForward):
    """A delta `scale * left (x) right`: `left` `(a, b)`, `right` `(c, d, *kernel)`; a side may be a product of two."""

    left: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]
    scale: float

    def fits(self, shape: tuple[int, ...]) -> bool:
        rows = self.left[0].shape[0] * self.right[0].shape[0]
        columns = self.left[-1].shape[1] * self.right[-1][0].numel()
        return (rows, columns) == (shape[0], math.prod(shape[1:]))

    def device_bytes(self, compute_bytes: int) -> int:
        left = self.left[0].shape[0] * self.left[-1].shape[1]
        # A factorised right side is multiplied out only where that makes it smaller.
        whole = self.right[0].shape[0] * self.right[-1][0].numel()
        return (left + min(whole, sum(t.numel() for t in self.right))) * compute_bytes

    def flops(self, shape: tuple[int, ...], tokens: int) -> float:
        # The right side on all columns, then the left side on all rows of that.
        values = math.prod(shape[1:]) * self.right[0].shape[0] + self.left[-1].shape[1] * shape[0]
        return 2.0 * tokens * values

    def pays(self, one_token: bool) -> bool:
        # With many tokens the two products and two temporaries of the output's size cost more than the weight side, in
        # time and in memory (measured, docs/gpu.md: +25 % against +13 %, 254 MB against none).
        return one_token


@dataclass(frozen=True, eq=False)
class OutputScale(CheapForward):
    """Row `i` of the weight is multiplied by `1 + strength * difference[i]`; the bias is not."""

    adds_delta: ClassVar[bool] = False
    difference: torch.Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.difference.numel() == shape[0]

    def device_bytes(self, compute_bytes: int) -> int:
        return 0  # one number a channel is no more than a bias

    def flops(self, shape: tuple[int, ...], tokens: int) -> float:
        return 2.0 * tokens * shape[0]


@dataclass(frozen=True, eq=False)
class InputScale(CheapForward):
    """Column (input channel) `i` of the weight is multiplied by `1 + strength * difference[i]`."""

    adds_delta: ClassVar[bool] = False
    difference: torch.Tensor

    @property
    def scales_input(self) -> bool:
        return True

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and self.difference.numel() == shape[1]

    def device_bytes(self, compute_bytes: int) -> int:
        return 0  # one number a channel is no more than a bias

    def flops(self, shape: tuple[int, ...], tokens: int) -> float:
        return 2.0 * tokens * shape[0]


@dataclass(frozen=True, eq=False)
class Decomposed(CheapForward):
    """DoRA on a low-rank delta: `magnitude` scales the rows if `by_row`, else the columns.

    It is divided by the norms of the weight with the delta (`patched_norm`), or without it as the host does by row.
    """

    adds_delta: ClassVar[bool] = False
    joins: ClassVar[bool] = True
    delta: LowRank
    magnitude: torch.Tensor
    by_row: bool
    patched_norm: bool

    @property
    def scales_input(self) -> bool:
        return not self.by_row

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.delta.fits(shape)

    def device_bytes(self, compute_bytes: int) -> int:
        return self.delta.device_bytes(compute_bytes)

    def flops(self, shape: tuple[int, ...], tokens: int) -> float:
        return self.delta.flops(shape, tokens)


def _low_rank_values(rank: int, shape: tuple[int, ...]) -> int:
    """Multiplications a token of two products over `rank`."""
    return rank * (shape[0] + math.prod(shape[1:]))
