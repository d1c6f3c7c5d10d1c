"""The quantised tensors of comfy_kitchen: what they hold, and their rows without making the others dense.

The library's own code decodes them, in fp32. Layouts whose blocks have scales keep these in tiles of 128 rows, one tile after the
other; so whole tiles are cut out and decoded. The library itself is not imported.

Source: `comfy_kitchen/tensor` (`QuantizedTensor` in `base.py`, the layouts in `fp8.py`, `mxfp8.py`, `nvfp4.py`, `int8.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeGuard

import torch

FORMATS = {
    "TensorCoreFP8Layout": "fp8",
    "TensorCoreFP8E4M3Layout": "fp8",
    "TensorCoreFP8E5M2Layout": "fp8",
    "TensorCoreMXFP8Layout": "mxfp8",
    "TensorCoreNVFP4Layout": "nvfp4",
    "TensorWiseINT8Layout": "int8",
}
"""Short names for users by layout. Another layout is called as the library calls it, and decoded whole."""

TILE_ROWS = 128
"""Rows whose block scales lie together."""


class QuantizedTensor(Protocol):
    """A tensor of the library. Its dtype and shape are those that it stands for, not the stored ones."""

    shape: torch.Size
    layout_cls: Any
    _layout_cls: str
    _qdata: torch.Tensor
    _params: Any

    def dequantize(self) -> torch.Tensor: ...


def is_quantized(tensor: object) -> TypeGuard[QuantizedTensor]:
    """Returns True for a quantised tensor of the library."""
    return isinstance(getattr(tensor, "_layout_cls", None), str)


def format_of(tensor: QuantizedTensor) -> str:
    """Returns the short name of a tensor's format."""
    return FORMATS.get(tensor._layout_cls, tensor._layout_cls)


def parts_of(tensor: QuantizedTensor) -> list[torch.Tensor]:
    """Returns what a tensor holds: its stored numbers and their scales."""
    parts = [tensor._qdata, *(getattr(tensor._params, one.name) for one in dataclasses.fields(tensor._params))]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def rows_of(tensor: QuantizedTensor, start: int, length: int, device: torch.device) -> torch.Tensor:
    """Returns `length` rows from `start` in fp32 on `device`. At most 254 rows beside them are decoded for a moment."""
    qdata, params, (rows, columns) = tensor._qdata, tensor._params, tensor.shape
    if tensor._layout_cls not in FORMATS or getattr(params, "transposed", False):
        return tensor.dequantize().narrow(0, start, length).to(device=device, dtype=torch.float32)
    first = start // TILE_ROWS * TILE_ROWS
    end = min(qdata.shape[0], -(-(start + length) // TILE_ROWS) * TILE_ROWS)
    changes: dict[str, object] = {"orig_dtype": torch.float32, "orig_shape": (end - first, columns)}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if isinstance(value, torch.Tensor):
            changes[field.name] = _cut(value, first, end, qdata.shape[0], rows).to(device)
    part = qdata.narrow(0, first, end - first).contiguous().to(device)
    dense: torch.Tensor = tensor.layout_cls.dequantize(part, dataclasses.replace(params, **changes))
    return dense.narrow(0, start - first, length).narrow(1, 0, columns)


def _cut(scales: torch.Tensor, first: int, end: int, stored_rows: int, rows: int) -> torch.Tensor:
    """Cuts the scales of some rows out: one scale for all rows, one for each, or tiles of block scales."""
    if scales.numel() == 1:
        return scales
    if scales.numel() in (rows, stored_rows):
        return scales.narrow(0, first, end - first)
    tiles = scales.reshape(-(-stored_rows // TILE_ROWS), TILE_ROWS, -1)
    tile, last = first // TILE_ROWS, -(-end // TILE_ROWS)
    return tiles.narrow(0, tile, last - tile).reshape((last - tile) * TILE_ROWS, -1).contiguous()
