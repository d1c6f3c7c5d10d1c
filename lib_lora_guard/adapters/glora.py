"""GLoRA: `delta = b1 @ b2 + W @ a1 @ a2` (arXiv 2306.07967), and the older LyCORIS layout of the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import LoraMismatchError
from ..lazy_torch import torch
from .base import RowFunction, Shape, channels_of, check_rank, filled, mismatch, product_of
from .kinds import Found, HostTuple, Kind, register
from .ranked import RankedAdapter


@dataclass(frozen=True, eq=False)
class GloraAdapter(RankedAdapter):
    """New layout: `a1` `(in, rank)`, `a2` `(rank, in)`, `b1` `(out, rank)`, `b2` `(rank, in * kernel)`.

    Old layout: `a1` `(rank, in)`, `a2` `(in, rank)`, `b1` `(rank, in)`, `b2` `(out, rank)`; `W @ a2 @ a1 + b2 @ b1`.

    On a wider input projection W is the columns that the factors know; the others stay as they are.
    """

    kind: ClassVar[str] = "glora"
    a1: torch.Tensor
    a2: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor

    @property
    def rank(self) -> int | None:
        """The smaller side of `b1`, which is the rank in both layouts."""
        return min(self.b1.shape)

    def is_old(self, shape: Shape) -> bool:
        """True if the factors have the old layout; a square weight that fits both is read as old, as the host does."""
        old, new = self._readings()
        if old and new:
            return self.a2.shape[0] == shape[0] <= shape[1]
        return old

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        factors = (self.a1, self.a2, self.b1, self.b2)
        if any(f.dim() < 2 or not all(f.shape) for f in factors):
            found = [list(f.shape) for f in factors]
            raise LoraMismatchError.of("lora.not_matrices", what="GLoRA factors", found=found)
        if len(shape) < 2:
            # It multiplies the weight from the right, which a bias or a norm is too short for.
            raise mismatch("GLoRA", (self.b1.shape[0], product_of(self.b2.shape[1:])), shape)
        old = self.is_old(shape)
        a_in, a_out = (self.a2, self.a1) if old else (self.a1, self.a2)
        b_out, b_in = (self.b2, self.b1) if old else (self.b1, self.b2)
        check_rank(max(a_in.flatten(1).shape[1], b_out.flatten(1).shape[1]), shape)
        if a_in.flatten(1).shape[1] != a_out.shape[0] or b_out.flatten(1).shape[1] != b_in.shape[0]:
            found = [list(f.shape) for f in factors]
            raise LoraMismatchError.of("lora.no_product", what="GLoRA factors", found=found)
        gives = (b_out.shape[0], product_of(b_in.shape[1:]))
        channels = channels_of(gives[1], shape, may_expand=may_expand)
        if gives[0] != shape[0] or channels is None:
            raise mismatch("GLoRA", gives, shape)
        columns = gives[1] if old else channels
        if (a_in.shape[0], product_of(a_out.shape[1:])) != (columns, columns):
            raise mismatch("GLoRA a1/a2", (a_in.shape[0], product_of(a_out.shape[1:])), shape)
        self.check_magnitude(shape, is_narrow=channels < shape[1])

    def rows(self, start: int, length: int) -> GloraAdapter | None:
        old, new = self._readings()
        # If both readings fit, the shape of a part would change the choice between them.
        if old == new or self.magnitude is not None:
            return None
        if old:
            return replace(self, b2=self.b2.narrow(0, start, length))
        return replace(self, b1=self.b1.narrow(0, start, length))

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        a1, a2, b1, b2 = (t.flatten(1).to(weight) for t in (self.a1, self.a2, self.b1, self.b2))
        old, kernel = self.is_old(tuple(weight.shape)), product_of(weight.shape[2:])
        known = weight.narrow(1, 0, (b1 if old else b2).shape[1] // kernel)
        if old:
            rank = self.a1.shape[0]
            delta = torch.addmm(b2 @ b1, known.flatten(1) @ a2, a1)
        else:
            rank = self.a2.shape[0]
            delta = torch.einsum("oi...,ir->or...", known, a1)
            delta = torch.einsum("or...,rj->oj...", delta, a2).flatten(1)
            delta = delta + b1 @ b2
        return self.add(weight, filled(delta, weight.shape), self.scale_for(rank), strength, function)

    def _readings(self) -> tuple[bool, bool]:
        """True for each layout, old and new, that the shapes of the factors allow."""
        a1, a2, b1, b2 = self.a1.shape, self.a2.shape, self.b1.shape, self.b2.shape
        return b2[1] == b1[0] == a1[0] == a2[1], b2[0] == b1[1] == a1[1] == a2[0]


def _make(found: Found) -> GloraAdapter:
    factors = dict(found.fields)
    core = factors.pop("core", None)
    if core is not None:
        # A Tucker core, multiplied into the factor that has the kernel without one.
        b2 = factors["b2"]
        made = core.shape[0] * b2[0].numel() * product_of(core.shape[2:])
        if made > 64 * (core.numel() + b2.numel()):
            raise LoraMismatchError.of("lora.core")
        factors["b2"] = torch.einsum("ri...,ij->rj...", core, b2.flatten(1).to(core))
    return GloraAdapter(**factors, **found.shared)


register(
    Kind(
        "glora",
        _make,
        keys={"a1.weight": "a1", "a2.weight": "a2", "b1.weight": "b1", "b2.weight": "b2", "bm.weight": "core"},
        host=HostTuple(GloraAdapter, ("a1", "a2", "b1", "b2", "alpha"), ("magnitude",)),
    )
)
