"""LoKr: a Kronecker product whose sides may be factorised (LyCORIS; arXiv 2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import LoraMismatchError
from .base import Adapter, RowFunction, Shape, add_delta, check_rank, mismatch, product_of
from .dora import check_magnitude, decompose
from .forms import Kronecker


@dataclass(frozen=True, eq=False)
class LokrAdapter(Adapter):
    """`delta = w1 (x) w2`. A side is whole (`w1`, `w2`) or a product (`w1a @ w1b`, `w2a @ w2b`); a convolution's
    second side may have a Tucker core `t2` `(rank, rank, *kernel)` with `w2a` `(rank, out)` and `w2b` `(rank, in)`."""

    kind: ClassVar[str] = "lokr"
    w1: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    alpha: float | None = None
    w1a: torch.Tensor | None = None
    w1b: torch.Tensor | None = None
    w2a: torch.Tensor | None = None
    w2b: torch.Tensor | None = None
    t2: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    as_trained: bool = False

    @property
    def additive(self) -> bool:  # type: ignore[override]  # an instance answers what the class only defaults
        return self.magnitude is None

    @property
    def scale(self) -> float:
        """alpha / rank of a factorised side (the second one where both are); 1 where both sides are whole."""
        rank = None
        if self.w1 is None and self.w1b is not None:
            rank = self.w1b.shape[0]
        if self.w2 is None and self.w2b is not None:
            rank = self.w2b.shape[0]
        return 1.0 if self.alpha is None or rank is None else self.alpha / rank

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        for factor in (self.w1b, self.w2b):
            if factor is not None and factor.dim():
                check_rank(factor.shape[0], shape)
        if self.t2 is not None and self.t2.dim() > 1:
            check_rank(max(self.t2.shape[:2]), shape)
        try:
            left, right = self._sides(torch.empty(0, device="meta"), meta=True)
        except (RuntimeError, ValueError, IndexError) as error:
            raise LoraMismatchError.of("lora.no_product", what="LoKr factors", found=str(error)) from None
        if left.dim() != 2 or right.dim() < 2 or any(not all(t.shape) for t in self.tensors()):
            a, b = list(left.shape), list(right.shape)
            raise LoraMismatchError.of("lora.not_both_matrices", what="LoKr sides", a=a, b=b)
        gives = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1], *right.shape[2:])
        if (gives[0], product_of(gives[1:])) != (shape[0], product_of(shape[1:])):
            raise mismatch("LoKr", gives, shape)
        if self.magnitude is not None:
            check_magnitude(self.magnitude, shape)

    def rows(self, start: int, length: int) -> LokrAdapter | None:
        right = self.w2 if self.w2 is not None else self.w2a
        left = self.w1 if self.w1 is not None else self.w1a
        if right is None or left is None:
            return None
        block = right.shape[1] if self.t2 is not None else right.shape[0]
        if start % block or length % block or (self.magnitude is not None):
            return None
        cut = left.narrow(0, start // block, length // block)
        # alpha counts the rank of a factorised side, which a cut along the rows leaves as it is.
        return replace(self, w1=cut) if self.w1 is not None else replace(self, w1a=cut)

    def cheap_forward(self) -> Kronecker | None:
        if self.magnitude is not None or self.t2 is not None:
            return None
        left = (self.w1,) if self.w1 is not None else (self.w1a, self.w1b)
        right = (self.w2,) if self.w2 is not None else (self.w2a, self.w2b)
        sides = [[t for t in side if t is not None] for side in (left, right)]
        if [len(side) for side in sides] != [len(left), len(right)]:
            return None
        return Kronecker(tuple(sides[0]), tuple(sides[1]), self.scale)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        left, right = self._sides(weight)
        left = left.reshape(*left.shape, *[1] * (right.dim() - 2))
        delta = torch.kron(left, right.contiguous()).reshape(weight.shape)
        if self.magnitude is not None:
            return decompose(weight, delta.mul_(self.scale), self.magnitude, strength, function, self.as_trained)
        return add_delta(weight, delta, strength * self.scale, function)

    def _sides(self, like: torch.Tensor, meta: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        def get(tensor: torch.Tensor | None) -> torch.Tensor:
            if tensor is None:
                raise ValueError("a factor is missing")
            return tensor.to("meta") if meta else tensor.to(like)

        left = get(self.w1) if self.w1 is not None else get(self.w1a) @ get(self.w1b)
        if self.w2 is not None:
            right = get(self.w2)
        elif self.t2 is None:
            right = get(self.w2a) @ get(self.w2b)
        else:
            right = torch.einsum("rs...,si,ro->oi...", get(self.t2), get(self.w2b), get(self.w2a))
        return left, right
