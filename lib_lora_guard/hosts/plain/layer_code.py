"""Whose code a layer's call runs, and what that allows.

A bypass adds to what a call returns: it is exact where the call is `W x + b`. On the fly and merge give the layer's own code
another weight: they are exact where that code reads the weight from the layer.
"""

from __future__ import annotations

import functools
from enum import Enum
from typing import Any

import torch

from .marked_class import class_of


class Code(Enum):
    """The code that a layer's call runs."""

    TORCH = "torch's own: W x + b, in memory of its own"
    LINEAR = "of a known library: W x + b, from a weight that it keeps in its own way"
    CLASS = "of the layer's class: anything, from the weight that lies on the layer"
    REPLACED = "put on this layer in the place of its class's: anything"


_TORCHS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_TORCHS_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)

LINEAR_LIBRARIES = ("bitsandbytes", "torchao", "optimum.quanto", "sdnq", "comfy_kitchen", "hqq", "diffusers", "comfy")
"""Libraries whose linear layers and convolutions compute `W x + b`, whatever they store."""

WRAPPING_LIBRARIES = ("accelerate", "diffusers")
"""Libraries that put a `forward` on a layer to move or cast its weight, and then call the class's own."""


def code_of(layer: torch.nn.Module) -> Code:
    """Tells whose code a call of `layer` runs."""
    own, base = layer.__dict__.get("forward"), class_of(layer)
    code = _code_of_class(base)
    if own is None:
        return code
    return Code.LINEAR if code is not Code.CLASS and _leads_to(own, base) else Code.REPLACED


@functools.lru_cache(maxsize=1024)
def _code_of_class(base: type[Any]) -> Code:
    forward = base.forward
    if forward in {one.forward for one in (*_TORCHS, *_TORCHS_TRANSPOSED)}:
        inner = getattr(base, "_conv_forward", None)
        if inner is None or inner in {getattr(one, "_conv_forward", None) for one in (*_TORCHS, *_TORCHS_TRANSPOSED)}:
            return Code.TORCH
        return Code.CLASS
    owner = next((one for one in base.__mro__ if "forward" in vars(one)), base)
    return Code.LINEAR if _is_of(owner.__module__, LINEAR_LIBRARIES) else Code.CLASS


def _leads_to(own: object, base: type[Any]) -> bool:
    """Returns True if a layer's own `forward` only wraps the one of its class."""
    for _ in range(8):
        if getattr(own, "__func__", None) is base.forward or _is_marked(own, base):
            return True
        compiled = getattr(own, "_torchdynamo_orig_callable", None)
        wrapper = getattr(own, "func", own)
        if compiled is not None:
            own = compiled
        elif _is_of(getattr(wrapper, "__module__", None) or "", WRAPPING_LIBRARIES) and hasattr(own, "__wrapped__"):
            own = own.__wrapped__
        else:
            return False
    return False


def _is_marked(own: object, base: type[Any]) -> bool:
    """Returns True for the forward pass of a marked class: a wrapper was put on while a LoRA was on."""
    layer = getattr(own, "__self__", None)
    return isinstance(layer, base) and getattr(own, "__func__", None) is type(layer).forward


def _is_of(module: str, libraries: tuple[str, ...]) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in libraries)
