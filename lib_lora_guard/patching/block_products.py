"""Adds the product of one block of low-rank factors to a layer's output: whole, in slices, or on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..adapters.base import add_scaled
from ..memory.out_of_memory import give_back_cached_memory, is_out_of_memory
from . import in_ram as on_cpu
from .layer_call import LayerCall
from .low_rank import Block, Scale

InRam = Callable[[], tuple[Block, Scale]]
"""Makes the same block in RAM and in fp32."""


def add_to_linear(call: LayerCall, block: Block, scale: Scale, in_ram: InRam) -> None:
    """Adds the product for all tokens. Out of memory, the slices get smaller; then the CPU computes."""
    for flat_in, flat_out in call.flat():
        _add_to_rows(call, block, scale, in_ram, flat_in, flat_out)


def _add_to_rows(
    call: LayerCall, block: Block, scale: Scale, in_ram: InRam, all_in: torch.Tensor, flat_out: torch.Tensor
) -> None:
    """Adds the product for `flat_out`. `all_in` has every column of the input."""
    flat_in = all_in if block.part is None else all_in.narrow(1, block.part.start, block.part.length)
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
                continue
            except Exception as error:
                if number == 0 or not is_out_of_memory(error):
                    raise
                if not call.has_other_memory:
                    raise call.out_of_memory() from error
            # The first output has its share already, and another run would add it twice: without RAM it ends here.
            try:
                add_on_cpu(start, length, number)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise call.out_of_memory() from error
            return

    def add_on_cpu(start: int, length: int, first_output: int = 0) -> None:
        rows = all_in.narrow(0, start, length), flat_out.narrow(0, start, length)
        on_cpu.add_to_rows(call, *in_ram(), *rows, first_output)

    call.in_chunks(flat_in.shape[0], add, add_on_cpu)


def add_to_convolution(call: LayerCall, block: Block, scale: Scale, in_ram: InRam) -> None:
    """Adds the product for all pictures at once. Out of memory, the CPU computes the outputs that are missing."""
    done = 0
    try:
        for _ in _outputs_of_convolution(call, block, scale):
            done += 1
        return
    except Exception as error:
        if not is_out_of_memory(error) or not call.has_other_memory:
            raise
    give_back_cached_memory()
    on_cpu.add_to_convolution(call, *in_ram(), first_output=done)


def _outputs_of_convolution(call: LayerCall, block: Block, scale: Scale) -> Iterator[None]:
    """Adds one output of the block after the other, and yields after each. An error adds nothing of the next one."""
    x = call.input_of(block.part)
    down = block.down.reshape(block.down.shape[0], x.shape[1], *call.shape[2:])
    # The layer's own convolution has stride, dilation and padding mode as they are now (Forge's tiling changes them).
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
            add_scaled(target, _pointwise(ranks, out.up.view(*out.up.shape, *spatial)), scale.alpha)
        yield


def _pointwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    convolutions = {3: torch.nn.functional.conv1d, 4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}
    result: torch.Tensor = convolutions[x.dim()](x, weight)
    return result
