"""One interface for the ways a weight can be stored in a few bits: encode once, decode by rows as often as needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from ..errors import FileFormatError
from .storage import FP8_DTYPES, dtype_name

Parts = dict[str, torch.Tensor]
AnyParts = Mapping[str, torch.Tensor]

SLICE_VALUES = 1 << 21
"""Values decoded in one go: 8 MB of fp32 stay in a CPU's cache (twice as fast there) and bound the workspace on a GPU."""


class Decoder(ABC):
    """Reads one stored format. `parts` are named tensors, `data` among them; `data` alone is what `bytes_of` counts.

    Values are calculated in fp32 and rounded once, to the dtype asked for: fp16 has no room for many a scale. Scales
    that are NaN or infinite are no error; they give the NaN or infinite values that the format says.
    """

    format: str
    block: int = 1
    """Values that share a scale; the number of columns must be a multiple of it."""
    block_bytes: int
    """Bytes of `data` that hold one block."""

    @abstractmethod
    def shape_of(self, parts: AnyParts) -> tuple[int, int]:
        """`(rows, columns)` of the weight. Raises FileFormatError for parts that are not of this format."""

    @abstractmethod
    def _values(self, parts: AnyParts, start: int, length: int) -> torch.Tensor:
        """Some rows, in fp32 or as exactly; `shape_of` has passed and the range lies inside."""

    def decode(self, parts: AnyParts, dtype: torch.dtype) -> torch.Tensor:
        """The weight, `(rows, columns)` in `dtype`, where the parts lie; not to be written into."""
        return self.decode_rows(parts, 0, self.shape_of(parts)[0], dtype)

    def decode_rows(self, parts: AnyParts, start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows `start` to `start + length` of what `decode` gives, bit for bit; no other rows are decoded.

        Raises ValueError for rows that the weight does not have.
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
        """Bytes that `data` of a weight of `shape` takes. Raises FileFormatError where rows are not whole blocks."""
        if not shape or shape[-1] % self.block:
            raise FileFormatError(
                f"{self.format}: expected rows of a multiple of {self.block} values, found shape {list(shape)}"
            )
        return math.prod(shape) // self.block * self.block_bytes


class Codec(Decoder):
    """A format that can also be made here. The first dimension of each part is the weight's rows."""

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> Parts:
        """Parts of a 2-D float weight. Raises ValueError where its columns do not fill whole blocks."""

    def _blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """`(rows, blocks, block)` in fp32."""
        if weight.dim() != 2 or weight.shape[1] % self.block:
            raise ValueError(
                f"{self.format} needs a matrix whose columns are a multiple of {self.block}, found {list(weight.shape)}"
            )
        return weight.float().reshape(weight.shape[0], -1, self.block)


class PlainCodec(Codec):
    """A dtype of torch's without a scale; `data` is `(rows, columns)` in it, or `(rows, bytes)` as a file has them."""

    def __init__(self, dtype: torch.dtype, format_name: str) -> None:
        self.dtype = dtype
        self.format = format_name
        self.block_bytes = dtype.itemsize

    def encode(self, weight: torch.Tensor) -> Parts:
        return {"data": weight.to(self.dtype)}

    def typed(self, data: torch.Tensor) -> torch.Tensor:
        """`data` in the codec's dtype: a view where bytes lie as torch wants them."""
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
        """As of any decoder, but without a copy where `data` has `dtype` already: then it is the part's own memory."""
        if dtype != self.dtype:
            return super().decode_rows(parts, start, length, dtype)
        self._check_range(self.shape_of(parts)[0], start, length)
        return self._values(parts, start, length)

    def _values(self, parts: AnyParts, start: int, length: int) -> torch.Tensor:
        return self.typed(parts["data"][start : start + length])


class ScaledFp8Codec(Codec):
    """fp8 of any of torch's dtypes, with a `scale` of one value, of one value a row, or without any.

    `encode` makes float8_e4m3fn with one fp32 scale a row, so that the row's largest value is fp8's largest (448).
    Source: torch.finfo(torch.float8_e4m3fn); "FP8 Formats for Deep Learning", arXiv 2209.05433; checkpoints call the
    scale `scale_weight` and mean weight = data * scale.
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
    """Shape and dtype, for messages."""
    return f"{list(data.shape)} {dtype_name(data.dtype)}"
