"""The interface of all low-bit storage formats: encode once, decode any rows as often as needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from ..errors import FileFormatError
from .dtype_names import dtype_name
from .storage import FP8_DTYPES

Parts = dict[str, torch.Tensor]
"""The named tensors of one stored weight."""
AnyParts = Mapping[str, torch.Tensor]

SLICE_VALUES = 1 << 21
"""Values decoded at once: 8 MB of fp32 stay in a CPU's cache (twice as fast there) and limit the workspace on a GPU."""


class Decoder(ABC):
    """Decodes one storage format. `parts` are named tensors; `bytes_of` counts only `data`.

    Values are computed in fp32 and rounded once, to the requested dtype, because many scales do not fit into fp16.
    Scales that are NaN or infinite raise nothing; they give the values that the format defines.
    """

    format: str
    block: int = 1
    """Values that share one scale; the number of columns must be a multiple of it."""
    block_bytes: int
    """Bytes of `data` per block."""

    @abstractmethod
    def shape_of(self, parts: AnyParts) -> tuple[int, int]:
        """Returns `(rows, columns)` of the weight.

        Raises:
            FileFormatError: The parts are not of this format.
        """

    @abstractmethod
    def _values(self, parts: AnyParts, start: int, length: int) -> torch.Tensor:
        """Returns rows in fp32, or in another dtype that is as exact. The caller has checked the shape and the range."""

    def decode(self, parts: AnyParts, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight, `(rows, columns)` in `dtype`, on the device of the parts. Do not write into it.

        Raises:
            FileFormatError: The parts are not of this format.
        """
        return self.decode_rows(parts, 0, self.shape_of(parts)[0], dtype)

    def decode_rows(self, parts: AnyParts, start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns the rows from `start` to `start + length`, bit for bit as `decode` gives them. Decodes no other rows.

        Raises:
            ValueError: The weight does not have these rows.
            FileFormatError: The parts are not of this format.
        """
        rows, columns = self.shape_of(parts)
        self._check_range(rows, start, length)
        result = torch.empty(length, columns, dtype=dtype, device=parts["data"].device)
        step = max(1, SLICE_VALUES // max(1, columns))
        for first in range(0, length, step):
            piece = result[first : first + step]
            piece.copy_(self._values(parts, start + first, piece.shape[0]))
        return result

    def _check_range(self, rows: int, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > rows:
            raise ValueError(f"{self.format}: rows {start} to {start + length} were asked for, the weight has {rows}")

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Returns the bytes of `data` for a weight of `shape`.

        Raises:
            FileFormatError: The rows are not whole blocks.
        """
        if not shape or shape[-1] % self.block:
            raise FileFormatError(
                f"{self.format}: expected rows of a multiple of {self.block} values, found shape {list(shape)}"
            )
        return math.prod(shape) // self.block * self.block_bytes


class Codec(Decoder):
    """A format that can also be encoded here. The first dimension of each part is the weight's rows."""

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> Parts:
        """Returns the parts of a float weight `(rows, columns)`.

        Raises:
            ValueError: The columns are not whole blocks.
        """

    def _blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight as `(rows, blocks, block)` in fp32."""
        if weight.dim() != 2 or weight.shape[1] % self.block:
            raise ValueError(
                f"{self.format} needs a matrix whose columns are a multiple of {self.block}, found {list(weight.shape)}"
            )
        return weight.float().reshape(weight.shape[0], -1, self.block)


class PlainCodec(Codec):
    """A plain dtype of torch, without scales. `data` is `(rows, columns)` in that dtype, or `(rows, bytes)` as in a
    file.
    """

    def __init__(self, dtype: torch.dtype, format_name: str) -> None:
        self.dtype = dtype
        self.format = format_name
        self.block_bytes = dtype.itemsize

    def encode(self, weight: torch.Tensor) -> Parts:
        return {"data": weight.to(self.dtype)}

    def typed(self, data: torch.Tensor) -> torch.Tensor:
        """Returns `data` in the codec's dtype: a view if the bytes are aligned for it, else a copy."""
        if data.dtype == self.dtype:
            return data
        flat = data.reshape(-1)
        if flat.storage_offset() % self.block_bytes:
            flat = flat.clone()
        return flat.view(self.dtype).view(data.shape[0], data.shape[1] // self.block_bytes)

    def shape_of(self, parts: AnyParts) -> tuple[int, int]:
        data = parts["data"]
        if data.dim() == 2 and data.dtype == self.dtype:
            return data.shape[0], data.shape[1]
        if data.dim() == 2 and data.dtype == torch.uint8 and data.shape[1] % self.block_bytes == 0:
            return data.shape[0], data.shape[1] // self.block_bytes
        raise FileFormatError(
            f"{self.format}: expected a matrix of {dtype_name(self.dtype)}, or of uint8 with {self.block_bytes} bytes a "
            f"value, found {found(data)}; the file is damaged or in another format"
        )

    def decode_rows(self, parts: AnyParts, start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """As `Decoder.decode_rows`, but returns the part's own memory if `data` already has `dtype`."""
        if dtype != self.dtype:
            return super().decode_rows(parts, start, length, dtype)
        self._check_range(self.shape_of(parts)[0], start, length)
        return self._values(parts, start, length)

    def _values(self, parts: AnyParts, start: int, length: int) -> torch.Tensor:
        return self.typed(parts["data"][start : start + length])


class ScaledFp8Codec(Codec):
    """Any float8 dtype of torch, with a `scale` of one value, one value per row, or no scale.

    `encode` makes float8_e4m3fn with one fp32 scale per row; the row's largest value becomes fp8's largest (448).
    Source: torch.finfo(torch.float8_e4m3fn); "FP8 Formats for Deep Learning", arXiv 2209.05433. Checkpoints call the
    scale `scale_weight`; weight = data * scale.
    """

    format = "fp8"
    block_bytes = 1

    def encode(self, weight: torch.Tensor) -> Parts:
        weight = weight.float()
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
        return {"data": (weight / scale).to(torch.float8_e4m3fn), "scale": scale}

    def shape_of(self, parts: AnyParts) -> tuple[int, int]:
        data, scale = parts["data"], parts.get("scale")
        if data.dim() != 2 or data.dtype not in FP8_DTYPES:
            raise FileFormatError(f"{self.format}: expected a matrix of a float8 dtype, found {found(data)}")
        rows, columns = data.shape
        if scale is not None and scale.numel() != 1 and tuple(scale.shape) not in ((rows,), (rows, 1)):
            raise FileFormatError(
                f"{self.format}: expected a scale of 1 value or of {rows} (one a row), found {found(scale)}"
            )
        return rows, columns

    def _values(self, parts: AnyParts, start: int, length: int) -> torch.Tensor:
        values, scale = parts["data"][start : start + length].float(), parts.get("scale")
        if scale is None:
            return values
        scale = scale.float().reshape(-1, 1)
        return values.mul_(scale if scale.shape[0] == 1 else scale[start : start + length])


def found(data: torch.Tensor) -> str:
    """Describes a tensor's shape and dtype for an error message."""
    return f"{list(data.shape)} {dtype_name(data.dtype)}"
