"""The interface that every kind of adapter implements, and the rules by which adapters stack on one weight.

Terms used throughout: *weight* is the base weight in its real shape, `(out, in)` for a linear layer and
`(out, in / groups, *kernel)` for a convolution; *strength* is the number the user typed; *scale* is the number the file
itself asks for (alpha / rank).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from ..cached_property import cached_property
from ..errors import LoraMismatchError, Message
from ..files.header_tensor import is_tensor
from ..lazy_torch import torch
from .forms import CheapForward

if TYPE_CHECKING:
    from typing_extensions import Self


class WrongSizeError(LoraMismatchError):
    """The change has another size than the weight. Where most of a file is so, it was made for another model."""


class UnsuitedLayerError(LoraMismatchError):
    """The change has no meaning on this one layer. It says nothing about the rest of the file."""


class UnusableStrengthError(LoraMismatchError):
    """The user's strength is no usable number."""


Shape = tuple[int, ...]
RowFunction = Callable[["torch.Tensor"], "torch.Tensor"]
"""A function that a host applies to a delta before it is added."""


@dataclass(frozen=True)
class Slice:
    """A part of a weight: `length` entries from `start` along `dim` (q, k or v inside a fused qkv)."""

    dim: int
    start: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of `tensor`, as a view."""
        return tensor.narrow(self.dim, self.start, self.length)

    def shape_in(self, shape: Shape) -> Shape:
        """The shape of this part of a weight of `shape`.

        Raises:
            WrongSizeError: the part does not lie inside the weight.
        """
        if not (0 <= self.dim < len(shape) and self.start >= 0 and 0 < self.length <= shape[self.dim] - self.start):
            end = self.start + self.length
            raise WrongSizeError.of("lora.outside", start=self.start, end=end, dim=self.dim, shape=list(shape))
        return (*shape[: self.dim], self.length, *shape[self.dim + 1 :])


@dataclass(frozen=True)
class PatchCost:
    """The cost of patching a temporary copy of a weight, counted in tensors of the weight's size.

    Attributes:
        passes: how often a kernel reads or writes such a tensor.
        copies: how many of them lie beside the temporary weight at a time.
        in_fp32: the copies are fp32 instead of the compute dtype.
    """

    passes: int
    copies: int
    in_fp32: bool = False


@cache
def field_names(kind: type[Adapter]) -> tuple[str, ...]:
    """The names of the fields of a class of adapters. Each file asks for them thousands of times."""
    return tuple(field.name for field in fields(kind))


_NO_TENSORS = (type(None), bool, int, float, str)
"""Types of most fields that hold no tensor: whether another one is a tensor takes longer to tell."""
_FITS = "fits"
"""The attribute of an adapter that holds what it was last compared with and fits: a weight's shape, and whether that may grow."""


@dataclass(frozen=True, eq=False)
class Adapter(ABC):
    """The change that one LoRA file makes to one weight.

    Frozen: convert it with `map`, never change it in place.
    """

    kind: ClassVar[str]
    """The name of the kind in logs, tables and messages."""
    is_whole_tensor: ClassVar[bool] = False
    """True if the adapter holds as many numbers as the weight (or is made by another extension)."""
    stands_alone: ClassVar[bool] = False
    """True if a wrong size says nothing about the other adapters of the file."""

    @abstractmethod
    def check(self, shape: Shape, *, may_expand: bool) -> None:
        """Compares the factors with a weight, before anything is computed.

        Args:
            shape: the weight's real shape.
            may_expand: the weight is a model's input projection, which FLUX-tools LoRAs widen.

        Raises:
            WrongSizeError: the weight has another size.
            UnsuitedLayerError: the change has no meaning on this layer.
            LoraMismatchError: the factors contradict one another.
        """

    @abstractmethod
    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        """Returns the patched weight, in the dtype of `weight`.

        Args:
            weight: scratch memory. It may be changed in place and returned, or left and replaced.
            strength: the user's number.
            function: is applied to an additive delta before it is added.
        """

    def rows(self, start: int, length: int) -> Adapter | None:
        """The adapter for `length` rows of the weight from `start`, seen alone.

        None if rows depend on one another or the cut goes through a block.
        """
        return None

    def cheap_forward(self) -> CheapForward | None:
        """The same change in a cheap form; None if only patching the weight is exact."""
        return None

    def patch_cost(self) -> PatchCost:
        """The cost of `patch` on a temporary weight. Unless a kind says less: some ten tensors, in fp32."""
        return PatchCost(passes=20, copies=3, in_fp32=True)

    def forge_patch_cost(self) -> PatchCost:
        """The cost of the same in Forge's own code. Unless a kind says less: two products, multiplied and added."""
        return PatchCost(passes=10, copies=3)

    @property
    def rank(self) -> int | None:
        """The rank that the factors show; None for kinds without one."""
        return None

    @property
    def is_dora(self) -> bool:
        """True if a magnitude is taken and the norms of the weight are needed."""
        return False

    @property
    def covers_bias(self) -> bool:
        """True if the adapter is for the bias of the layer too."""
        return False

    def with_dora_as_trained(self) -> Self:
        """The adapter with a DoRA in its trainer's meaning instead of the host's; itself without a magnitude."""
        return self

    def tensors(self) -> Iterable[torch.Tensor]:
        """The tensors it holds."""
        for name in field_names(type(self)):
            value = getattr(self, name)
            if type(value) not in _NO_TENSORS and is_tensor(value):
                yield value

    def map(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """A copy with every tensor converted (copied out of a file, moved to a device)."""
        copy = object.__new__(type(self))
        # For each weight of a change: `dataclasses.replace` takes more than twice as long.
        for name in field_names(type(self)):
            value = getattr(self, name)
            is_kept = type(value) in _NO_TENSORS or not is_tensor(value)
            copy.__dict__[name] = value if is_kept else convert(value)
        return copy

    def moved(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """`map` for a conversion that leaves shapes as they are: what has fitted a weight still does, and is not asked again."""
        copy = self.map(convert)
        if _FITS in self.__dict__:
            copy.__dict__[_FITS] = self.__dict__[_FITS]
        return copy

    @cached_property
    def bytes(self) -> int:
        """Bytes of its tensors in their dtypes."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @cached_property
    def elements(self) -> int:
        """How many numbers its tensors have."""
        return sum(t.numel() for t in self.tensors())

    @cached_property
    def known_identity(self) -> tuple[object, ...]:
        """What `identity` returns, worked out once: neither tensors nor numbers of an adapter ever change."""
        return self.identity()

    def identity(self) -> tuple[object, ...]:
        """Equal for two adapters that hold the same tensor objects and numbers: a change need not redo these."""
        values = (getattr(self, name) for name in field_names(type(self)))
        return type(self), *(v if v is None or isinstance(v, (int, float, str)) else id(v) for v in values)

    def __getstate__(self) -> dict[str, object]:
        """Returns the fields alone: a deep copy has tensors of its own, and so another identity."""
        return {name: getattr(self, name) for name in field_names(type(self))}


LARGEST_NUMBER = 1e30
"""Limit for strengths and alphas: their product with each other and with the factors must fit into fp32."""

_STRENGTH, _MODEL_STRENGTH = Message("lora.strength"), Message("lora.model_strength")
_ALPHA = Message("lora.alpha")


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter of one LoRA on one weight, with everything the host asks of it.

    Attributes:
        adapter: the change.
        strength: the user's number for the LoRA.
        strength_model: the host's number for the weight itself, multiplied in before the change.
        part: the part of the weight that is changed; None for all of it.
        function: is applied to an additive delta before it is added.
        origin: the LoRA's place in the user's order.
    """

    adapter: Adapter
    strength: float
    strength_model: float = 1.0
    part: Slice | None = None
    function: RowFunction | None = None
    origin: int = 0

    def identity(self) -> tuple[object, ...]:
        """Equal for two terms that change a weight alike."""
        return self.adapter.identity(), self.strength, self.strength_model, self.part, self.function

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        """Checks the numbers and the adapter against a weight; `Adapter.check` explains the arguments.

        Raises:
            LoraMismatchError: the term cannot be applied.
        """
        for number, name in ((self.strength, _STRENGTH), (self.strength_model, _MODEL_STRENGTH)):
            if not abs(number) < LARGEST_NUMBER:
                raise UnusableStrengthError.of("lora.no_usable_strength", name=name, number=number)
        alpha = getattr(self.adapter, "alpha", None)
        if alpha is not None and not abs(alpha) < LARGEST_NUMBER:
            raise LoraMismatchError.of("lora.no_usable_number", name=_ALPHA, number=alpha)
        if alpha is not None and not abs(self.strength * alpha) < LARGEST_NUMBER:
            # Each is within the limit, so the strength is above 1.
            raise UnusableStrengthError.of("lora.no_usable_strength", name=_STRENGTH, number=self.strength)
        if self.part is not None:
            shape, may_expand = self.part.shape_in(shape), False
        # Every change asks again, mostly for the same weight.
        if self.adapter.__dict__.get(_FITS) != (shape, may_expand):
            self.adapter.check(shape, may_expand=may_expand)
            self.adapter.__dict__[_FITS] = shape, may_expand


def apply_terms(weight: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """Applies a whole stack in order, as `merge_lora_to_weight` of the host defines it.

    Args:
        weight: scratch memory of the caller, in the dtype to compute in.
        terms: the stack; each has passed `Term.check`.

    Returns:
        The patched weight. It may be another tensor, and wider if a FLUX-tools LoRA widens an input projection.
    """
    if not weight.numel():
        # A model may have a weight without values. Formulas that count blocks in it have no answer.
        return weight
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
    """Adds `function(factor * delta)` to `weight` in place."""
    if function is None:
        return add_scaled(weight, delta.to(weight.dtype), factor)
    return weight.add_(function((delta * factor).to(weight.dtype)))


def add_scaled(target: torch.Tensor, delta: torch.Tensor, factor: float) -> torch.Tensor:
    """Adds `factor * delta` to `target` in place.

    torch refuses a factor beyond the range of fp16, though small factors of a LoRA may make a product within it.
    """
    if target.dtype != torch.float16 or abs(factor) <= _LARGEST_FP16:
        return target.add_(delta, alpha=factor)
    return target.add_((delta.float() * factor).to(target.dtype))


_LARGEST_FP16 = 65504.0

LARGEST_RANK = 512
"""A rank up to this is never refused. A larger one than both sides of the weight adds nothing that a smaller one could
not, and lets a file of some kilobytes ask for gigabytes of products."""


def check_rank(rank: int, shape: Shape) -> None:
    """Raises LoraMismatchError for a rank that no trainer gives a weight of `shape`."""
    if rank > max(LARGEST_RANK, shape[0], product_of(shape[1:])):
        raise LoraMismatchError.of("lora.rank", rank=rank, shape=list(shape))


def mismatch(what: str, found: Sequence[int], wanted: Sequence[int]) -> WrongSizeError:
    """The error for a delta of another size than the weight: `what` gives `found` instead of `wanted`."""
    return WrongSizeError.of("lora.size", what=what, found=list(found), wanted=list(wanted))


def is_narrower(columns: int, shape: Shape) -> bool:
    """True if a delta of `columns` flattened columns is for fewer input channels than a weight of `shape` has.

    An input projection may have more channels than a LoRA was trained with: an inpainting model's `conv_in` has nine for
    four. The first ones are those of the latent image, so A1111 and SD.Next fill the delta with zeros.
    """
    return len(shape) > 1 and columns < product_of(shape[1:]) and columns % product_of(shape[2:]) == 0


def channels_of(columns: int, shape: Shape, *, may_expand: bool) -> int | None:
    """The input channels of a weight of `shape` that a change of so many flattened columns is for; None if it fits none.

    Args:
        columns: input channels times kernel size, as the file has them.
        shape: the weight's.
        may_expand: the weight is an input projection, which may have more channels than the file knows.
    """
    if len(shape) < 2:
        return None
    if columns == product_of(shape[1:]):
        return shape[1]
    return columns // product_of(shape[2:]) if may_expand and columns and is_narrower(columns, shape) else None


def filled(delta: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`delta` in a weight's `shape`; input channels that it does not have are zeros."""
    if delta.numel() == product_of(shape):
        return delta.reshape(tuple(shape))
    narrow = delta.reshape(shape[0], -1, *shape[2:])
    missing = shape[1] - narrow.shape[1]
    return torch.nn.functional.pad(narrow, (*[0, 0] * (len(shape) - 2), 0, missing))


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copies a tensor that may be mapped from a file into RAM of our own.

    A trainer that overwrites the file would change a mapped tensor; one that truncates it would kill the process.

    Raises:
        LoraMismatchError: a value is not finite.
    """
    with torch.inference_mode(False), torch.no_grad():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        check_values(copy)
    return copy


def check_values(tensor: torch.Tensor, whole_numbers: bool = False) -> None:
    """Checks that a tensor holds finite floating-point numbers.

    Args:
        tensor: on the meta device only its dtype is checked.
        whole_numbers: integers and truth values are allowed too.

    Raises:
        LoraMismatchError: the dtype is another one, or a value is not finite or too large for fp32.
    """
    if not (tensor.is_floating_point() or (whole_numbers and not tensor.is_complex())) or _is_packed(tensor):
        raise LoraMismatchError.of("lora.not_floating", dtype=str(tensor.dtype))
    if tensor.is_meta:
        return
    if tensor.is_floating_point() and not math.isfinite(_sum(tensor)):
        raise LoraMismatchError.of("lora.not_finite")
    if tensor.element_size() == 8 and tensor.numel() and not whole_numbers:
        # A single number may be of a header, where no more than its value is known.
        sides = (tensor,) if tensor.numel() == 1 else tensor.aminmax()
        largest = max(abs(float(side)) for side in sides)
        if largest > LARGEST_FP32:
            raise LoraMismatchError.of("lora.beyond_fp32", largest=largest)


LARGEST_FP32 = 3.4e38
"""Factors are computed with in fp32 or less; torch turns larger numbers of an fp64 file into Inf there."""


def _is_packed(tensor: torch.Tensor) -> bool:
    """True for F4, two numbers in a byte: torch calls it floating-point and cannot convert it."""
    return tensor.element_size() == 1 and "float4" in (getattr(tensor, "dtype_name", None) or str(tensor.dtype))


def _sum(tensor: torch.Tensor) -> float:
    """A sum, which is not finite if a value is not: one pass, and neither a mask nor a copy of the tensor's size."""
    if tensor.numel() == 1:
        return float(tensor)
    flat = tensor.reshape(-1)
    return sum(_sum_of_piece(flat[start : start + SUMMED_VALUES]) for start in range(0, flat.numel(), SUMMED_VALUES))


def _sum_of_piece(piece: torch.Tensor) -> float:
    if piece.element_size() > 1 and math.isfinite(total := float(piece.sum())):
        return total
    # fp8, which torch has no sum of, or values whose sum does not fit into their own dtype.
    return float((piece if piece.element_size() > 1 else piece.float()).double().sum())


SUMMED_VALUES = (1 << 15) - 64
"""Values summed at once: torch wakes all cores for more, which takes longer than the sum, and each reading thread would do so."""


def product_of(shape: Sequence[int]) -> int:
    """The number of values in a tensor of `shape`."""
    return math.prod(shape)
