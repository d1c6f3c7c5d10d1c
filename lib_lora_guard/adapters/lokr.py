"""LoKr: a Kronecker product whose sides may be factorised (LyCORIS; arXiv 2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import LoraMismatchError
from ..lazy_torch import torch
from .base import PatchCost, RowFunction, Shape, check_rank, filled, is_narrower, mismatch, product_of
from .forms import Kronecker
from .kinds import Found, HostTuple, Kind, Size, register
from .ranked import RankedAdapter, make_ranked, rank_along


@dataclass(frozen=True, eq=False)
class LokrAdapter(RankedAdapter):
    """`delta = w1 (x) w2`. A side is whole (`w1`, `w2`) or a product (`w1a @ w1b`, `w2a @ w2b`).

    A convolution's second side may have a Tucker core `t2` `(rank, rank, *kernel)` with `w2a` `(rank, out)` and `w2b`
    `(rank, in)`.
    """

    kind: ClassVar[str] = "lokr"
    w1: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    w1a: torch.Tensor | None = None
    w1b: torch.Tensor | None = None
    w2a: torch.Tensor | None = None
    w2b: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The rank of a factorised side, the second before the first; None if both are whole: alpha scales neither."""
        second = rank_along(self.w2b) if self.w2 is None else None
        return second if second is not None or self.w1 is not None else rank_along(self.w1b)

    def patch_cost(self) -> PatchCost:
        # The product is made and added in one pass.
        return PatchCost(passes=2, copies=0) if self.magnitude is None else super().patch_cost()

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        for factor in (self.w1b, self.w2b):
            if factor is not None and factor.dim():
                check_rank(factor.shape[0], shape)
        if self.t2 is not None and self.t2.dim() > 1:
            check_rank(max(self.t2.shape[:2]), shape)
        try:
            left, right = self.sides("meta", None)
        except (RuntimeError, ValueError, IndexError) as error:
            raise LoraMismatchError.of("lora.no_product", what="LoKr factors", found=str(error)) from None
        if left.dim() != 2 or right.dim() < 2 or any(not all(t.shape) for t in self.tensors()):
            a, b = list(left.shape), list(right.shape)
            raise LoraMismatchError.of("lora.not_both_matrices", what="LoKr sides", a=a, b=b)
        gives = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1], *right.shape[2:])
        columns = product_of(gives[1:])
        narrow = is_narrower(columns, shape)
        fills = may_expand and narrow and (len(gives) == 2 or gives[2:] == tuple(shape[2:]))
        if gives[0] != shape[0] or (columns != product_of(shape[1:]) and not fills):
            raise mismatch("LoKr", gives, shape)
        self.check_magnitude(shape, is_narrow=narrow)

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
        left, right = self.sides(weight.device, weight.dtype)
        (a, b), (c, d, *kernel) = left.shape, right.shape
        if self.magnitude is None and function is None and (a * c, b * d, *kernel) == tuple(weight.shape):
            # Without a tensor of the weight's size: each of `a x b` blocks gets `right` times one number.
            blocks, left = weight.view(a, c, b, d, *kernel), left.view(a, 1, b, 1, *[1] * len(kernel))
            blocks.addcmul_(left, right.unsqueeze(1), value=self.scale * strength)
            return weight
        left = left.reshape(*left.shape, *[1] * (right.dim() - 2))
        delta = filled(torch.kron(left, right.contiguous()), weight.shape)
        return self.add(weight, delta, self.scale, strength, function)

    def sides(self, device: torch.device | str, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides multiplied out, `(a, b)` and `(c, d, *kernel)`, on `device` and in `dtype`; None for the factors' own.

        Raises:
            ValueError: A factor is missing, or two do not multiply.
        """

        def get(tensor: torch.Tensor | None) -> torch.Tensor:
            if tensor is None:
                raise ValueError("a factor is missing")
            # Without a dtype: what a header says of a tensor lies on the meta device already, and loads no torch for that.
            return tensor.to(device) if dtype is None else tensor.to(device=device, dtype=dtype)

        left = get(self.w1) if self.w1 is not None else _product(get(self.w1a), get(self.w1b))
        if self.w2 is not None:
            right = get(self.w2)
        elif self.t2 is None:
            right = _product(get(self.w2a), get(self.w2b))
        else:
            right = _around_core(get(self.t2), get(self.w2b), get(self.w2a))
        return left, right


# On the meta device a product loads much of torch, einsum its compiler too: 2 s and 70 MB to know a shape.


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if not left.is_meta:
        return left @ right
    if not left.dim() == right.dim() == 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"{list(left.shape)} times {list(right.shape)}")
    return left.new_empty((left.shape[0], right.shape[1]))


def _around_core(core: torch.Tensor, right: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The second side of a Tucker core (rank, rank, kernel): `left` gives its rows, `right` its columns."""
    if not core.is_meta:
        return torch.einsum("rs...,si,ro->oi...", core, right, left)
    if core.dim() < 2 or left.dim() != 2 or right.dim() != 2 or core.shape[:2] != (left.shape[0], right.shape[0]):
        raise ValueError(f"{list(core.shape)} between {list(left.shape)} and {list(right.shape)}")
    return core.new_empty((left.shape[1], right.shape[1], *core.shape[2:]))


def _make(found: Found) -> LokrAdapter:
    adapter = make_ranked(LokrAdapter, found)
    if adapter.alpha is not None or adapter.rank is not None or adapter.w1 is None:
        return adapter
    # PEFT scales whole sides too; LyCORIS, and with it the adapter, does not.
    rank = found.settings.rank_for(found.module)
    alpha = None if rank is None else found.settings.alpha_for(found.module, rank)
    return adapter if rank is None or alpha is None else replace(adapter, w1=adapter.w1.float() * (alpha / rank))


def _size(shapes: Mapping[str, Shape]) -> Size:
    (out1, in1), (out2, in2) = (_side_size(shapes, side) for side in "12")
    return (out1 * out2 if out1 and out2 else None), (in1 * in2 if in1 and in2 else None)


def _side_size(shapes: Mapping[str, Shape], side: str) -> Size:
    if whole := shapes.get(f"w{side}"):
        return whole[0], whole[1] if len(whole) > 1 else None
    a, b = shapes.get(f"w{side}a"), shapes.get(f"w{side}b")
    return (a[0] if a else None), (b[1] if b and len(b) > 1 else None)


register(
    Kind(
        "lokr",
        _make,
        peft_keys={
            "lokr_w1": "w1",
            "lokr_w1_a": "w1a",
            "lokr_w1_b": "w1b",
            "lokr_w2": "w2",
            "lokr_w2_a": "w2a",
            "lokr_w2_b": "w2b",
            "lokr_t2": "t2",
        },
        host=HostTuple(LokrAdapter, ("w1", "w2", "alpha", "w1a", "w1b", "w2a", "w2b"), ("t2", "magnitude")),
        size=_size,
    )
)
