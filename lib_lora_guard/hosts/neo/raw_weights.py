"""How Neo's layers hold weights of low bits, for the fused pass. Source: Neo's `backend/operations.py`.

A layer that Neo swaps brings its weight to the card in each call. Where that is on a stream of its own (`--cuda-stream`) its own code
goes: the copy of one layer and the product of another overlap there.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ...kernels.stored import Stored
from ...patching.fused import Held, RawWeight, Terms
from ...patching.fused_choice import CHOICE
from ..webui.raw_weights import bias_for, goes_by_vector, is_in_reach
from .types import WeightLayer
from .weight_function import WeightFunction

SWITCH = "LORA_GUARD_QUANTIZED_PRODUCT"
"""0 in the environment: a layer with a LoRA makes a temporary weight, also where its format has a product of its own."""


class NeoWeight(RawWeight):
    """A layer that makes a temporary weight from its parameter, and hands it to the functions that others have put on it."""

    def __init__(self, is_streaming: Callable[[], bool]) -> None:
        """
        Args:
            is_streaming: True while the host brings swapped weights to the card on a stream of its own, beside the products.
        """
        self._is_streaming = is_streaming

    def of(self, layer: torch.nn.Module, x: torch.Tensor, terms: Terms | None = None) -> Held | None:
        """Returns what a layer computes with, where its weight is in reach and only the guard changes what it computes."""
        weight = layer._parameters.get("weight")
        if weight is None or not is_in_reach(weight, x, self._is_streaming):
            return None
        is_one_token = goes_by_vector(weight, x)
        if is_one_token and not CHOICE.multiplies_tokens:
            return None
        neos: WeightLayer = layer  # type: ignore[assignment]  # `NeoAccess.raw_weight` lets no other layer come here
        if neos.bias_function or not _has_on_the_fly(neos, terms):
            return None
        return Held(weight, bias_for(layer, x), is_one_token=is_one_token)


class NeoQuantized(NeoWeight):
    """A layer that may also compute with the product of its quantised format, and then keeps it (docs/gpu.md, "int8 in Neo")."""

    def __init__(self, is_streaming: Callable[[], bool]) -> None:
        """`is_streaming`: as `NeoWeight` says."""
        super().__init__(is_streaming)
        self._gives_up_products = os.environ.get(SWITCH) == "0"

    def stored(self, layer: torch.nn.Module, is_laid_out: bool = True) -> Stored | None:
        """Returns a layer's weight, where it makes a temporary one of it."""
        return super().stored(layer, is_laid_out) if self._makes_a_weight(layer, True) else None

    def of(self, layer: torch.nn.Module, x: torch.Tensor, terms: Terms | None = None) -> Held | None:
        """Returns what a layer computes with, where it makes a temporary weight."""
        has_loras = terms is not None or bool(layer._forward_hooks)
        return super().of(layer, x, terms) if self._makes_a_weight(layer, has_loras) else None

    def _makes_a_weight(self, layer: torch.nn.Module, has_loras: bool) -> bool:
        own = layer.__dict__
        is_given_up = has_loras and self._gives_up_products
        return bool(own.get("_full_precision_mm") or own.get("forge_force_cast_weights") or is_given_up)


def _has_on_the_fly(layer: WeightLayer, terms: Terms | None) -> bool:
    """Returns True if Neo's call adds `terms` to the layer's temporary weight, and nothing else."""
    functions = layer.weight_function
    if terms is None:
        return not functions
    ours = functions[0] if len(functions) == 1 else None
    return isinstance(ours, WeightFunction) and ours.terms is terms
