"""How Forge's layers hold weights of low bits, for the fused pass. Source: Forge's `backend/operations.py`.

A layer that Forge swaps brings its weight to the card in each call. Where that is on a stream of its own ("Async") its own code goes:
the copy of one layer and the product of another overlap there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...patching.fused import Held, RawWeight, Terms
from ...patching.fused_choice import CHOICE
from ..webui.raw_weights import bias_for, goes_by_vector, is_in_reach
from .guard_patches import GuardPatches


class ForgeWeight(RawWeight):
    """A layer that makes a temporary weight from its parameter, and multiplies by `scale_weight` where it has one."""

    def __init__(self, is_streaming: Callable[[], bool]) -> None:
        """
        Args:
            is_streaming: True while the host brings swapped weights to the card on a stream of its own, beside the products.
        """
        self._is_streaming = is_streaming

    def scale(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """Returns the factor of scaled fp8."""
        return layer._parameters.get("scale_weight")

    def of(self, layer: torch.nn.Module, x: torch.Tensor, terms: Terms | None = None) -> Held | None:
        """Returns what a layer computes with, where its weight is in reach and only the guard changes what it computes."""
        weight = layer._parameters.get("weight")
        if weight is None or not is_in_reach(weight, x, self._is_streaming):
            return None
        is_one_token = goes_by_vector(weight, x)
        if is_one_token and not CHOICE.multiplies_tokens:
            return None
        if not _has_on_the_fly(layer, terms):
            return None
        return Held(weight, bias_for(layer, x), layer._parameters.get("scale_weight"), is_one_token)


def _has_on_the_fly(layer: torch.nn.Module, terms: Terms | None) -> bool:
    """Returns True if Forge's call adds `terms` to the layer's temporary weight, and nothing else."""
    attributes = layer.__dict__
    if terms is None:
        return "forge_online_loras" not in attributes
    patches = attributes.get("forge_online_loras") or {}
    ours = patches.get("weight")
    return len(patches) == 1 and isinstance(ours, GuardPatches) and ours.terms is terms
