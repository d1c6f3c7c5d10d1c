"""What every kind of adapter can do, and how adapters stack on one weight.

Terms used throughout: *weight* is the base weight in its real shape, `(out, in)` for a linear layer and
`(out, in / groups, *kernel)` for a convolution; *strength* is the number the user typed; *scale* is what the file
itself asks for (alpha / rank).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from ..errors import LoraMismatchError, Message
from .forms import CheapForward

if TYPE_CHECKING:
    from typing_extensions import Self

Shape = tuple[int, ...]
RowFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Slice:
    """A part of a weight: `length` entries from `start` along `dim` (q, k or v inside a fused qkv)."""

    dim: int
    start: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(self.dim, self.start, self.length)

    def shape_in(self, shape: Shape) -> Shape:
        """Shape of this part of a weight of `shape`; raises LoraMismatchError where it does not lie inside."""
        if not (0 <= self.dim < len(shape) and self.start >= 0 and 0 < self.length <= shape[self.dim] - self.start):
            end = self.start + self.length
            raise LoraMismatchError.of("lora.outside", start=self.start, end=end, dim=self.dim, shape=list(shape))
        return (*shape[: self.dim], self.length, *shape[self.dim + 1 :])


@dataclass(frozen=True, eq=False)
class Adapter(ABC):
    """What one LoRA file says about one weight. Frozen: converted with `map`, never changed in place."""

    kind: ClassVar[str]
    additive: ClassVar[bool] = True
    """True when the delta does not depend on the weight, so that the order in a stack is of no matter."""

    def tensors(self) -> Iterable[torch.Tensor]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                yield value

    def map(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """A copy with every tensor converted (copied out of a file, moved to a device)."""
        changed = {f.name: convert(v) for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}
        return replace(self, **changed)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def identity(self) -> tuple[object, ...]:
        """Equal for two adapters that hold the same tensor objects and numbers: what a change need not redo."""
        values = (getattr(self, field.name) for field in fields(self))
        return type(self), *(v if v is None or isinstance(v, (int, float, str)) else id(v) for v in values)

    @abstractmethod
    def check(self, shape: Shape, *, may_expand: bool) -> None:
        """Raises LoraMismatchError unless this adapter fits a weight of `shape`.

        `may_expand`: the weight is a model's input projection, which FLUX-tools LoRAs widen.
        """

    @abstractmethod
    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        """The patched weight. `weight` is scratch: it may be changed in place and returned, or left and replaced.

        Works in the dtype of `weight`. `function` is applied to an additive delta before it is added.
        """

    def rows(self, start: int, length: int) -> Adapter | None:
        """What this adapter says about `length` rows of the weight from `start`, seen alone; None where rows depend on
        one another or the cut falls inside a block."""
        return None

    def cheap_forward(self) -> CheapForward | None:
        """The same as a cheap change of what the layer's call takes or returns; None where only the weight side has it."""
        return None


LARGEST_NUMBER = 1e30
"""Of strengths and alphas: their product with each other and with the factors must fit into fp32."""

_STRENGTH, _MODEL_STRENGTH = Message("lora.strength"), Message("lora.model_strength")
_ALPHA = Message("lora.alpha")


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter of one LoRA on one weight, with everything the host asks of it."""

    adapter: Adapter
    strength: float
    strength_model: float = 1.0
    part: Slice | None = None
    function: RowFunction | None = None
    origin: int = 0
    """Which LoRA of the stack this came from (its place in the user's order)."""

    def identity(self) -> tuple[object, ...]:
        return self.adapter.identity(), self.strength, self.strength_model, self.part, self.function

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        """Raises LoraMismatchError unless this term can be applied to a weight of `shape`."""
        alpha = getattr(self.adapter, "alpha", None)
        for number, name in ((self.strength, _STRENGTH), (self.strength_model, _MODEL_STRENGTH), (alpha, _ALPHA)):
            if number is not None and not abs(number) < LARGEST_NUMBER:
                raise LoraMismatchError.of("lora.no_usable_number", name=name, number=number)
        if self.part is not None:
            shape, may_expand = self.part.shape_in(shape), False
        self.adapter.check(shape, may_expand=may_expand)


def apply_terms(weight: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """`weight` with the whole stack applied in order, as `merge_lora_to_weight` of the host defines it.

    `weight` is scratch of the caller's, in the dtype to compute in. The result may be another tensor, of another
    shape where a FLUX-tools LoRA widens an input projection.
    """
    for term in terms:
        target = weight if term.part is None else term.part.of(weight)
        if term.strength_model != 1.0:
            target.mul_(term.strength_model)
        patched = term.adapter.patch(target, term.strength, term.function)
        if term.part is None:
            weight = patched
        elif patched is not target:
            target.copy_(patched)
    return weight


def add_delta(weight: torch.Tensor, delta: torch.Tensor, factor: float, function: RowFunction | None) -> torch.Tensor:
    """`weight += function(factor * delta)`, in place."""
    if function is None:
        return weight.add_(delta.to(weight.dtype), alpha=factor)
    return weight.add_(function((delta * factor).to(weight.dtype)))


LARGEST_RANK = 512
"""Below this a rank is never refused. Above it, one larger than both sides of the weight says nothing that a smaller one
could not, and a file of some kilobytes could ask for gigabytes of products."""


def check_rank(rank: int, shape: Shape) -> None:
    """Raises LoraMismatchError for a rank that no trainer gives a weight of `shape`."""
    if rank > max(LARGEST_RANK, shape[0], product_of(shape[1:])):
        raise LoraMismatchError.of("lora.rank", rank=rank, shape=list(shape))


def mismatch(what: str, found: Sequence[int], wanted: Sequence[int]) -> LoraMismatchError:
    return LoraMismatchError.of("lora.size", what=what, found=list(found), wanted=list(wanted))


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in RAM of a tensor that may be mapped from a file: a trainer that overwrites the file would change it, one
    that truncates it would kill the process. Raises LoraMismatchError for values that are not finite."""
    with torch.inference_mode(False), torch.no_grad():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        check_values(copy)
    return copy


def check_values(tensor: torch.Tensor, whole_numbers: bool = False) -> None:
    """Raises LoraMismatchError for values that are not finite floating-point numbers (or whole ones, where those will do)."""
    if not (tensor.is_floating_point() or (whole_numbers and not tensor.is_complex())):
        raise LoraMismatchError.of("lora.not_floating", dtype=str(tensor.dtype))
    if tensor.is_meta:
        return
    # NaN and Inf survive a sum, and a sum is one pass without a mask of the tensor's size. fp8 has no sum.
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    if tensor.is_floating_point() and not math.isfinite(float(wide.sum(dtype=torch.float64))):
        raise LoraMismatchError.of("lora.not_finite")


def product_of(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
