"""The names of dtypes, for people and for headers of files. Needs no torch."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WIDE_DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16")
"""torch's names of the floats that take a merge without losing the LoRA."""

_SHORT = (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"), ("float64", "fp64"), ("float8", "fp8"))


@functools.lru_cache(maxsize=64)
def dtype_name(dtype: torch.dtype | str) -> str:
    """Returns the short name that people use: bf16, fp16, fp32, fp8_e4m3fn.

    Args:
        dtype: A dtype of torch, or torch's name for it: "bfloat16".
    """
    name = str(dtype).removeprefix("torch.")
    for long, short in _SHORT:
        if name.startswith(long):
            return short + name[len(long) :]
    return name
