"""Quantised weights count as what they take on the card.

GGUF: Forge places a model by the file's sizes and then bakes it, which can make it grow. NF4 and FP4: Forge counts a tenth of
the packed bytes for the scales, which take an eighth in blocks of 64: 150 MB of a Flux that nobody had reserved.

Source: Forge's `backend/memory_management.py` (`module_size`, which every decision of placement and eviction asks),
`backend/operations_gguf.py` (`ParameterGGUF`: `gguf_cls`, `baked`) and `backend/operations_bnb.py` (`ForgeParams4bit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...planning.gguf_baked import growth_bytes
from ...weights.storage import scales_bytes

_FOUR_BIT = ("nf4", "fp4")
FORGES_SCALES = 0.1
"""Of a packed byte, in Forge's count of a weight that is quantised."""
FORGES_VALUE_BYTES, VALUE_BYTES, SCALE_BYTES = 0.55, 0.5, 4
"""Of a weight that is quantised when it gets to the card: by Forge's count, packed, and of one block's scale."""
USUAL_BLOCK = 64


def module_size(original: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In place of `module_size`: the host's own number, and by how much its weights take more or less."""
    found = original(module, *args, **kwargs)
    exclude, include, is_split = _asked(*args, **kwargs)
    is_baked = bool(getattr(module, "gguf_baked", False))
    whole, weight = 0.0, 0.0
    for name, parameter in [] if is_baked else module.named_parameters():
        more = _more_bytes(parameter)
        if more and parameter.device != exclude and include in (None, parameter.device):
            whole += more
            weight += more if name == "weight" else 0
    if not whole:
        return found
    return (found[0] + whole, found[1] + weight, found[2] + whole - weight) if is_split else found + whole


def _asked(exclude_device: Any = None, include_device: Any = None, return_split: bool = False) -> tuple[Any, Any, bool]:
    return exclude_device, include_device, return_split


def _more_bytes(parameter: Any) -> float:
    """Than the host counts."""
    kind = getattr(parameter, "quant_type", None)
    if kind in _FOUR_BIT:
        return _more_than_packed(parameter)
    gguf_class = getattr(parameter, "gguf_cls", None)
    if gguf_class is None or getattr(parameter, "baked", False):
        return 0
    data = parameter.data
    return growth_bytes(gguf_class.__name__, data.numel() * data.element_size())


def _more_than_packed(parameter: Any) -> float:
    values: int = parameter.data.numel()
    if parameter.data.element_size() == 1:
        scales = scales_bytes(parameter)
        # Without its scales a packed weight cannot be read: then the host's guess is as good as any.
        return scales - values * FORGES_SCALES if scales else 0
    block = getattr(parameter, "blocksize", None) or USUAL_BLOCK
    return float(values * (VALUE_BYTES + SCALE_BYTES / block - FORGES_VALUE_BYTES))
