"""Decodes bitsandbytes' 4-bit weights (NF4, FP4) without bitsandbytes.

Source: bitsandbytes' documentation of `QuantState` and its state-dict layout. The weight is flattened before it is
divided into blocks, so a block may cross rows. The earlier value is in the high nibble; value = level * absmax of its
block. Nested: absmax = nested_code[absmax] * nested_absmax of its block + offset. A stored `quant_map` is ignored, as
by bitsandbytes' kernels: they have the levels built in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import FileFormatError
from .codec import AnyParts, Decoder, Parts, found
from .nf4 import NF4_LEVELS, values_of_bytes
from .storage import dtype_name

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_LEVELS = (*(v / 12 for v in _FP4_TWELFTHS), *(-v / 12 for v in _FP4_TWELFTHS))
"""A sign, two bits of exponent and one of mantissa, divided by the largest value; index 8 is minus zero."""

LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
NESTED_PARTS = ("nested_absmax", "nested_code", "offset")
LARGEST_STATE_BYTES = 1 << 16
"""The JSON of a real file has about 200 bytes."""


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
        if quant_type not in LEVELS:
            raise FileFormatError(f"bitsandbytes 4-bit: expected quant_type nf4 or fp4, found {quant_type!r}")
        if not shape or not all(_is_count(n) for n in shape):
            raise FileFormatError(f"{quant_type}: expected a shape of positive whole numbers, found {shape!r}")
        if not _is_count(blocksize) or blocksize % 2 or not _is_count(nested_blocksize):
            raise FileFormatError(
                f"{quant_type}: expected an even number of values a block and a positive one of nested blocks, found "
                f"{blocksize!r} and {nested_blocksize!r}"
            )
        self.format = quant_type
        self.shape = tuple(shape)
        self.block, self.block_bytes = blocksize, blocksize // 2
        self.nested_blocksize = nested_blocksize

    def bytes_of(self, shape: Sequence[int]) -> int:
        return (math.prod(shape) + 1) // 2

    def shape_of(self, parts: AnyParts) -> tuple[int, int]:
        values = math.prod(self.shape)
        blocks = -(-values // self.block)
        self._expect("bytes of data", _bytes_in(parts["data"]), self.bytes_of(self.shape))
        self._expect("values of absmax", parts["absmax"].numel(), blocks)
        nested = [name for name in NESTED_PARTS if name in parts]
        if (parts["absmax"].dtype == torch.uint8) != (len(nested) == len(NESTED_PARTS)) or 0 < len(nested) < 3:
            raise FileFormatError(
                f"{self.format}: expected absmax in float, or in uint8 with {', '.join(NESTED_PARTS)}, found "
                f"{dtype_name(parts['absmax'].dtype)} with {', '.join(nested) or 'none of them'}"
            )
        if nested:
            self._expect("values of nested_absmax", parts["nested_absmax"].numel(), -(-blocks // self.nested_blocksize))
            self._expect("values of nested_code", parts["nested_code"].numel(), 256)
            self._expect("values of offset", parts["offset"].numel(), 1)
        return self.shape[0], values // self.shape[0]

    def _expect(self, what: str, count: int, wanted: int) -> None:
        if count != wanted:
            raise FileFormatError(
                f"{self.format}: expected {wanted} {what} for shape {list(self.shape)} in blocks of {self.block}, found "
                f"{count}; the file is damaged"
            )

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
        nested_block = torch.arange(start, end, device=absmax.device) // self.nested_blocksize
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
    return decoder, parts


def from_file_parts(tensors: AnyParts, name: str) -> tuple[Bnb4Decoder, Parts]:
    """Returns the decoder and the parts of a weight in a safetensors file written by bitsandbytes.

    Args:
        tensors: The file's tensors by name.
        name: The weight's name ("x.weight").

    Raises:
        FileFormatError: A part is missing or does not fit.
    """
    states = [key for key in (f"{name}.quant_state.bitsandbytes__{kind}" for kind in LEVELS) if key in tensors]
    if len(states) != 1:
        raise FileFormatError(
            f"{name}: expected one {name}.quant_state.bitsandbytes__nf4 or __fp4, found {len(states)}; the file is not "
            "of bitsandbytes' 4-bit layout"
        )
    state = _state(tensors[states[0]], states[0])
    try:
        parts = {"data": tensors[name], "absmax": tensors[f"{name}.absmax"]}
        if f"{name}.nested_absmax" in tensors:
            parts["nested_absmax"] = tensors[f"{name}.nested_absmax"]
            parts["nested_code"] = tensors[f"{name}.nested_quant_map"]
            parts["offset"] = torch.tensor(float(state["nested_offset"]), device=parts["data"].device)
        shape, kind = state["shape"], state["quant_type"]
        decoder = Bnb4Decoder(
            kind if isinstance(kind, str) else repr(kind),
            tuple(shape) if isinstance(shape, list) else (),
            state["blocksize"],
            state.get("nested_blocksize", 256),
        )
        decoder.shape_of(parts)
    except KeyError as error:
        raise FileFormatError(f"{name}: {error.args[0]} is missing; the file is damaged") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{name}: {error}") from None
    return decoder, parts


def _state(stored: torch.Tensor, key: str) -> Mapping[str, Any]:
    if stored.dtype != torch.uint8 or stored.numel() > LARGEST_STATE_BYTES:
        raise FileFormatError(
            f"{key}: expected JSON in at most {LARGEST_STATE_BYTES} bytes of uint8, found {found(stored)}"
        )
    try:
        state = json.loads(bytes(stored.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{key}: expected JSON, found {type(error).__name__}: {error}") from None
    if not isinstance(state, dict):
        raise FileFormatError(f"{key}: expected a JSON object, found {type(state).__name__}")
    return state


def _bytes_in(data: torch.Tensor) -> int:
    return data.numel() * data.element_size()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
