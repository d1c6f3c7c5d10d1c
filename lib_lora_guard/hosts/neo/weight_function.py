"""What stands among the functions of a layer that change its temporary weight."""

from __future__ import annotations

import weakref

import torch
from torch.compiler import is_compiling

from ...patching.on_the_fly import WeightTerms
from ...patching.operators import number_of, patched_weight
from ...weights.kitchen import is_quantized


class WeightFunction:
    """The guard's entry in `layer.weight_function`. Neo calls it with the weight of a forward pass."""

    def __init__(self, terms: WeightTerms, layer: torch.nn.Module) -> None:
        self.terms = terms
        self._layer = weakref.ref(layer)
        self._number = number_of(layer)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the patched weight. Without manual cast `weight` is the parameter itself, which stays as it is."""
        if is_compiling() and self._number is not None:
            return patched_weight(weight, self._number)
        parameter = getattr(self._layer(), "weight", None)
        # What a quantised weight is decoded to is never its own memory.
        return self.terms.apply(weight, None if parameter is None or is_quantized(parameter) else parameter)
