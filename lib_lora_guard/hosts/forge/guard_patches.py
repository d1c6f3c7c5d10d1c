"""What stands in the place of Forge's own patches of a layer's temporary weight."""

from __future__ import annotations

import weakref

import torch

from ...patching.on_the_fly import WeightTerms
from .types import PatchEntry


class GuardPatches(list[PatchEntry]):
    """The guard's entry in `layer.forge_online_loras`.

    Forge's forward passes hand it to `merge_lora_to_weight`, where the guard's hook knows it. As a list it is empty, so that
    Forge's own function adds nothing.
    """

    def __init__(self, terms: WeightTerms, layer: torch.nn.Module) -> None:
        super().__init__()
        self.terms = terms
        self._layer = weakref.ref(layer)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the patched weight; `weight` is the temporary weight of one forward pass."""
        layer = self._layer()
        return self.terms.apply(weight, None if layer is None else getattr(layer, "weight", None))
