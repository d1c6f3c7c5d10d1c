"""What a bypass does with a layer's output, one class per cheap form. Each is exact for the whole weight or a part of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..adapters import Slice
from ..adapters.base import KhatriRao, Kronecker, LowRank
from ..errors import LayerError, Message, about
from ..memory.out_of_memory import give_back_cached_memory, is_out_of_memory
from ..weights.storage import MB
from .device_cache import DeviceCache
from .layer_call import LayerCall
from .low_rank import Block, Entry, JoinedLowRank, Output, Scale, balanced, shift_for_fp16

_T = TypeVar("_T")


class Step(ABC):
    """One exact change of a layer's output."""

    def run(self, call: LayerCall) -> None:
        try:
            (self.on_linear if call.is_linear else self.on_convolution)(call)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise call.out_of_memory() from error

    @abstractmethod
    def on_linear(self, call: LayerCall) -> None: ...

    @abstractmethod
    def on_convolution(self, call: LayerCall) -> None: ...

    def share_factors_with(self, older: Step) -> None:  # noqa: B027  # most steps keep nothing
        """Takes over the device copies of a step that differs in its strength alone."""

    def device_bytes(self, dtype: torch.dtype) -> int:
        """Bytes kept on a device while the model runs there."""
        return 0

    def drop_device_copies(self) -> None:  # noqa: B027  # most steps keep nothing
        """Frees what lies on a device for this step."""

    @property
    def is_resident(self) -> bool:
        return False


class LowRankStep(Step):
    """`y += scale * up @ (down @ x)` for all joined entries."""

    def __init__(self, entries: Sequence[Entry], shape: tuple[int, ...]) -> None:
        self.joined = JoinedLowRank(entries, shape)

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

    def on_linear(self, call: LayerCall) -> None:
        for block, scale in self._parts(call):
            _add_block_to_linear(call, block, scale)

    def on_convolution(self, call: LayerCall) -> None:
        for block, scale in self._parts(call):
            _add_block_to_convolution(call, block, scale)

    def _parts(self, call: LayerCall) -> tuple[tuple[Block, Scale], ...]:
        def parts() -> tuple[tuple[Block, Scale], ...]:
            return self.joined.parts(call.output.device, call.output.dtype)

        return _again_without_cache(parts, call, self.device_bytes(call.output.dtype))


class KhatriRaoStep(Step):
    """A LoHa of small rank as the low-rank pair it is. The pair is made for each call: kept, it would be r times the file."""

    def __init__(self, form: KhatriRao, strength: float, part: Slice | None) -> None:
        self.form, self.strength, self.part = form, strength, part
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

    def on_linear(self, call: LayerCall) -> None:
        _add_block_to_linear(call, self._block(call), self._scale)

    def on_convolution(self, call: LayerCall) -> None:
        _add_block_to_convolution(call, self._block(call), self._scale)

    @property
    def _scale(self) -> Scale:
        return Scale(self.strength * self.form.scale, None)

    def _block(self, call: LayerCall) -> Block:
        device, dtype = call.output.device, call.output.dtype
        wide = torch.float32 if dtype == torch.float16 else dtype

        def make() -> tuple[torch.Tensor, ...]:
            # In the file's dtype: small numbers would be subnormal in fp16 before they are multiplied.
            return tuple(t.to(device) for t in self._factors())

        def build() -> tuple[torch.Tensor, torch.Tensor]:
            a1, b1, a2, b2 = (t.to(wide) for t in self._copies.get(device, dtype, make))
            up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
            down = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
            return balanced(LowRank(up, down, 1.0), device, dtype)

        up, down = _again_without_cache(build, call, self.device_bytes(dtype))
        on_input = self.part is not None and self.part.dim == 1
        return Block(down, self.part if on_input else None, (Output(up, 0, None if on_input else self.part),))


class KroneckerStep(Step):
    """LoKr: with x as `(b, d)`, `(left (x) right) x = left X right^T`: two small products instead of one of the weight's
    size. Never joined with other terms. A factorised side is multiplied out only where that makes it smaller."""

    def __init__(self, form: Kronecker, strength: float, part: Slice | None) -> None:
        self.form, self.strength, self.part = form, strength, part
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

    def _sides(self, call: LayerCall) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], float]:
        """Left, the matrices of the right side in the order they are applied in, and what the result is multiplied with."""
        device, dtype = call.output.device, call.output.dtype

        def make() -> tuple[torch.Tensor, tuple[torch.Tensor, ...], float]:
            left = _product(self.form.left, device).flatten(1)
            rights = [t.to(device=device, dtype=torch.float32).flatten(1) for t in reversed(self.form.right)]
            if len(rights) == 2 and rights[1].shape[0] * rights[0].shape[1] <= rights[0].numel() + rights[1].numel():
                rights = [rights[1] @ rights[0]]
            scale = self.form.scale
            if dtype == torch.float16:
                # Powers of two for each factor: its numbers must not be subnormal, no activation on the way too large.
                factors = [*rights, left]
                for number, factor in enumerate(factors):
                    unit = factor * _to_unit(factor)
                    shift = float((shift_for_fp16(unit) if number == 0 else _shift_to_one(unit)).min())
                    factors[number] = unit * shift
                    scale /= shift * _to_unit(factor)
                *rights, left = factors
            if call.shape[2:]:
                rights[0] = rights[0].reshape(rights[0].shape[0], -1, *call.shape[2:])
            return left.to(dtype), tuple(right.to(dtype) for right in rights), scale

        return _again_without_cache(lambda: self._copies.get(device, dtype, make), call, self.device_bytes(dtype))

    def on_linear(self, call: LayerCall) -> None:
        left, rights, scale = self._sides(call)
        flat_in, flat_out = call.flat()
        if self.part is not None and self.part.dim == 1:
            flat_in = flat_in.narrow(1, self.part.start, self.part.length)
        elif self.part is not None:
            flat_out = flat_out.narrow(1, self.part.start, self.part.length)

        def add(start: int, length: int) -> None:
            x = flat_in.narrow(0, start, length).reshape(length, left.shape[1], -1)
            for right in rights:
                x = torch.nn.functional.linear(x, right)
            flat_out.narrow(0, start, length).add_(torch.matmul(left, x).flatten(1), alpha=self.strength * scale)

        call.in_chunks(flat_in.shape[0], add)

    def on_convolution(self, call: LayerCall) -> None:
        left, (right, *rest), scale = self._sides(call)
        x, target = call.input_of(self.part), call.output_of(self.part)
        # The second side as a convolution, with the first side's columns as further batches.
        inner = call.layer._conv_forward(x.reshape(x.shape[0] * left.shape[1], -1, *x.shape[2:]), right, None)
        for matrix in rest:
            inner = torch.matmul(matrix, inner.flatten(2))
        result = torch.matmul(left, inner.reshape(x.shape[0], left.shape[1], -1)).reshape(target.shape)
        target.add_(result, alpha=self.strength * scale)


class ScaleStep(Step):
    """Rows of the weight multiplied by `factor`: `y = factor * (y - b) + b`. The bias stays out of it."""

    def __init__(
        self,
        factor: torch.Tensor | float,
        part: Slice | None,
        bias_of: Callable[[torch.nn.Module], torch.Tensor | None],
    ) -> None:
        self.factor, self.part, self._bias_of = factor, part, bias_of
        self._copies: DeviceCache[torch.Tensor] = DeviceCache()

    def drop_device_copies(self) -> None:
        self._copies.drop()

    def on_linear(self, call: LayerCall) -> None:
        self.on_convolution(call)

    def on_convolution(self, call: LayerCall) -> None:
        target = call.output_of(self.part)
        spatial = [1] * (0 if call.is_linear else target.dim() - 2)
        # fp32 whatever the activations are: near 1 the steps of bf16 are larger than most of what is scaled.
        factor = self._copies.get(
            target.device, torch.float32, lambda: torch.as_tensor(self.factor, dtype=torch.float32).to(target.device)
        )
        per_channel = factor.view(-1, *spatial)
        target.mul_(per_channel)
        bias = self._bias_of(call.layer)
        if bias is not None:
            bias = bias.to(device=target.device, dtype=torch.float32)
            if self.part is not None:
                bias = bias.narrow(0, self.part.start, self.part.length)
            target.add_(((1 - factor) * bias).view(-1, *spatial))


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _add_block_to_linear(call: LayerCall, block: Block, scale: Scale) -> None:
    flat_in, flat_out = call.flat()
    if block.part is not None:
        flat_in = flat_in.narrow(1, block.part.start, block.part.length)
    down = block.down

    def add(start: int, length: int) -> None:
        activation = torch.nn.functional.linear(flat_in.narrow(0, start, length), down)
        if scale.per_rank is not None:
            activation.mul_(scale.per_rank)
        for number, out in enumerate(block.outputs):
            target = flat_out.narrow(0, start, length)
            if out.part is not None:
                target = target.narrow(1, out.part.start, out.part.length)
            try:
                target.addmm_(activation.narrow(1, out.start, out.up.shape[1]), out.up.t(), alpha=scale.alpha)
            except Exception as error:
                if number == 0 or not is_out_of_memory(error):
                    raise
                # The first output has its part already: another run would add it twice.
                raise call.out_of_memory() from error

    call.in_chunks(flat_in.shape[0], add)


def _add_block_to_convolution(call: LayerCall, block: Block, scale: Scale) -> None:
    x = call.input_of(block.part)
    down = block.down.reshape(block.down.shape[0], x.shape[1], *call.shape[2:])
    # The layer's own convolution carries stride, dilation and padding mode as they are at this moment (tiling).
    activation = call.layer._conv_forward(x, down, None)
    spatial = [1] * (activation.dim() - 2)
    if scale.per_rank is not None:
        activation.mul_(scale.per_rank.view(-1, *spatial))
    for out in block.outputs:
        target = call.output_of(out.part)
        ranks = activation.narrow(1, out.start, out.up.shape[1])
        if target.is_contiguous():
            up = out.up.unsqueeze(0).expand(target.shape[0], -1, -1)
            target.flatten(2).baddbmm_(up, ranks.flatten(2), alpha=scale.alpha)
        else:
            target.add_(_pointwise(ranks, out.up.view(*out.up.shape, *spatial)), alpha=scale.alpha)


def _pointwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    convolutions = {3: torch.nn.functional.conv1d, 4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}
    result: torch.Tensor = convolutions[x.dim()](x, weight)
    return result


def _product(side: tuple[torch.Tensor, ...], device: torch.device) -> torch.Tensor:
    """A side of a LoKr in fp32; its convolution dimensions stay."""
    if len(side) == 1:
        return side[0].to(device=device, dtype=torch.float32)
    return side[0].to(device=device, dtype=torch.float32) @ side[1].to(device=device, dtype=torch.float32)


def _to_unit(matrix: torch.Tensor) -> float:
    """The power of two that brings the largest entry of `matrix` to between 1 and 2."""
    largest = float(matrix.abs().max())
    return 2.0 ** -math.floor(math.log2(largest)) if largest > 0 and math.isfinite(largest) else 1.0


def _shift_to_one(matrix: torch.Tensor) -> torch.Tensor:
    """A power of two at most 1 per row, such that the row makes no input larger."""
    return torch.exp2(-matrix.abs().sum(1).clamp_min(1.0).log2().ceil())


def _again_without_cache(make: Callable[[], _T], call: LayerCall, size_bytes: int) -> _T:
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
        why = Message("memory.factors", {"size_mb": size_bytes / MB})
        raise LayerError(about(call.key, why)) from error
