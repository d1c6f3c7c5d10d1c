"""Whose code a layer's call runs, and what that allows.

A bypass adds to what a call returns: it is exact where the call is `W x + b`. On the fly and merge give the layer's own code
another weight: they are exact where that code reads the weight from the layer.
"""

from __future__ import annotations

import os
import weakref
from enum import Enum

import torch

from ...patching.marked_class import Forward, class_of


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


def runs_torchs_code(layer: torch.nn.Module) -> bool:
    """Returns True if the `forward` of the layer's class is torch's own.

    Then a call returns new memory, and a narrow weight (fp8, int8) is the numbers themselves, for all that is known. A class with a
    `forward` of its own may have packed them, keep a scale beside them, or return what it got.
    """
    return _code_of_class(class_of(layer)) is Code.TORCH


_codes: weakref.WeakKeyDictionary[type, Code] = weakref.WeakKeyDictionary()


def _code_of_class(base: type[torch.nn.Module]) -> Code:
    if base is torch.nn.Linear or base is torch.nn.Conv2d:
        # Most layers of most models.
        return Code.TORCH
    found = _codes.get(base)
    if found is None:
        found = _codes[base] = _read_class(base)
    return found


def _read_class(base: type[torch.nn.Module]) -> Code:
    forward = base.forward
    if forward in {one.forward for one in (*_TORCHS, *_TORCHS_TRANSPOSED)}:
        inner = getattr(base, "_conv_forward", None)
        if inner is None or inner in {getattr(one, "_conv_forward", None) for one in (*_TORCHS, *_TORCHS_TRANSPOSED)}:
            return Code.TORCH
        return Code.CLASS
    owner = next((one for one in base.__mro__ if "forward" in vars(one)), base)
    return Code.LINEAR if _is_of(owner.__module__, LINEAR_LIBRARIES) else Code.CLASS


def _leads_to(own: Forward, base: type[torch.nn.Module]) -> bool:
    """Returns True if a layer's own `forward` only wraps the one of its class."""
    for _ in range(8):
        if getattr(own, "__func__", None) is base.forward or _is_marked(own, base):
            return True
        compiled = getattr(own, "_torchdynamo_orig_callable", None)
        wrapper = getattr(own, "func", own)
        if compiled is not None:
            own = compiled
        elif hasattr(own, "__wrapped__") and (_is_of(_module_of(wrapper), WRAPPING_LIBRARIES) or _is_torchs(own)):
            own = own.__wrapped__
        else:
            return False
    return False


def _is_marked(own: Forward, base: type[torch.nn.Module]) -> bool:
    """Returns True for the forward pass of a marked class: a wrapper was put on while a LoRA was on."""
    layer = getattr(own, "__self__", None)
    return isinstance(layer, base) and getattr(own, "__func__", None) is type(layer).forward


def _module_of(function: Forward) -> str:
    return getattr(function, "__module__", None) or ""


def _is_torchs(function: Forward) -> bool:
    """Returns True for a wrapper that torch.compile has made. It bears the module of what it wraps."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(os.path.join(os.path.dirname(torch.__file__), "_dynamo"))


def _is_of(module: str, libraries: tuple[str, ...]) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in libraries)
