"""Chooses the dtype of each tensor in the new file and converts values to it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..adapters.base import Shape
from ..checkpoints.model_header import DENOISER, Parameter
from ..files.safetensors_writer import format_of
from ..weights.storage import FP8_DTYPES

KEEP = "keep"
DTYPES: Mapping[str, torch.dtype | None] = MappingProxyType(
    {
        KEEP: None,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp8_e4m3fn": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }
)
"""The choices of the user; None: each tensor keeps its own."""

SLICE_VALUES = 1 << 18
"""Values rounded at once: a few fp32 copies of so many values stay in a CPU's cache."""

UNPACKED = torch.bfloat16
"""For weights stored in blocks (GGUF, bitsandbytes), and in fp8 files for tensors that fp8 is too coarse for."""


def dtype_for(parameter: Parameter, stored: torch.dtype | None, wanted: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of a tensor in the new file.

    As in common fp8 files, only the matrices and kernels of the U-Net or transformer become fp8. Its norms and biases
    stay in 16 bits, and text encoders and VAE stay as they are.

    Args:
        parameter: The tensor.
        stored: Its dtype in the model's file; None if it is stored in blocks.
        wanted: The requested dtype; None keeps it.
    """
    own = UNPACKED if stored is None else stored
    if wanted is None or not own.is_floating_point:
        return own
    if wanted not in FP8_DTYPES or (parameter.is_layer and parameter.part == DENOISER):
        return wanted
    if parameter.part != DENOISER or own.itemsize == 2 or own == wanted:
        return own
    return UNPACKED


def packed_shape(dtype: torch.dtype, shape: Shape) -> Shape:
    """Returns the shape that torch gives to a tensor of `dtype` that has `shape` in a file.

    Torch counts bytes of F4, where a file counts values, two in a byte.
    """
    is_packed = format_of(dtype) == "F4" and bool(shape)
    return (*shape[:-1], shape[-1] // 2) if is_packed else shape


def rounded(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Rounds `values` to `dtype` once. Returns the result and the number of values outside the dtype's range.

    Those become its largest number, where torch makes NaN or infinity of them. No copy is made if the dtype is the
    same.
    """
    if values.dtype == dtype:
        return values, 0
    result = torch.empty(values.shape, dtype=dtype)
    source, target, beyond = values.reshape(-1), result.view(-1), 0
    limit = torch.finfo(dtype).max
    # bf16 has the range of fp32.
    may_overflow = dtype not in (torch.bfloat16, torch.float32) and torch.finfo(values.dtype).max > limit
    for start in range(0, source.numel(), SLICE_VALUES):
        piece = source[start : start + SLICE_VALUES].to(compute_dtype(values))
        if may_overflow and (outside := int((piece.abs() > limit).sum())):
            beyond += outside
            piece = piece.clamp(-limit, limit)
        target[start : start + SLICE_VALUES].copy_(piece)
    return result, beyond


def compute_dtype(values: torch.Tensor) -> torch.dtype:
    """Returns fp64 for fp64 values, fp32 for all others."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32
