"""The last resort for a layer without VRAM: its low-rank product on the CPU, added to the output piece by piece.

It needs no memory on the device: a piece of the output is copied to RAM, added to there and copied back over itself. (If
the output is not contiguous, torch makes one piece of PIECE_BYTES on the device for that.) Sums are in fp32 whatever the
activations are: CPUs are slow in 16 bits, and the result is rounded once, in a convolution once for each output.
"""

from __future__ import annotations

import torch

from ..units import MB
from .layer_call import LayerCall
from .low_rank import Block, Scale

PIECE_BYTES = 1 * MB
"""Bytes of a piece of the wider one of input and output, in its own dtype."""

CPU = torch.device("cpu")


def add_to_linear(call: LayerCall, block: Block, scale: Scale) -> None:
    """Adds the product of `block` (in RAM, fp32) for all tokens."""
    for flat_in, flat_out in call.flat():
        add_to_rows(call, block, scale, flat_in, flat_out)


def add_to_rows(
    call: LayerCall, block: Block, scale: Scale, flat_in: torch.Tensor, flat_out: torch.Tensor, first_output: int = 0
) -> None:
    """Adds the product of `block` for some tokens.

    Args:
        call: The call of the layer.
        block: The factors, in RAM and fp32.
        scale: The number, or the numbers per rank, that the product is multiplied with.
        flat_in: `(tokens, in)` with all columns, also if the block reads a part of them.
        flat_out: `(tokens, out)`; it is changed in place.
        first_output: The block's outputs before this one are left out.
    """
    call.say_once("memory.on_the_cpu")
    wider = max(flat_in.shape[1], flat_out.shape[1])
    step = max(1, PIECE_BYTES // (wider * flat_out.element_size()))
    for first in range(0, flat_in.shape[0], step):
        count = min(step, flat_in.shape[0] - first)
        # Whole rows are contiguous, so that no second piece is needed for the copy.
        x = flat_in.narrow(0, first, count).to(CPU).float()
        if block.part is not None:
            x = x.narrow(1, block.part.start, block.part.length)
        activation = torch.nn.functional.linear(x, block.down)
        if scale.per_rank is not None:
            activation.mul_(scale.per_rank)
        rows = flat_out.narrow(0, first, count)
        result = rows.to(CPU).float()
        for out in block.outputs[first_output:]:
            target = result if out.part is None else result.narrow(1, out.part.start, out.part.length)
            added = torch.matmul(activation.narrow(1, out.start, out.up.shape[1]), out.up.t())
            target.add_(added, alpha=scale.alpha)
        rows.copy_(result.to(rows.dtype))


def add_to_convolution(call: LayerCall, block: Block, scale: Scale, first_output: int = 0) -> None:
    """Adds the product of `block` to a convolution's output: one picture of the batch and a few channels at a time."""
    call.say_once("memory.on_the_cpu")
    x = call.input_of(block.part)
    down = block.down.reshape(block.down.shape[0], x.shape[1], *call.shape[2:])
    for number in range(x.shape[0]):
        activation = call.layer._conv_forward(x.narrow(0, number, 1).to(CPU).float(), down, None)[0].flatten(1)
        if scale.per_rank is not None:
            activation.mul_(scale.per_rank.view(-1, 1))
        for out in block.outputs[first_output:]:
            target = call.output_of(out.part)[number]
            ranks = activation.narrow(0, out.start, out.up.shape[1])
            step = max(1, PIECE_BYTES // (activation.shape[1] * target.element_size()))
            for first in range(0, target.shape[0], step):
                rows = target.narrow(0, first, min(step, target.shape[0] - first))
                added = torch.matmul(out.up.narrow(0, first, rows.shape[0]), ranks)
                result = rows.to(CPU).float().add_(added.reshape(rows.shape), alpha=scale.alpha)
                rows.copy_(result.to(rows.dtype))
