"""LoHa: the Hadamard product of two low-rank products (arXiv 2108.06098, as LyCORIS stores it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import LoraMismatchError
from ..lazy_torch import torch
from .base import PatchCost, RowFunction, Shape, check_rank, filled, is_narrower, mismatch, product_of
from .dora import is_by_row
from .forms import KhatriRao
from .kinds import Found, HostTuple, Kind, Size, register
from .ranked import RankedAdapter, make_ranked, rank_along


@dataclass(frozen=True, eq=False)
class LohaAdapter(RankedAdapter):
    """`w?a` `(out, rank)`, `w?b` `(rank, in * kernel)`.

    With Tucker cores `t?` `(rank, rank, *kernel)`: `w?a` `(rank, out)`, `w?b` `(rank, in)`.
    """

    kind: ClassVar[str] = "loha"
    w1a: torch.Tensor
    w1b: torch.Tensor
    w2a: torch.Tensor
    w2b: torch.Tensor
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The rank of the first product, as the host counts it."""
        return rank_along(self.w1b)

    def patch_cost(self) -> PatchCost:
        # Two products, multiplied and added in one pass.
        return PatchCost(passes=6, copies=2) if self.magnitude is None else super().patch_cost()

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        columns: set[int] = set()
        kernel: Shape
        narrow = False
        for a, b, core in ((self.w1a, self.w1b, self.t1), (self.w2a, self.w2b, self.t2)):
            if a.dim() != 2 or b.dim() != 2 or not all(a.shape) or not all(b.shape):
                raise LoraMismatchError.of(
                    "lora.not_both_matrices", what="LoHa factors", a=list(a.shape), b=list(b.shape)
                )
            if core is None:
                fits, gives, kernel = a.shape[1] == b.shape[0], (a.shape[0], b.shape[1]), ()
            else:
                fits = core.dim() > 2 and core.shape[0] == a.shape[0] and core.shape[1] == b.shape[0]
                kernel = tuple(core.shape[2:])
                gives = (a.shape[1], b.shape[1] * product_of(kernel))
            check_rank(a.shape[1] if core is None else max(core.shape[:2]), shape)
            if not fits:
                raise LoraMismatchError.of(
                    "lora.pair_no_product", what="LoHa factors", a=list(a.shape), b=list(b.shape)
                )
            narrow = is_narrower(gives[1], shape)
            fills = may_expand and narrow and (not kernel or kernel == tuple(shape[2:]))
            if gives[0] != shape[0] or (gives[1] != product_of(shape[1:]) and not fills):
                raise mismatch("LoHa", gives, shape)
            columns.add(gives[1])
        if len(columns) > 1:
            raise LoraMismatchError.of("lora.no_product", what="LoHa factors", found=sorted(columns))
        self.check_magnitude(shape, is_narrow=narrow)

    def rows(self, start: int, length: int) -> LohaAdapter | None:
        magnitude = self.magnitude
        if magnitude is not None:
            if not is_by_row(magnitude, (self.w1a.shape[0 if self.t1 is None else 1],)):
                return None
            magnitude = magnitude.narrow(0, start, length)
        return replace(
            self,
            w1a=self.w1a.narrow(0 if self.t1 is None else 1, start, length),
            w2a=self.w2a.narrow(0 if self.t2 is None else 1, start, length),
            magnitude=magnitude,
        )

    def cheap_forward(self) -> KhatriRao | None:
        if self.magnitude is not None or self.t1 is not None or self.t2 is not None:
            return None
        return KhatriRao(self.w1a, self.w1b, self.w2a, self.w2b, self.scale)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        first = _product(self.w1a, self.w1b, self.t1, weight)
        second = _product(self.w2a, self.w2b, self.t2, weight)
        if self.magnitude is None and function is None and first.numel() == weight.numel():
            return weight.addcmul_(first.view(weight.shape), second.view(weight.shape), value=self.scale * strength)
        delta = first.mul_(second)
        return self.add(weight, filled(delta, weight.shape), self.scale, strength, function)


def _product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    a, b = a.to(like), b.to(like)
    if core is None:
        return a @ b
    return torch.einsum("rs...,si,ro->oi...", core.to(like), b, a).flatten(1)


def _make(found: Found) -> LohaAdapter:
    """OneTrainer stores the factors of convolutions as convolutions, `(out, rank, 1, 1)` and `(rank, in, *kernel)`."""
    fields = {
        name: factor.flatten(1) if name.startswith("w") and factor.dim() > 2 else factor
        for name, factor in found.fields.items()
    }
    return make_ranked(LohaAdapter, replace(found, fields=fields))


def _size(shapes: Mapping[str, Shape]) -> Size:
    a, b = shapes.get("w1a", ()), shapes.get("w1b", ())
    return (a[0] if a else None), (b[1] if len(b) > 1 else None)


register(
    Kind(
        "loha",
        _make,
        peft_keys={
            "hada_w1_a": "w1a",
            "hada_w1_b": "w1b",
            "hada_w2_a": "w2a",
            "hada_w2_b": "w2b",
            "hada_t1": "t1",
            "hada_t2": "t2",
        },
        host=HostTuple(LohaAdapter, ("w1a", "w1b", "alpha", "w2a", "w2b"), ("t1", "t2", "magnitude")),
        size=_size,
    )
)
