"""The base of LoRA, LoHa, LoKr and GLoRA: a scale of alpha / rank, and a magnitude that makes each of them a DoRA."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from ..lazy_torch import torch
from .base import Adapter, PatchCost, RowFunction, Shape, UnsuitedLayerError, add_delta
from .dora import check_magnitude, decompose
from .kinds import Found

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class RankedAdapter(Adapter):
    """A delta made of factors of some rank.

    Attributes:
        alpha: None if the file states no scale; 1 is used.
        magnitude: `(out, ...)` or one number per input channel; makes the adapter a DoRA.
        as_trained: DoRA in the meaning of its trainer instead of the host's (`dora.py`).
    """

    alpha: float | None = field(default=None, kw_only=True)
    magnitude: torch.Tensor | None = field(default=None, kw_only=True)
    as_trained: bool = field(default=False, kw_only=True)

    @property
    def scale(self) -> float:
        """alpha / rank; 1 if the file states no alpha or the factors show no rank."""
        return self.scale_for(self.rank)

    @property
    def is_dora(self) -> bool:
        return self.magnitude is not None

    def with_dora_as_trained(self) -> Self:
        return self if self.magnitude is None else replace(self, as_trained=True)

    def forge_patch_cost(self) -> PatchCost:
        # Forge's DoRA takes a norm and mixes.
        return super().forge_patch_cost() if self.magnitude is None else PatchCost(passes=14, copies=3)

    def scale_for(self, rank: int | None) -> float:
        """alpha over `rank`; 1 if one of them is not known."""
        return 1.0 if self.alpha is None or rank is None else self.alpha / rank

    def check_magnitude(self, shape: Shape, *, is_narrow: bool = False) -> None:
        """Raises LoraMismatchError for a magnitude that does not fit a weight of `shape`.

        Args:
            shape: the weight's.
            is_narrow: the delta has fewer input channels than the weight.
        """
        if self.magnitude is None:
            return
        if is_narrow:
            # The norms that it was trained with are those of fewer columns.
            raise UnsuitedLayerError.of("lora.narrow_dora", shape=list(shape))
        check_magnitude(self.magnitude, shape)

    def add(
        self, weight: torch.Tensor, delta: torch.Tensor, scale: float, strength: float, function: RowFunction | None
    ) -> torch.Tensor:
        """Adds `scale * delta` to `weight` by `strength`, through the magnitude if there is one. `delta` is scratch."""
        if self.magnitude is not None:
            return decompose(weight, delta.mul_(scale), self.magnitude, strength, function, self.as_trained)
        return add_delta(weight, delta, strength * scale, function)


R = TypeVar("R", bound=RankedAdapter)


def make_ranked(adapter: type[R], found: Found) -> R:
    """Makes an adapter with a rank. PEFT's settings give the alpha that the file's tensors do not."""
    made = adapter(**found.fields, **found.shared)
    if made.alpha is None and made.rank:
        return replace(made, alpha=found.settings.alpha_for(found.module, made.rank))
    return made


def rank_along(factor: torch.Tensor | None) -> int | None:
    """The first size of a factor `(rank, ...)`; None if it is missing or no matrix."""
    return None if factor is None or factor.dim() < 2 else int(factor.shape[0])
