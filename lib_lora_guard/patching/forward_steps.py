"""The steps of a bypass, one class per cheap form. Each changes a layer's output exactly, for a whole weight or a part."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch

from ..adapters import Slice
from ..adapters.base import add_scaled
from ..adapters.forms import KhatriRao, Kronecker, LowRank
from ..cached_property import cached_property
from ..errors import LayerError, Message, about
from ..memory.out_of_memory import give_back_cached_memory, is_out_of_memory
from ..units import MB
from . import in_ram
from .block_products import InRam, add_to_convolution, add_to_linear
from .device_cache import DeviceCache
from .layer_call import LayerCall
from .low_rank import Block, Entry, JoinedLowRank, Output, Scale, balanced, joins_on, shift_for_fp16

_T = TypeVar("_T")
Parts = tuple[tuple[Block, Scale], ...]
"""Blocks of factors, each with what its product is multiplied with."""


class Step(ABC):
    """One exact change of a layer's output."""

    def run(self, call: LayerCall) -> None:
        """Changes the output of `call`.

        Raises:
            LayerError: Out of memory.
        """
        try:
            (self.on_linear if call.is_linear else self.on_convolution)(call)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise call.out_of_memory() from error

    @abstractmethod
    def on_linear(self, call: LayerCall) -> None:
        """Changes the output of a linear layer."""

    @abstractmethod
    def on_convolution(self, call: LayerCall) -> None:
        """Changes the output of a convolution."""

    def share_factors_with(self, older: Step) -> None:  # noqa: B027  # most steps keep nothing
        """Takes the device copies over from a step that differs in its strength alone."""

    def device_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the factors on a device that computes in `dtype`."""
        return 0

    def drop_device_copies(self) -> None:  # noqa: B027  # most steps keep nothing
        """Frees the copies on devices; the next call makes them again."""

    @property
    def is_resident(self) -> bool:
        """True while copies on a device exist."""
        return False


class ProductStep(Step):
    """`y += scale * up @ (down @ x)` for some blocks of factors, on the device the layer runs on.

    If the device has no room, not even for a slice of tokens, the CPU computes the rest.
    """

    @abstractmethod
    def parts(self, call: LayerCall) -> Parts:
        """Returns the blocks on the device of the output, in its dtype."""

    @abstractmethod
    def parts_in_ram(self, call: LayerCall) -> Parts:
        """Returns the same blocks in RAM and in fp32."""

    def on_linear(self, call: LayerCall) -> None:
        self._add(call, add_to_linear, in_ram.add_to_linear)

    def on_convolution(self, call: LayerCall) -> None:
        self._add(call, add_to_convolution, in_ram.add_to_convolution)

    def _add(
        self,
        call: LayerCall,
        on_device: Callable[[LayerCall, Block, Scale, InRam], None],
        on_cpu: Callable[[LayerCall, Block, Scale], None],
    ) -> None:
        blocks_in_ram = functools.cache(lambda: self.parts_in_ram(call))
        parts = self._parts_on_device(call)
        if parts is None:
            for block, scale in blocks_in_ram():
                on_cpu(call, block, scale)
            return
        for number, (block, scale) in enumerate(parts):
            on_device(call, block, scale, functools.partial(_nth, blocks_in_ram, number))

    def _parts_on_device(self, call: LayerCall) -> Parts | None:
        """Returns None if the device has no room for them and RAM may have."""
        try:
            return _again_without_cache(lambda: self.parts(call), call, lambda: self.device_bytes(call.output.dtype))
        except LayerError:
            if not call.has_other_memory:
                raise
        return None


class LowRankStep(ProductStep):
    """Low-rank terms, joined along the rank.

    Args:
        entries: The terms.
        shape: The shape of the weight.
    """

    keeps_parts: ClassVar[bool] = True
    """True if `parts_on` returns the same tensors again."""

    def __init__(self, entries: Sequence[Entry], shape: tuple[int, ...]) -> None:
        self.joined = JoinedLowRank(entries, shape)

    @property
    def is_one_product(self) -> bool:
        """True if one `up @ down` is what the terms add to the weight, together."""
        return self.joined.is_one_product

    @property
    def rank(self) -> int:
        """The rank of all terms together."""
        return self.joined.rank

    def parts_on(self, device: torch.device, dtype: torch.dtype) -> Parts:
        """Returns the blocks on `device`. The same object as long as they and the strengths are the same."""
        return self.joined.known_parts(device, dtype) or self.joined.parts(device, dtype)

    def on_linear(self, call: LayerCall) -> None:
        if not self._add_at_once(call):
            super().on_linear(call)

    def _add_at_once(self, call: LayerCall) -> bool:
        """Adds the product of one block for all tokens, in as little of the processor's time as there is: of hundreds of layers
        a step may wait for the processor and not for the card.

        Returns:
            False, with nothing changed, where something has to be made first or is out of the usual; then the long way goes.
        """
        output, x = call.output, call.x
        parts = self.joined.known_parts(output.device, output.dtype)
        if parts is None or len(parts) != 1 or not output.is_contiguous():
            return False
        block, scale = parts[0]
        if block.part is not None or len(block.outputs) != 1 or block.outputs[0].part is not None:
            return False
        try:
            # Neither writes before it has allocated, so that the long way can begin anew.
            activation = torch.nn.functional.linear(x.view(-1, x.shape[-1]), block.down)
            if scale.per_rank is not None:
                activation.mul_(scale.per_rank)
            output.view(-1, output.shape[-1]).addmm_(activation, block.outputs[0].up.t(), alpha=scale.alpha)
        except RuntimeError:
            # No memory, or an input that is no such view as a whole. Any other error comes again.
            return False
        return True

    def share_factors_with(self, older: Step) -> None:
        if isinstance(older, LowRankStep):
            self.joined.share_factors_with(older.joined)

    def device_bytes(self, dtype: torch.dtype) -> int:
        return self.joined.device_bytes(dtype)

    def drop_device_copies(self) -> None:
        self.joined.drop_device_copies()

    @property
    def is_resident(self) -> bool:
        return self.joined.is_resident

    def parts(self, call: LayerCall) -> Parts:
        return self.joined.parts(call.output.device, call.output.dtype)

    def parts_in_ram(self, call: LayerCall) -> Parts:
        return self.joined.parts_in_ram(joins_on(call.output.device))


class KhatriRaoStep(ProductStep):
    """A LoHa of small rank, as the low-rank pair that it equals.

    Every call makes the pair anew: kept, it would take r times the memory of the file.

    Args:
        form: The factors.
        strength: Of the term.
        part: What it changes of the weight; None for all.
        shape: The shape of the weight.
    """

    keeps_parts: ClassVar[bool] = False

    def __init__(self, form: KhatriRao, strength: float, part: Slice | None, shape: tuple[int, ...]) -> None:
        self.form, self.strength, self.part, self.shape = form, strength, part, shape
        self._copies: DeviceCache[tuple[torch.Tensor, ...]] = DeviceCache()

    def share_factors_with(self, older: Step) -> None:
        if isinstance(older, KhatriRaoStep) and all(map(_is_same, self._factors(), older._factors())):
            self._copies = older._copies

    def device_bytes(self, dtype: torch.dtype) -> int:
        return sum(t.numel() * t.element_size() for t in self._factors())

    def _factors(self) -> tuple[torch.Tensor, ...]:
        return self.form.a1, self.form.b1, self.form.a2, self.form.b2

    def drop_device_copies(self) -> None:
        self._copies.drop()

    @property
    def is_resident(self) -> bool:
        return len(self._copies) > 0

    def parts(self, call: LayerCall) -> Parts:
        return self.parts_on(call.output.device, call.output.dtype)

    def parts_in_ram(self, call: LayerCall) -> Parts:
        return self.parts_on(in_ram.CPU, torch.float32)

    @property
    def is_one_product(self) -> bool:
        """True if the pair is for the whole input of a linear layer."""
        return len(self.shape) == 2 and (self.part is None or self.part.dim == 0)

    @property
    def rank(self) -> int:
        """The rank of the pair."""
        return self.form.rank

    def factors_on(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Returns `a1`, `b1`, `a2` and `b2` on `device`: kept there, in `dtype` or, for fp16, in the file's."""

        def make() -> tuple[torch.Tensor, ...]:
            # In fp16 small numbers would be subnormal before they are multiplied.
            return tuple(t.to(device=device, dtype=None if dtype == torch.float16 else dtype) for t in self._factors())

        return self._copies.get(device, dtype, make)

    def is_two_pairs(self, dtype: torch.dtype) -> bool:
        """Returns True if the two products can be taken as they are, in place of the pair that they equal."""
        return self.part is None and dtype != torch.float16 and self.form.a1.shape[1] == self.form.a2.shape[1]

    def parts_on(self, device: torch.device, dtype: torch.dtype) -> Parts:
        """Returns the pair on `device`, made anew."""
        wide = torch.float32 if dtype == torch.float16 else dtype
        a1, b1, a2, b2 = (t.to(wide) for t in self.factors_on(device, dtype))
        up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
        down = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
        up, down = balanced(LowRank(up, down, 1.0), device, dtype)
        on_input = self.part is not None and self.part.dim == 1
        block = Block(down, self.part if on_input else None, (Output(up, 0, None if on_input else self.part),))
        return ((block, Scale(self.strength * self.form.scale, None)),)


class KroneckerStep(Step):
    """LoKr: with x as `(b, d)`, `(left (x) right) x = left X right^T`: two small products instead of one of weight size.

    It is never joined with other terms. A factorised side is multiplied out only if that makes it smaller.

    Args:
        form: The sides.
        strength: Of the term.
        part: What it changes of the weight; None for all.
        shape: The shape of the weight.
    """

    def __init__(self, form: Kronecker, strength: float, part: Slice | None, shape: tuple[int, ...]) -> None:
        self.form, self.strength, self.part, self.shape = form, strength, part, shape
        self._copies: DeviceCache[tuple[torch.Tensor, tuple[torch.Tensor, ...], float]] = DeviceCache()

    def share_factors_with(self, older: Step) -> None:
        if not isinstance(older, KroneckerStep) or self.form.scale != older.form.scale:
            return
        mine, theirs = (*self.form.left, *self.form.right), (*older.form.left, *older.form.right)
        if (
            len(self.form.left) == len(older.form.left)
            and len(mine) == len(theirs)
            and all(map(_is_same, mine, theirs))
        ):
            self._copies = older._copies

    def device_bytes(self, dtype: torch.dtype) -> int:
        left = self.form.left[0].shape[0] * self.form.left[-1].shape[1]
        whole = self.form.right[0].shape[0] * self.form.right[-1][0].numel()
        return (left + min(whole, sum(t.numel() for t in self.form.right))) * dtype.itemsize

    def drop_device_copies(self) -> None:
        self._copies.drop()

    @property
    def is_resident(self) -> bool:
        return len(self._copies) > 0

    @property
    def is_one_product(self) -> bool:
        """True if the sides are for the whole weight of a linear layer."""
        return len(self.shape) == 2 and self.part is None

    @property
    def columns(self) -> int:
        """The columns of the right side."""
        return self.form.right[-1].shape[1]

    def sides_on(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Returns the left and the right side of a linear layer, in `dtype`, and the factor on their product."""
        left, (right, *rest), scale = self._sides_on(device, dtype)
        for matrix in rest:
            right = matrix @ right
        return left, right, self.strength * scale

    def _sides(self, call: LayerCall) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], float]:
        device, dtype = call.output.device, call.output.dtype
        return _again_without_cache(lambda: self._sides_on(device, dtype), call, lambda: self.device_bytes(dtype))

    def _sides_on(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], float]:
        """Returns the left matrix, the right matrices in the order they are applied, and the scale of the result."""

        def make() -> tuple[torch.Tensor, tuple[torch.Tensor, ...], float]:
            left = _product(self.form.left, device).flatten(1)
            rights = [t.to(device=device, dtype=torch.float32).flatten(1) for t in reversed(self.form.right)]
            if len(rights) == 2 and rights[1].shape[0] * rights[0].shape[1] <= rights[0].numel() + rights[1].numel():
                rights = [rights[1] @ rights[0]]
            scale = self.form.scale
            if dtype == torch.float16:
                # Powers of two for each factor: no number of it may be subnormal, and no activation too large.
                factors = [*rights, left]
                for number, factor in enumerate(factors):
                    unit = factor * _to_unit(factor)
                    shift = float((shift_for_fp16(unit) if number == 0 else _shift_to_one(unit)).min())
                    factors[number] = unit * shift
                    scale /= shift * _to_unit(factor)
                *rights, left = factors
            if self.shape[2:]:
                rights[0] = rights[0].reshape(rights[0].shape[0], -1, *self.shape[2:])
            return left.to(dtype), tuple(right.to(dtype) for right in rights), scale

        return self._copies.get(device, dtype, make)

    def on_linear(self, call: LayerCall) -> None:
        left, rights, scale = self._sides(call)
        for flat_in, flat_out in call.flat():
            if self.part is not None and self.part.dim == 1:
                flat_in = flat_in.narrow(1, self.part.start, self.part.length)
            elif self.part is not None:
                flat_out = flat_out.narrow(1, self.part.start, self.part.length)
            self._add_to_rows(call, left, rights, self.strength * scale, flat_in, flat_out)

    def _add_to_rows(
        self,
        call: LayerCall,
        left: torch.Tensor,
        rights: Sequence[torch.Tensor],
        scale: float,
        flat_in: torch.Tensor,
        flat_out: torch.Tensor,
    ) -> None:
        def add(start: int, length: int) -> None:
            x = flat_in.narrow(0, start, length).reshape(length, left.shape[1], -1)
            for right in rights:
                x = torch.nn.functional.linear(x, right)
            add_scaled(flat_out.narrow(0, start, length), torch.matmul(left, x).flatten(1), scale)

        call.in_chunks(flat_in.shape[0], add)

    def on_convolution(self, call: LayerCall) -> None:
        left, (right, *rest), scale = self._sides(call)
        x, target = call.input_of(self.part), call.output_of(self.part)
        # The right side as a convolution, with the left side's columns as further batches.
        inner = call.layer._conv_forward(x.reshape(x.shape[0] * left.shape[1], -1, *x.shape[2:]), right, None)
        for matrix in rest:
            inner = torch.matmul(matrix, inner.flatten(2))
        result = torch.matmul(left, inner.reshape(x.shape[0], left.shape[1], -1)).reshape(target.shape)
        add_scaled(target, result, self.strength * scale)


class ScaleStep(Step):
    """Rows of the weight multiplied by `factor`: `y = factor * (y - b) + b`. The bias b is not scaled.

    Args:
        factor: One number, or one per row of the weight.
        part: The rows; None for all.
        bias_of: Returns the bias of a layer.
    """

    def __init__(
        self,
        factor: torch.Tensor | float,
        part: Slice | None,
        bias_of: Callable[[torch.nn.Module], torch.Tensor | None],
    ) -> None:
        self.factor, self.part, self._bias_of = factor, part, bias_of
        self._copies: DeviceCache[torch.Tensor] = DeviceCache()
        self._less: DeviceCache[torch.Tensor] = DeviceCache()
        self._of_rows: DeviceCache[torch.Tensor] = DeviceCache()

    def drop_device_copies(self) -> None:
        self._copies.drop()
        self._less.drop()
        self._of_rows.drop()

    def of_rows(self, rows: int, device: torch.device) -> torch.Tensor:
        """Returns the factor of each row of a weight with so many rows, `(rows,)` in fp32 on `device`."""
        factor = self._on(device).view(-1)
        if factor.numel() == rows:
            return factor
        scales = [(self.factor, self.part)]
        return self._of_rows.get(device, torch.float32, lambda: whole_scale(scales, rows).to(device))

    def _on(self, device: torch.device) -> torch.Tensor:
        # fp32 whatever the activations are: near 1 the steps of bf16 are larger than most of the change.
        return self._copies.get(
            device, torch.float32, lambda: torch.as_tensor(self.factor, dtype=torch.float32).to(device)
        )

    def on_linear(self, call: LayerCall) -> None:
        self.on_convolution(call)

    def on_convolution(self, call: LayerCall) -> None:
        target = call.output_of(self.part)
        spatial = [1] * (0 if call.is_linear else target.dim() - 2)
        bias = self._bias_of(call.layer)
        if bias is not None:
            bias = bias.to(target.device)
            if self.part is not None:
                bias = bias.narrow(0, self.part.start, self.part.length)
            bias = bias.view(-1, *spatial)
        has_gradient = torch.is_grad_enabled()  # `out=` has none
        if self._fits(target.dtype) and not has_gradient:
            self._in_one_dtype(target, bias, spatial)
            return
        factor = self._on(target.device).view(-1, *spatial)
        if bias is None:
            target.mul_(factor)
            return
        shift = (1 - factor) * bias.float()
        if has_gradient:
            target.mul_(factor).add_(shift)
        else:
            # One pass over the output instead of two, rounded once.
            torch.addcmul(shift, target, factor, out=target)

    def _fits(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 or (dtype == torch.float16 and self._is_within_fp16)

    @cached_property
    def _is_within_fp16(self) -> bool:
        """False for a row of next to nothing that is scaled up beyond what fp16 can hold."""
        less = 1 - torch.as_tensor(self.factor, dtype=torch.float32)
        return bool(less.abs().max() <= torch.finfo(torch.float16).max)

    def _in_one_dtype(self, target: torch.Tensor, bias: torch.Tensor | None, spatial: Sequence[int]) -> None:
        """Takes `(1 - factor) * (y - b)` away, rounded once. All is of one dtype: mixed ones take a card several times as long.

        In 16 bits that is the change, rounded; of `factor` itself, near 1, most of the change would be lost.
        """
        device, dtype = target.device, target.dtype
        less = self._less.get(device, dtype, lambda: (1 - self._on(device)).to(dtype)).view(-1, *spatial)
        if bias is None:
            target.addcmul_(target, less, value=-1)
        else:
            torch.lerp(target, bias.to(dtype), less, out=target)


def whole_scale(scales: Sequence[tuple[torch.Tensor | float, Slice | None]], rows: int) -> torch.Tensor:
    """Returns the factors on parts of a weight with so many rows as one factor for each row, `(rows,)` in fp32 and in RAM."""
    whole = torch.ones(rows, device="cpu")
    for factor, part in scales:
        of_part = whole if part is None else part.of(whole)
        of_part.mul_(torch.as_tensor(factor, dtype=torch.float32, device="cpu").reshape(-1))
    return whole


def _nth(parts: Callable[[], Parts], number: int) -> tuple[Block, Scale]:
    return parts()[number]


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _product(side: tuple[torch.Tensor, ...], device: torch.device) -> torch.Tensor:
    """Multiplies a side of a LoKr out, in fp32. Its convolution dimensions stay."""
    if len(side) == 1:
        return side[0].to(device=device, dtype=torch.float32)
    return side[0].to(device=device, dtype=torch.float32) @ side[1].to(device=device, dtype=torch.float32)


def _to_unit(matrix: torch.Tensor) -> float:
    """Returns the power of two that brings the largest entry of `matrix` to between 1 and 2."""
    largest = float(matrix.abs().max())
    return 2.0 ** -math.floor(math.log2(largest)) if largest > 0 and math.isfinite(largest) else 1.0


def _shift_to_one(matrix: torch.Tensor) -> torch.Tensor:
    """Returns a power of two, at most 1, per row: with it the row makes no input larger."""
    return torch.exp2(-matrix.abs().sum(1).clamp_min(1.0).log2().ceil())


def _again_without_cache(make: Callable[[], _T], call: LayerCall, size_bytes: Callable[[], int]) -> _T:
    try:
        return make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        give_back_cached_memory()
    try:
        return make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = Message("memory.factors", {"size_mb": size_bytes() / MB})
        raise LayerError(about(call.key, why)) from error
