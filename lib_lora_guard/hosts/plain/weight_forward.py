"""The forward pass of a layer whose weight is patched on the fly: its own code, with another weight."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling

from ...patching.marked_class import class_of, mark, unmark
from ...patching.on_the_fly import WeightTerms
from ...patching.operators import WEIGHT_PATCH, WeightPatch, number_of, patched_weight
from .layer_code import Code, code_of

_WEIGHT = "weight"


def patch_weight(layer: torch.nn.Module, terms: WeightTerms) -> None:
    """Makes the forward pass of `layer` add `terms` to its weight."""
    layer.__dict__[WEIGHT_PATCH] = terms
    base = class_of(layer)
    if base is torch.nn.Linear:
        # `site` lets no layer with a forward of its own come here.
        mark(layer, patch_weight, _linear)
        return
    plain = code_of(layer) is Code.TORCH
    if plain and issubclass(base, torch.nn.Linear):
        mark(layer, patch_weight, _linear)
    elif plain and not issubclass(base, torch.nn.modules.conv._ConvTransposeNd):
        mark(layer, patch_weight, _convolution)
    elif plain:
        mark(layer, patch_weight, _transposed_convolution)
    else:
        mark(layer, patch_weight, _any_forward)


def unpatch_weight(layer: torch.nn.Module) -> None:
    """Takes that back. Idempotent."""
    unmark(layer)
    layer.__dict__.pop(WEIGHT_PATCH, None)


def _patched(layer: torch.nn.Module) -> torch.Tensor:
    # `DataParallel` gives its copies a plain tensor.
    parameter: torch.Tensor = getattr(layer, _WEIGHT)
    number = number_of(layer)
    if number is not None and is_compiling():
        return patched_weight(parameter.detach(), number)
    patch = layer.__dict__.get(WEIGHT_PATCH)
    # Another program may have kept this forward pass from a time when there was a LoRA.
    return patch.apply(parameter.detach(), parameter) if isinstance(patch, WeightPatch) else parameter


def _linear(self: Any, input: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(input, _patched(self), self.bias)


def _convolution(self: Any, input: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self._conv_forward(input, _patched(self), self.bias)
    return result


def _transposed_convolution(self: Any, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
    dimensions = len(self.kernel_size)
    padding = self._output_padding(
        input, output_size, self.stride, self.padding, self.kernel_size, dimensions, self.dilation
    )
    functions = (
        torch.nn.functional.conv_transpose1d,
        torch.nn.functional.conv_transpose2d,
        torch.nn.functional.conv_transpose3d,
    )
    result: torch.Tensor = functions[dimensions - 1](
        input, _patched(self), self.bias, self.stride, self.padding, padding, self.groups, self.dilation
    )
    return result


def _any_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs the code of the layer's class on a shallow copy that holds the patched weight: other threads use the layer."""
    base, before = class_of(self), self.__dict__
    # Without the mark: the code may call other methods of the layer, and its `forward` is to be its own.
    shadow = base.__new__(base)
    inside = {name: value for name, value in before.items() if name not in (WEIGHT_PATCH, _WEIGHT)}
    patched = _patched(self)
    if is_compiling():
        inside[_WEIGHT] = patched
    else:
        patched = torch.nn.Parameter(patched, requires_grad=False)
        inside["_parameters"] = {**self._parameters, _WEIGHT: patched}
    shadow.__dict__ = inside
    start = dict(inside)
    try:
        return base.forward(shadow, *args, **kwargs)
    finally:
        # What the code has noted about this call (a counter, a cache) belongs to the layer.
        for name, value in inside.items():
            if name not in start or start[name] is not value:
                before[name] = value
        for name in start.keys() - inside.keys():
            before.pop(name, None)
