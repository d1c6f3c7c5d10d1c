"""The operators that torch.compile sees in the place of a LoRA: one for each patched layer and mode.

A compiled graph holds the operator and the number of the layer. The stack and its strengths are looked up at each call, so a
change of strengths compiles nothing anew, and no value of them is frozen in a graph. Where there are none, the code of the
stack itself is compiled. torch before 2.4 can do neither.

`LORA_GUARD_OPERATORS=0` in the environment takes them away, for bug reports.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from typing import Any

import torch

from ..locks import while_locked

NUMBER = "_lora_guard_number"
"""The attribute of a patched layer that holds its number. A number is compiled as a fact about the layer."""

_defining = threading.RLock()

_layers: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()


class CallPatch:
    """A forward hook that changes the result of a layer's call."""

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the input that the layer is to get in the place of `x`, as a new tensor."""
        raise NotImplementedError

    def changed(self, layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns `output` with the stack in it. It may be changed in place. `x` is the layer's unscaled input."""
        raise NotImplementedError


class WeightPatch:
    """Something that changes the temporary weight of a layer."""

    # No abstract class: `isinstance` would cost more than all else in a call.
    def apply(self, weight: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor:
        """Returns the patched weight. `weight` is changed in place unless it shares the memory of `parameter`."""
        raise NotImplementedError


WEIGHT_PATCH = "_lora_guard_weight"
"""The attribute of a patched layer that holds its WeightPatch."""


def is_compilable() -> bool:
    """Returns True if torch.compile of this torch takes a LoRA that goes through a layer's call. 2.3 fails in the call."""
    return hasattr(torch.library, "register_autograd")


def number_of(layer: torch.nn.Module) -> int | None:
    """Returns the layer's number; None for a layer that has none."""
    number: int | None = layer.__dict__.get(NUMBER)
    return number


def give_number(layer: torch.nn.Module) -> None:
    """Gives `layer` a number that no other living layer has: it stays the same from one stack to the next."""
    if define_operators():
        number = id(layer)
        if _layers.get(number) is not layer:
            _layers[number] = layer
        layer.__dict__[NUMBER] = number


def bypass(x: torch.Tensor, output: torch.Tensor, number: int) -> torch.Tensor:
    """Returns `output` with the layer's stack in it, as a new tensor. To be traced."""
    result: torch.Tensor = torch.ops.lora_guard.bypass(x, output, number)
    return result


def scaled_input(x: torch.Tensor, number: int) -> torch.Tensor:
    """Returns the input that the layer's own product is to get, as a new tensor. To be traced."""
    result: torch.Tensor = torch.ops.lora_guard.scaled_input(x, number)
    return result


def patched_weight(weight: torch.Tensor, number: int) -> torch.Tensor:
    """Returns the layer's weight with its stack, as a new tensor. To be traced."""
    result: torch.Tensor = torch.ops.lora_guard.patched_weight(weight, number)
    return result


def _call_patch(number: int) -> tuple[torch.nn.Module | None, CallPatch | None]:
    # Found on the layer, so that there is no second note of what is on it.
    layer = _layers.get(number)
    hooks: list[object] = [] if layer is None else list(layer._forward_hooks.values())
    return layer, next((hook for hook in hooks if isinstance(hook, CallPatch)), None)


def _bypass(x: torch.Tensor, output: torch.Tensor, number: int) -> torch.Tensor:
    layer, patch = _call_patch(number)
    # An operator must not return its input.
    result = output.clone()
    if patch is not None and layer is not None:
        result = patch.changed(layer, x, result)
    return result.contiguous()


def _scaled_input(x: torch.Tensor, number: int) -> torch.Tensor:
    _, patch = _call_patch(number)
    return (x.clone() if patch is None else patch.scaled(x)).contiguous()


def _patched_weight(weight: torch.Tensor, number: int) -> torch.Tensor:
    layer = _layers.get(number)
    patch = None if layer is None else layer.__dict__.get(WEIGHT_PATCH)
    return (patch.apply(weight, weight) if isinstance(patch, WeightPatch) else weight.clone()).contiguous()


def _bypass_backward(
    x: torch.Tensor, output: torch.Tensor, gradient: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _gradients(lambda a, b: _bypass(a, b, number), gradient, x, output)  # type: ignore[return-value]


def _scaled_input_backward(x: torch.Tensor, gradient: torch.Tensor, number: int) -> torch.Tensor:
    return _gradients(lambda a: _scaled_input(a, number), gradient, x)[0]


def _gradients(function: Any, gradient: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of `inputs`: the function is run once more, with a graph."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [one.detach().clone().requires_grad_() for one in inputs]
        found = torch.autograd.grad(function(*leaves), leaves, gradient, allow_unused=True)
    pairs = zip(found, inputs, strict=True)
    return tuple([torch.zeros_like(one) if new is None else new.contiguous() for new, one in pairs])


def define_operators() -> bool:
    """Defines the operators, once, for any thread; returns False if there are none. It takes a tenth of a second."""
    return while_locked(_defining, _are_there)


@functools.cache
def _are_there() -> bool:
    """Defines the operators; returns False if this torch cannot, or if they are switched off."""
    if os.environ.get("LORA_GUARD_OPERATORS") == "0" or not hasattr(torch.library, "register_autograd"):
        return False
    # A graph that CUDA has recorded would repeat the strengths of its first run.
    unsafe = getattr(torch._C.Tag, "cudagraph_unsafe", None)
    if unsafe is None and torch.cuda.is_available():
        return False
    tags = () if unsafe is None else (unsafe,)
    library = _new_library()
    for name, signature, run, fake in (
        (
            "bypass",
            "(Tensor x, Tensor output, SymInt number) -> Tensor",
            _bypass,
            lambda x, output, number: _like(output),
        ),
        ("scaled_input", "(Tensor x, SymInt number) -> Tensor", _scaled_input, lambda x, number: _like(x)),
        ("patched_weight", "(Tensor weight, SymInt number) -> Tensor", _patched_weight, lambda w, number: _like(w)),
        (
            "bypass_backward",
            "(Tensor x, Tensor output, Tensor gradient, SymInt number) -> (Tensor, Tensor)",
            _bypass_backward,
            lambda x, output, gradient, number: (_like(x), _like(output)),
        ),
        (
            "scaled_input_backward",
            "(Tensor x, Tensor gradient, SymInt number) -> Tensor",
            _scaled_input_backward,
            lambda x, gradient, number: _like(x),
        ),
    ):
        library.define(name + signature, tags=tags)
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_guard::{name}", fake, lib=library)
    torch.library.register_autograd("lora_guard::bypass", _back_through_bypass, setup_context=_keep_both, lib=library)
    torch.library.register_autograd(
        "lora_guard::scaled_input", _back_through_scaled_input, setup_context=_keep_input, lib=library
    )
    return True


_library: Any = None
"""Takes its operators away when this module goes, as it does where a host loads its extensions anew."""


def _new_library() -> Any:
    """Returns an empty one. What an attempt that was interrupted has defined goes: it could not be defined again."""
    global _library
    if _library is not None:
        # By name: an interrupt's traceback may hold it.
        _library._destroy()
    _library = torch.library.Library("lora_guard", "FRAGMENT")  # type: ignore[no-untyped-call]
    return _library


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _keep_both(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, int], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.number = inputs[2]


def _keep_input(ctx: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.number = inputs[1]


def _back_through_bypass(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    x, output = ctx.saved_tensors
    of_x, of_output = torch.ops.lora_guard.bypass_backward(x, output, gradient, ctx.number)
    return of_x, of_output, None


def _back_through_scaled_input(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    (x,) = ctx.saved_tensors
    return torch.ops.lora_guard.scaled_input_backward(x, gradient, ctx.number), None
