"""In which dtype each tensor of the new file lies, and how values get there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..checkpoints.model_header import DENOISER, Parameter
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
"""What the user may ask for; None: each tensor its own."""

SLICE_VALUES = 1 << 18
"""Rounded in one go: a few fp32 copies of so many values stay in a CPU's cache."""

UNPACKED = torch.bfloat16
"""For weights that lie in blocks (GGUF, bitsandbytes), and in fp8 files for what fp8 is too coarse for."""


def dtype_for(parameter: Parameter, stored: torch.dtype | None, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype in the new file. `stored`: the dtype in the model's file, None where it lies in blocks.

    As in the fp8 files of the community, fp8 is for the matrices and kernels of the U-Net or transformer alone: its norms
    and biases stay in 16 bits, and text encoders and VAE stay what they are.
    """
    own = UNPACKED if stored is None else stored
    if wanted is None or not own.is_floating_point:
        return own
    if wanted not in FP8_DTYPES or (parameter.is_layer and parameter.part == DENOISER):
        return wanted
    if parameter.part != DENOISER or own.itemsize == 2 or own == wanted:
        return own
    return UNPACKED


def rounded(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """`values` in `dtype`, rounded once, and how many lay beyond its range: those became its largest number, where torch
    makes NaN or infinity of them. No copy where the dtype is the same; else in slices."""
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
    """fp64 values are computed with as such, all others in fp32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32
