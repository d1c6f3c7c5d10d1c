"""Decodes bitsandbytes' 4-bit weights (NF4, FP4) without bitsandbytes.

Source: bitsandbytes' documentation of `QuantState` and its state-dict layout. The weight is flattened before it is
divided into blocks, so a block may cross rows. The earlier value is in the high nibble; value = level * absmax of its
block. Nested: absmax = nested_code[absmax] * nested_absmax of its block + offset. A stored `quant_map` is ignored, as
by bitsandbytes' kernels: they have the levels built in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .bnb4_layout import Bnb4Layout, Part, find_in_file
from .codec import AnyParts, Decoder, Parts
from .dtype_names import dtype_name
from .nf4 import NF4_LEVELS, values_of_bytes

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_LEVELS = (*(v / 12 for v in _FP4_TWELFTHS), *(-v / 12 for v in _FP4_TWELFTHS))
"""A sign, two bits of exponent and one of mantissa, divided by the largest value; index 8 is minus zero."""

LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}


class Bnb4Decoder(Decoder):
    """Decodes one weight. The parts do not contain the shape, so a decoder is made for one shape.

    `parts`: `data`, the packed bytes in any shape and dtype; `absmax`, one float per block. Nested: `absmax`, one uint8
    per block, with `nested_absmax`, `nested_code` (256) and `offset` (1). Never transposed, unlike bitsandbytes for
    data of shape (1, n).
    """

    def __init__(
        self, quant_type: str, shape: tuple[int, ...], blocksize: int = 64, nested_blocksize: int = 256
    ) -> None:
        """Checks the format's numbers.

        Args:
            quant_type: "nf4" or "fp4".
            shape: The weight's real shape.
            blocksize: Values per absmax; even.
            nested_blocksize: Values of absmax per nested_absmax.

        Raises:
            FileFormatError: One of them is invalid.
        """
        self.layout = Bnb4Layout(quant_type, tuple(shape), blocksize, nested_blocksize)
        self.format, self.shape = self.layout.format, self.layout.shape
        self.block, self.block_bytes = blocksize, blocksize // 2

    def bytes_of(self, shape: Sequence[int]) -> int:
        return (math.prod(shape) + 1) // 2

    def shape_of(self, parts: AnyParts) -> tuple[int, int]:
        self.layout.check({name: _facts(part) for name, part in parts.items()})
        return self.shape[0], math.prod(self.shape[1:])

    def _values(self, parts: AnyParts, start: int, length: int) -> torch.Tensor:
        columns = math.prod(self.shape[1:])
        first, last = start * columns, (start + length) * columns
        # The blocks that cover the rows: a block starts at a whole byte, a row may not.
        block, end = first // self.block, -(-last // self.block)
        packed = parts["data"].reshape(-1).view(torch.uint8)[block * self.block_bytes : end * self.block_bytes]
        values = values_of_bytes(packed, LEVELS[self.format])
        absmax = self._absmax(parts, block, end)
        whole = values.shape[0] // self.block
        values[: whole * self.block].view(whole, self.block).mul_(absmax[:whole, None])
        # The weight's last block may be shorter.
        values[whole * self.block :].mul_(absmax[whole:])
        return values[first - block * self.block :][: last - first].view(length, columns)

    def _absmax(self, parts: AnyParts, start: int, end: int) -> torch.Tensor:
        """Returns the fp32 scales of blocks `start` to `end`."""
        absmax = parts["absmax"].reshape(-1)[start:end]
        if "nested_absmax" not in parts:
            return absmax.float()
        code = parts["nested_code"].reshape(-1).float().index_select(0, absmax.int())
        nested_block = torch.arange(start, end, device=absmax.device) // self.layout.nested_block
        scale = parts["nested_absmax"].reshape(-1).float().index_select(0, nested_block)
        return code.mul_(scale).add_(parts["offset"].float().reshape(()))


def from_quant_state(data: torch.Tensor, quant_state: Any) -> tuple[Bnb4Decoder, Parts]:
    """Returns the decoder and the parts of a parameter made by bitsandbytes.

    Args:
        data: The parameter's packed data.
        quant_state: Its `quant_state`.

    Raises:
        FileFormatError: Sizes do not fit each other.
        ValueError: bitsandbytes has repacked the data for its CPU kernels.
    """
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError("bitsandbytes has repacked this weight for its own CPU kernels; it cannot be decoded here")
    parts = {"data": data, "absmax": quant_state.absmax}
    nested = getattr(quant_state, "state2", None)
    if nested is not None:
        offset = torch.as_tensor(quant_state.offset, dtype=torch.float32, device=data.device)
        parts |= {"nested_absmax": nested.absmax, "nested_code": nested.code, "offset": offset}
    decoder = Bnb4Decoder(
        quant_state.quant_type,
        tuple(quant_state.shape),
        quant_state.blocksize,
        256 if nested is None else nested.blocksize,
    )
    decoder.shape_of(parts)
    return decoder, _in_order(decoder, parts)


def from_file_parts(tensors: AnyParts, name: str) -> tuple[Bnb4Decoder, Parts]:
    """Returns the decoder and the parts of a weight in a safetensors file written by bitsandbytes.

    Args:
        tensors: The file's tensors by name.
        name: The weight's name ("x.weight").

    Raises:
        FileFormatError: A part is missing or does not fit.
    """
    stored = {key: _facts(tensor) for key, tensor in tensors.items() if key.startswith(name)}
    found = find_in_file(stored, lambda key: bytes(tensors[key].flatten().tolist()), name)
    parts = {part: tensors[key] for part, key in found.keys.items()}
    if found.offset is not None:
        parts["offset"] = torch.tensor(found.offset, device=parts["data"].device)
    layout = found.layout
    decoder = Bnb4Decoder(layout.format, layout.shape, layout.block, layout.nested_block)
    return decoder, _in_order(decoder, parts)


def _in_order(decoder: Bnb4Decoder, parts: Parts) -> Parts:
    """Returns the parts with absmax in the order of the weight's blocks."""
    absmax = parts["absmax"]
    if not decoder.layout.is_transposed(tuple(absmax.shape)):
        return parts
    return {**parts, "absmax": absmax.t().reshape(-1)}


def _facts(tensor: torch.Tensor) -> Part:
    return Part(tuple(tensor.shape), dtype_name(tensor.dtype), tensor.numel() * tensor.element_size())
