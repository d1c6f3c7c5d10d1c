"""Determines how a weight is stored, from the parameter itself.

Sources: Forge `backend/operations_gguf.py` (`gguf_cls`, `real_shape`) and `backend/operations_bnb.py` (`bnb_quantized`,
`quant_state`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..units import MB as MB
from . import kitchen
from .dtype_names import WIDE_DTYPE_NAMES, dtype_name

FP8_DTYPES = tuple(
    getattr(torch, n)
    for n in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, n)
)
"""The float8 dtypes that this torch has."""
WIDE_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in WIDE_DTYPE_NAMES)
"""Floats of 16 bits and more."""


def widest_float(device: torch.device) -> torch.dtype:
    """Returns fp64 if all devices of this type support it: MPS, DirectML and some Intel GPUs do not."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


@dataclass(frozen=True)
class Storage:
    """The storage of one weight."""

    format: str
    """A short name for users ("bf16", "fp8", "nf4", "Q4_K")."""
    shape: tuple[int, ...]
    """The real (dequantized) shape."""
    bytes: int
    """Bytes as stored, with the scales that bitsandbytes keeps separately."""
    wide: bool
    """True for plain floats of 16, 32 and 64 bits: only they can take a merge without losing the LoRA."""


def storage_of(parameter: torch.Tensor) -> Storage:
    """Returns the storage of a parameter of a plain module, of Forge or of Forge Neo."""
    if is_plain(parameter):
        return _as_it_is(parameter.dtype, tuple(parameter.shape))
    if kitchen.is_quantized(parameter):
        # Its dtype is the one that it stands for.
        size = sum(part.numel() * part.element_size() for part in kitchen.parts_of(parameter))
        return Storage(kitchen.format_of(parameter), tuple(parameter.shape), size, wide=False)
    any_parameter: Any = parameter
    size, shape = parameter.numel() * parameter.element_size(), _shape_of(parameter)
    if hasattr(parameter, "gguf_cls"):
        gguf_class = any_parameter.gguf_cls
        return (
            _as_it_is(parameter.dtype, shape)
            if gguf_class is None
            else Storage(gguf_class.__name__, shape, size, wide=False)
        )
    if hasattr(parameter, "bnb_quantized"):
        form = str(getattr(parameter, "quant_type", "4bit"))
        return Storage(form, shape, size + scales_bytes(parameter), wide=False)
    return _as_it_is(parameter.dtype, shape)


def is_plain(parameter: torch.Tensor) -> bool:
    """Returns True if shape, dtype and bytes are all there is to a parameter: no class and no marks of a host or library."""
    return type(parameter) is torch.nn.Parameter and not vars(parameter)


@lru_cache(1024)
def _as_it_is(dtype: torch.dtype, shape: tuple[int, ...]) -> Storage:
    """Returns the storage of numbers that are what they look like: the same one for all weights that are alike, which most are."""
    return Storage(dtype_name(dtype), shape, math.prod(shape) * dtype.itemsize, wide=dtype in WIDE_DTYPES)


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """Returns the real shape of a parameter, `storage_of(parameter).shape`, in a tenth of the time: models have hundreds."""
    return tuple(parameter.shape) if kitchen.is_quantized(parameter) else _shape_of(parameter)


def _shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    any_parameter: Any = parameter
    if hasattr(parameter, "gguf_cls"):
        return tuple(int(size) for size in any_parameter.real_shape)  # the reader gives numpy numbers
    if hasattr(parameter, "bnb_quantized"):
        state = getattr(parameter, "quant_state", None)
        return tuple(parameter.shape) if state is None else tuple(state.shape)
    return tuple(parameter.shape)


def scales_bytes(parameter: torch.Tensor) -> int:
    """Returns the bytes of the tensors that bitsandbytes keeps with a quantized weight and moves with it; 0 for other
    weights.
    """
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    # Written out: hosts ask for the size of a model a dozen times in each load, and models have hundreds of weights.
    size = _tensor_bytes(state, "absmax") + _tensor_bytes(state, "code") + _tensor_bytes(state, "offset")
    nested = getattr(state, "state2", None)
    return size if nested is None else size + _tensor_bytes(nested, "absmax") + _tensor_bytes(nested, "code")


def _tensor_bytes(state: object, name: str) -> int:
    kept = getattr(state, name, None)
    return kept.numel() * kept.element_size() if isinstance(kept, torch.Tensor) else 0


def shares_storage(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    """True if writing into `a` also writes into `b`: `.to()` and `.data` may return the parameter's own memory."""
    if b is None or a.device != b.device or a.device.type == "meta":
        return b is not None and a is b
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
