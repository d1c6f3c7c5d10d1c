"""The class of a layer while a LoRA is on it: a subclass of its own, one for each way of patching.

torch.compile looks at a layer's class before it runs what it has compiled, and not at its forward hooks. So a change of class is
what makes it look again, and with the old class it finds what it had. The subclass is also where an on-the-fly forward pass
lives: a `forward` in the layer's own dictionary may be another program's, and a copy of the layer (`DataParallel` makes some)
would call the one of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

import torch

from ..errors import LoraGuardError
from .operators import NUMBER, give_number

Forward: TypeAlias = Callable[..., Any]

_BASE = "_lora_guard_base"

_classes: dict[tuple[type, Hashable], type] = {}
"""By the layer's own class and the way of patching. Always the same ones: each is compiled once."""


def class_of(layer: torch.nn.Module) -> type[torch.nn.Module]:
    """Returns the class that `layer` has without LoRAs."""
    found: type[torch.nn.Module] = type(layer).__dict__.get(_BASE, type(layer))
    return found


def takes_marks(layer: torch.nn.Module) -> bool:
    """Returns True if the layer's class allows a subclass."""
    try:
        _marked_class(class_of(layer), None, {})
    except Exception:
        # Its own check of subclasses: any error.
        return False
    return True


def mark(layer: torch.nn.Module, way: Hashable, forward: Forward | None = None, call: Forward | None = None) -> None:
    """Gives `layer` a number and the subclass for a way of patching. Idempotent.

    Args:
        layer: The layer. If its class allows no subclass, it keeps its class.
        way: The way; the same one always has the same `forward` and `call`.
        forward: The forward pass of the subclass; None leaves the class's own.
        call: Stands in place of `__call__`, before all hooks; None leaves it.
    """
    give_number(layer)
    own = {"forward": forward, "__call__": call}
    try:
        marked = _marked_class(class_of(layer), way, own)
    except Exception:
        return
    # Past the module's own `__setattr__`, which looks for parameters first and takes ten times as long.
    object.__setattr__(layer, "__class__", marked)


def unmark(layer: torch.nn.Module) -> None:
    """Gives `layer` its own class again and takes the number. Idempotent. A class that another program has put on top stays."""
    base = type(layer).__dict__.get(_BASE)
    if base is not None:
        object.__setattr__(layer, "__class__", base)
    # A graph that still has the number finds the layer without a stack.
    layer.__dict__.pop(NUMBER, None)


def _marked_class(base: type, way: Hashable, own: Mapping[str, Forward | None]) -> type:
    marked = _classes.get((base, way))
    return _classes.setdefault((base, way), _subclass(base, own)) if marked is None else marked


def _subclass(base: type[torch.nn.Module], own: Mapping[str, Forward | None]) -> type:
    # Names as the layer's own: programs look at them, torch.fx for one.
    contents: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _refuse,
        "__copy__": _shallow_copy,
        _BASE: base,
    }
    contents.update({name: function for name, function in own.items() if function is not None})
    make: Any = type(base)
    subclass: type = make(base.__name__, (base,), contents)
    return subclass


def _refuse(layer: torch.nn.Module, protocol: int) -> str:
    raise LoraGuardError("a LoRA is on this model; take it off (guard.remove()) before copying or saving the model")


def _shallow_copy(layer: torch.nn.Module) -> torch.nn.Module:
    result = type(layer).__new__(type(layer))
    result.__dict__.update(layer.__dict__)
    return result
