"""GLoRA: `delta = b1 @ b2 + W @ a1 @ a2` (arXiv 2306.07967), and the older LyCORIS layout of the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import LoraMismatchError
from .base import Adapter, RowFunction, Shape, add_delta, check_rank, mismatch, product_of
from .dora import check_magnitude, decompose


@dataclass(frozen=True, eq=False)
class GloraAdapter(Adapter):
    """New layout: `a1` `(in, rank)`, `a2` `(rank, in)`, `b1` `(out, rank)`, `b2` `(rank, in * kernel)`.
    Old layout: `a1` `(rank, in)`, `a2` `(in, rank)`, `b1` `(rank, in)`, `b2` `(out, rank)`, with `W @ a2 @ a1 + b2 @ b1`."""

    kind: ClassVar[str] = "glora"
    additive: ClassVar[bool] = False
    a1: torch.Tensor
    a2: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor
    alpha: float | None = None
    magnitude: torch.Tensor | None = None
    as_trained: bool = False

    def is_old(self, shape: Shape) -> bool:
        """Which layout the factors have; a square weight of both readings is taken as old, as the host does."""
        a1, a2, b1, b2 = self.a1.shape, self.a2.shape, self.b1.shape, self.b2.shape
        old = b2[1] == b1[0] == a1[0] == a2[1]
        new = b2[0] == b1[1] == a1[1] == a2[0]
        if old and new:
            return a2[0] == shape[0] == shape[1]
        return old

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        factors = (self.a1, self.a2, self.b1, self.b2)
        if any(f.dim() < 2 or not all(f.shape) for f in factors):
            found = [list(f.shape) for f in factors]
            raise LoraMismatchError.of("lora.not_matrices", what="GLoRA factors", found=found)
        old = self.is_old(shape)
        a_in, a_out = (self.a2, self.a1) if old else (self.a1, self.a2)
        b_out, b_in = (self.b2, self.b1) if old else (self.b1, self.b2)
        check_rank(max(a_in.flatten(1).shape[1], b_out.flatten(1).shape[1]), shape)
        if a_in.flatten(1).shape[1] != a_out.shape[0] or b_out.flatten(1).shape[1] != b_in.shape[0]:
            found = [list(f.shape) for f in factors]
            raise LoraMismatchError.of("lora.no_product", what="GLoRA factors", found=found)
        gives = (b_out.shape[0], product_of(b_in.shape[1:]))
        if gives != (shape[0], product_of(shape[1:])):
            raise mismatch("GLoRA", gives, shape)
        columns = product_of(shape[1:]) if old else shape[1]
        if (a_in.shape[0], product_of(a_out.shape[1:])) != (columns, columns):
            raise mismatch("GLoRA a1/a2", (a_in.shape[0], product_of(a_out.shape[1:])), shape)
        if self.magnitude is not None:
            check_magnitude(self.magnitude, shape)

    def rows(self, start: int, length: int) -> GloraAdapter | None:
        a1, a2, b1, b2 = self.a1.shape, self.a2.shape, self.b1.shape, self.b2.shape
        old = b2[1] == b1[0] == a1[0] == a2[1]
        new = b2[0] == b1[1] == a1[1] == a2[0]
        # Of a square weight both readings fit, and the shape of a part would change the choice between them.
        if old == new or self.magnitude is not None:
            return None
        if old:
            return replace(self, b2=self.b2.narrow(0, start, length))
        return replace(self, b1=self.b1.narrow(0, start, length))

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        a1, a2, b1, b2 = (t.flatten(1).to(weight) for t in (self.a1, self.a2, self.b1, self.b2))
        if self.is_old(tuple(weight.shape)):
            rank = self.a1.shape[0]
            delta = torch.addmm(b2 @ b1, weight.flatten(1) @ a2, a1).reshape(weight.shape)
        else:
            rank = self.a2.shape[0]
            delta = torch.einsum("oi...,ir->or...", weight, a1)
            delta = torch.einsum("or...,rj->oj...", delta, a2).reshape(weight.shape)
            delta = delta + (b1 @ b2).reshape(weight.shape)
        scale = 1.0 if self.alpha is None else self.alpha / rank
        if self.magnitude is not None:
            return decompose(weight, delta.mul_(scale), self.magnitude, strength, function, self.as_trained)
        return add_delta(weight, delta, strength * scale, function)
