"""The same as the kernels in plain torch: the reference of their probes, and what runs where no kernel is used."""

from __future__ import annotations

import torch

from ..weights.bnb4 import LEVELS
from ..weights.gguf_blocks import split_last, unpack_bits
from ..weights.nf4 import values_of_bytes
from .factors import Change, Sides
from .stored import BLOCKS, Bnb4, Fp8, Gguf, Int8, Stored


def dequantised(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Returns the weight `(out, in)` in `dtype`, bit for bit as the host's own dequantisation gives it."""
    if isinstance(stored, (Fp8, Int8)):
        values = _of_scaled(stored, stored.values or dtype)
    elif isinstance(stored, Bnb4):
        values = _of_bnb4(stored).to(stored.values or dtype)
    elif isinstance(stored, Gguf):
        values = _of_gguf(stored, stored.values or torch.float32)
    else:
        raise TypeError(f"expected a stored weight of fp8, int8, bitsandbytes or GGUF, found {type(stored).__name__}")
    return values.to(dtype).view(stored.shape)


def with_factors(weight: torch.Tensor, factors: Change) -> torch.Tensor:
    """Makes `weight * row_scale + (up * per_rank) @ down * alpha` of a weight `(out, in)`, in place, rounding once; returns it.

    With a second pair the product is multiplied by that of the pair. A LoKr's sides are added as `Sides` has it.

    Args:
        weight: The weight in the factors' dtype.
        factors: The joined factors, or the sides.
    """
    if isinstance(factors, Sides):
        return _with_sides(weight, factors)
    up = factors.up
    if factors.per_rank is not None:
        up = (up.float() * factors.per_rank).to(up.dtype)
    if factors.row_scale is None and factors.times is None:
        return weight.addmm_(up, factors.down, alpha=factors.alpha)
    wide = weight.float()
    if factors.row_scale is not None:
        wide.mul_(factors.row_scale.unsqueeze(1))
    if factors.times is None:
        return weight.copy_(wide.addmm_(up.float(), factors.down.float(), alpha=factors.alpha))
    second = factors.times[0].float() @ factors.times[1].float()
    return weight.copy_(wide.addcmul_(up.float() @ factors.down.float(), second, value=factors.alpha))


def _with_sides(weight: torch.Tensor, sides: Sides) -> torch.Tensor:
    left, right = sides.left, sides.right
    wide = weight
    if sides.row_scale is not None:
        wide = weight.float().mul_(sides.row_scale.unsqueeze(1))
        left, right = left.float(), right.float()
    (a, b), (c, d) = left.shape, right.shape
    # Without a tensor of the weight's size: each of `a x b` blocks gets `right` times one number.
    wide.view(a, c, b, d).addcmul_(left.view(a, 1, b, 1), right.unsqueeze(1), value=sides.alpha)
    return weight if wide is weight else weight.copy_(wide)


def _of_scaled(stored: Fp8 | Int8, values: torch.dtype) -> torch.Tensor:
    if stored.scale is None:
        return stored.data.to(values)
    scale = stored.scale.float().reshape(-1, 1)
    return stored.data.float().mul_(scale).to(values)


def _of_bnb4(stored: Bnb4) -> torch.Tensor:
    count = stored.shape[0] * stored.shape[1]
    absmax = stored.absmax.reshape(-1)
    if (nested := stored.nested) is not None:
        scales = nested.scales.reshape(-1).repeat_interleave(nested.block)[: absmax.numel()]
        absmax = nested.code.index_select(0, absmax.int()).mul_(scales).add_(nested.offset)
    values = values_of_bytes(stored.data.reshape(-1).view(torch.uint8), LEVELS[stored.form])[:count]
    whole = count // stored.block
    values[: whole * stored.block].view(whole, stored.block).mul_(absmax[:whole, None])
    values[whole * stored.block :].mul_(absmax[whole:])  # the weight's last block may be shorter
    return values


def _of_gguf(stored: Gguf, values: torch.dtype) -> torch.Tensor:
    """Calculates as Forge's `dequantize_blocks_pytorch` does: each step is rounded to `values`."""
    blocks = stored.data.reshape(-1).view(torch.uint8).view(-1, stored.block_bytes)
    index, scale, minimum = _parts_of_block(blocks, stored, values)
    result = index.to(values).mul_(scale.unsqueeze(-1))
    return result if minimum is None else result.sub_(minimum.unsqueeze(-1))


def _parts_of_block(
    blocks: torch.Tensor, stored: Gguf, values: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns the centred indices `(blocks, groups, group)`, and the scales and minima `(blocks, groups)` in `values`."""
    form, reordered = stored.form, stored.is_reordered
    if form == "Q8_0":
        return blocks[:, 2:].view(torch.int8).unsqueeze(1), _scales(blocks[:, :2], values, reordered), None
    if form == "Q4_0":
        index = _pairs(blocks[:, 2:]) if reordered else _halves(blocks[:, 2:])
        return (index.view(torch.int8) - 8).unsqueeze(1), _scales(blocks[:, :2], values, reordered), None
    if form == "Q5_0":
        fifth = unpack_bits(blocks[:, 2:6], 1, -1).flatten(1)
        index = _halves(blocks[:, 6:]) | (fifth << 4)
        return (index.view(torch.int8) - 16).unsqueeze(1), _scales(blocks[:, :2], values, reordered), None
    if form == "Q6_K":
        low, high, small, d = torch.split(blocks, [128, 64, 16, 2], -1)
        index = unpack_bits(split_last(low, 2, 64), 4, -2).reshape(-1, 256)
        index = index | (unpack_bits(split_last(high, 2, 32), 2, -2).reshape(-1, 256) << 4)
        index = (index.view(torch.int8) - 32).view(-1, 16, 16)
        return index, _scales(d, values, False) * small.view(torch.int8).to(values), None
    if reordered:  # Q4_K
        index = _pairs(blocks[:, 32:]).view(-1, 8, 32)
        return index, _scales(blocks[:, :16], values, True), _scales(blocks[:, 16:32], values, True)
    d, dmin = _scales(blocks[:, :2], values, False), _scales(blocks[:, 2:4], values, False)
    first_scales, first_minima, nibbles = torch.split(blocks[:, 4:16], 4, -1)
    small = torch.cat([first_scales & 63, (nibbles & 15) | (first_scales >> 6 << 4)], -1)
    smallest = torch.cat([first_minima & 63, (nibbles >> 4) | (first_minima >> 6 << 4)], -1)
    index = unpack_bits(split_last(blocks[:, BLOCKS[form][1] - 128 :], 4, 32), 4, -2).reshape(-1, 8, 32)
    if form == "Q5_K":
        index = index | (unpack_bits(blocks[:, 16:48], 1, -2) << 4)
    return index, d * small, dmin * smallest


def _scales(packed: torch.Tensor, values: torch.dtype, in_values: bool) -> torch.Tensor:
    """Reads numbers of two bytes, fp16 as in the file or in `values` already."""
    return packed.contiguous().view(values if in_values else torch.float16).to(values)


def _pairs(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks nibbles that lie in the weight's order, the earlier value low."""
    return unpack_bits(packed, 4, -1).flatten(1)


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks nibbles whose low ones are the first half of a block."""
    return unpack_bits(packed, 4, -2).flatten(1)
