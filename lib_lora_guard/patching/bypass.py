"""Bypass: the cheap forward of a LoRA added, in place, to what the layer returns. The weight is never touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..adapters import Term
from ..errors import LayerError, LoraGuardError
from ..weights.storage import MB
from .low_rank import Block, JoinedLowRank, Scale

OutOfMemory: tuple[type[BaseException], ...] = (
    getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError),
    MemoryError,
)
SMALLEST_CHUNK_TOKENS = 256
"""Below this a chunk saves nothing: its rank activation is smaller than one allocation of the allocator (2 MB)."""


class Bypass:
    """A forward hook for one linear or convolution layer."""

    def __init__(self, key: str, terms: tuple[Term, ...], shape: tuple[int, ...]) -> None:
        self.key = key
        self.joined = JoinedLowRank(terms, shape)

    def __reduce__(self) -> str:
        raise LoraGuardError("a LoRA is on this model; take it off (guard.remove()) before copying or saving the model")

    def __call__(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        x = (args[0] if args else next(iter(kwargs.values()))).to(output.dtype)
        for block, scale in self._parts(output):
            if len(self.joined.shape) == 2:
                output = self._add_linear(block, scale, x, output)
            else:
                try:
                    output = self._add_convolution(layer, block, scale, x, output)
                except OutOfMemory as error:
                    raise LayerError(
                        f"{self.key}: no memory left for the LoRA of this convolution. Make the picture smaller, or lower 'GPU Weights' by 500 MB"
                    ) from error
        return output

    def _parts(self, output: torch.Tensor) -> tuple[tuple[Block, Scale], ...]:
        try:
            return self.joined.parts(output.device, output.dtype)
        except OutOfMemory:
            _give_back_cached_memory()
        try:
            return self.joined.parts(output.device, output.dtype)
        except OutOfMemory as error:
            size_mb = self.joined.device_bytes(output.dtype) / MB
            raise LayerError(
                f"{self.key}: no memory left for {size_mb:.1f} MB of LoRA factors. Use fewer LoRAs, or lower 'GPU Weights' by 500 MB"
            ) from error

    def _add_linear(self, block: Block, scale: Scale, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        output = output.contiguous()
        flat_in = x.reshape(-1, x.shape[-1])
        flat_out = output.view(-1, output.shape[-1])
        if block.part is not None:
            flat_in = flat_in.narrow(1, block.part.start, block.part.length)
        down = block.down

        def add(start: int, length: int) -> None:
            activation = _scaled(torch.nn.functional.linear(flat_in.narrow(0, start, length), down), scale)
            for out in block.outputs:
                target = flat_out.narrow(0, start, length)
                if out.part is not None:
                    target = target.narrow(1, out.part.start, out.part.length)
                ranks = activation.narrow(1, out.start, out.up.shape[1])
                target.addmm_(ranks, out.up.t(), alpha=scale.alpha)

        self._in_chunks(flat_in.shape[0], add)
        return output

    def _in_chunks(self, total: int, add: Callable[[int, int], None]) -> None:
        """Runs `add` over all tokens, in halves of halves where memory ends. `add` allocates before it writes."""
        start, length = 0, total
        while start < total:
            try:
                add(start, min(length, total - start))
            except OutOfMemory as error:
                length //= 2
                if length < SMALLEST_CHUNK_TOKENS:
                    raise LayerError(
                        f"{self.key}: no memory left for the LoRA even in slices of {SMALLEST_CHUNK_TOKENS} tokens. "
                        "Make the picture smaller, or lower 'GPU Weights' by 500 MB"
                    ) from error
                _give_back_cached_memory()
                continue
            start += length

    def _add_convolution(
        self, layer: Any, block: Block, scale: Scale, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        if block.part is not None:
            x = x.narrow(1, block.part.start, block.part.length)
        down = block.down.reshape(block.down.shape[0], x.shape[1], *self.joined.shape[2:])
        # The layer's own convolution carries stride, dilation and padding mode as they are at this moment (tiling).
        activation = layer._conv_forward(x, down, None)
        if scale.per_rank is not None:
            activation.mul_(scale.per_rank.view(-1, *[1] * (activation.dim() - 2)))
        spatial = [1] * (activation.dim() - 2)
        for out in block.outputs:
            target = output if out.part is None else output.narrow(1, out.part.start, out.part.length)
            ranks = activation.narrow(1, out.start, out.up.shape[1])
            if target.is_contiguous():
                up = out.up.unsqueeze(0).expand(target.shape[0], -1, -1)
                target.flatten(2).baddbmm_(up, ranks.flatten(2), alpha=scale.alpha)
            else:
                target.add_(_pointwise(ranks, out.up.view(*out.up.shape, *spatial)), alpha=scale.alpha)
        return output


def _give_back_cached_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _scaled(activation: torch.Tensor, scale: Scale) -> torch.Tensor:
    return activation if scale.per_rank is None else activation.mul_(scale.per_rank)


def _pointwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    convolutions = {3: torch.nn.functional.conv1d, 4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}
    result: torch.Tensor = convolutions[x.dim()](x, weight)
    return result
