"""An adapter for a matrix that the model stores with inputs by outputs (`text_projection` of open_clip)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..cached_property import cached_property
from ..lazy_torch import torch
from .base import Adapter, PatchCost, RowFunction, Shape, mismatch


@dataclass(frozen=True, eq=False)
class TransposedAdapter(Adapter):
    """The change that `inner` makes to the transposed weight.

    Attributes:
        inner: the adapter as the file has it, for a weight of outputs by inputs.
    """

    inner: Adapter

    @property
    def kind(self) -> str:  # type: ignore[override]  # users see the kind of the file
        """The kind of the adapter inside."""
        return self.inner.kind

    @property
    def alpha(self) -> float | None:
        """The alpha of the adapter inside; None if it has none."""
        alpha: float | None = getattr(self.inner, "alpha", None)
        return alpha

    @property
    def stands_alone(self) -> bool:  # type: ignore[override]  # of the adapter inside
        """True for a difference inside."""
        return self.inner.stands_alone

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def is_dora(self) -> bool:
        return self.inner.is_dora

    @cached_property
    def bytes(self) -> int:
        return self.inner.bytes

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        if len(shape) != 2:
            raise mismatch(self.kind, shape, shape[:2])
        self.inner.check(shape[::-1], may_expand=False)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        turned = None if function is None else lambda delta: function(delta.t()).t()
        return weight.copy_(self.inner.patch(weight.t().contiguous(), strength, turned).t())

    def patch_cost(self) -> PatchCost:
        cost = self.inner.patch_cost()
        return replace(cost, passes=cost.passes + 4, copies=cost.copies + 1)

    def with_dora_as_trained(self) -> TransposedAdapter:
        return replace(self, inner=self.inner.with_dora_as_trained())

    def tensors(self) -> Iterable[torch.Tensor]:
        return self.inner.tensors()

    def map(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> TransposedAdapter:
        return replace(self, inner=self.inner.map(convert))

    def identity(self) -> tuple[object, ...]:
        return type(self), self.inner.identity()
