"""Adapters that carry a whole tensor: a difference, a replacement, a nested stack, another extension's own kind."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..cached_property import cached_property
from ..lazy_torch import torch
from .base import Adapter, PatchCost, RowFunction, Shape, Term, add_delta, add_scaled, apply_terms, mismatch
from .kinds import Found, HostTuple, Kind, Size, register


@dataclass(frozen=True, eq=False)
class DiffAdapter(Adapter):
    """`weight += strength * scale * diff`.

    A 4-D diff may be larger than an input convolution, which then grows (inpainting). `scale` is 1 but for the bias of
    a PEFT LoRA (`lora_B.bias`), which alpha / rank scales too.
    """

    kind: ClassVar[str] = "diff"
    is_whole_tensor: ClassVar[bool] = True
    stands_alone: ClassVar[bool] = True
    diff: torch.Tensor
    scale: float = 1.0

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        grows = may_expand and len(shape) == self.diff.dim() == 4 and _widens(tuple(self.diff.shape), shape)
        if without_ones(self.diff.shape) != without_ones(shape) and not grows:
            raise mismatch("diff", self.diff.shape, shape)

    def rows(self, start: int, length: int) -> DiffAdapter:
        return replace(self, diff=self.diff.narrow(0, start, length))

    def patch_cost(self) -> PatchCost:
        return PatchCost(passes=3, copies=2)

    def forge_patch_cost(self) -> PatchCost:
        return PatchCost(passes=3, copies=3)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        if strength == 0.0:
            return weight
        diff = self.diff.to(device=weight.device, dtype=weight.dtype)
        if without_ones(diff.shape) == without_ones(weight.shape):
            return add_scaled(weight, diff.reshape(weight.shape), strength * self.scale)
        grown = weight.new_zeros([max(a, b) for a, b in zip(weight.shape, diff.shape, strict=True)])
        grown[tuple(slice(n) for n in weight.shape)] = weight
        grown[tuple(slice(n) for n in diff.shape)] += diff * (strength * self.scale)
        return grown


WIDEST = 8
"""FLUX-tools and inpainting files widen an input projection up to six times (64 columns to 384)."""


def _widens(diff: Shape, shape: Shape) -> bool:
    """True if `diff` has more input channels than a weight of `shape` and is the same otherwise."""
    return (diff[0], *diff[2:]) == (shape[0], *shape[2:]) and diff[1] <= WIDEST * shape[1]


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the ones at its end: `(out, in, 1, 1)` and `(out, in)` hold the same matrix."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


@dataclass(frozen=True, eq=False)
class SetAdapter(Adapter):
    """Replaces the weight; the strength has no effect, as in the host."""

    kind: ClassVar[str] = "set"
    is_whole_tensor: ClassVar[bool] = True
    value: torch.Tensor

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        if tuple(self.value.shape) != shape:
            raise mismatch("set", self.value.shape, shape)

    def rows(self, start: int, length: int) -> SetAdapter:
        return replace(self, value=self.value.narrow(0, start, length))

    def patch_cost(self) -> PatchCost:
        return PatchCost(passes=2, copies=2)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        return weight.copy_(self.value)


@dataclass(frozen=True, eq=False)
class NestedAdapter(Adapter):
    """A difference that is itself a patched tensor: `weight += strength * apply(terms, base)` (host: a list value)."""

    kind: ClassVar[str] = "nested"
    is_whole_tensor: ClassVar[bool] = True
    stands_alone: ClassVar[bool] = True
    base: torch.Tensor
    terms: tuple[Term, ...] = ()

    def map(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> NestedAdapter:
        inner = tuple(replace(t, adapter=t.adapter.map(convert)) for t in self.terms)
        return replace(self, base=convert(self.base), terms=inner)

    @cached_property
    def bytes(self) -> int:
        return self.base.numel() * self.base.element_size() + sum(t.adapter.bytes for t in self.terms)

    def identity(self) -> tuple[object, ...]:
        return type(self), id(self.base), *(t.identity() for t in self.terms)

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        if tuple(self.base.shape) != shape:
            raise mismatch("nested patch", self.base.shape, shape)
        for term in self.terms:
            term.check(shape, may_expand=False)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        # The host computes the inner stack in fp32 whatever the outer dtype is.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        inner = apply_terms(self.base.to(device=weight.device, dtype=dtype, copy=True), self.terms)
        return add_delta(weight, inner, strength, None)


@dataclass(frozen=True, eq=False)
class ForeignAdapter(Adapter):
    """A kind that another extension registered with the host (`extra_weight_calculators`)."""

    kind: ClassVar[str] = "foreign"
    is_whole_tensor: ClassVar[bool] = True
    name: str
    value: Any
    calculate: Callable[[torch.Tensor, float, Any], torch.Tensor]

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        """Accepts every weight: only the other extension knows what fits."""

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        return self.calculate(weight, strength, self.value)


def _make_diff(found: Found) -> DiffAdapter:
    return DiffAdapter(**found.fields)


def _make_set(found: Found) -> SetAdapter:
    return SetAdapter(**found.fields)


_CONTROL_LORA = ("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale")


def _norm_of_a_control_lora(key: str, names: Container[str]) -> tuple[str, str] | None:
    """BFL's control LoRAs carry whole norms beside their factors, under the model's own names."""
    if key.endswith("_norm.scale") and all(name in names for name in _CONTROL_LORA):
        return key.removesuffix(".scale"), "value"
    return None


def _size(shapes: Mapping[str, Shape]) -> Size:
    diff = shapes.get("diff", ())
    return (diff[0] if diff else None), (diff[1] if len(diff) > 1 else None)


register(
    Kind(
        "diff",
        _make_diff,
        keys={"diff": "diff", "w_norm": "diff"},
        host=HostTuple(DiffAdapter, ("diff",)),
        size=_size,
    )
)
register(
    Kind(
        "set",
        _make_set,
        keys={"set_weight": "value"},
        claim=_norm_of_a_control_lora,
        host=HostTuple(SetAdapter, ("value",)),
    )
)
register(Kind("bias", _make_diff, keys={"diff_b": "diff", "b_norm": "diff"}, parameter="bias"))
register(Kind("set_bias", _make_set, keys={"base_layer.bias": "value"}, parameter="bias"))
