"""How Forge's layers hold weights of low bits, for the fused pass. Source: Forge's `backend/operations.py`.

A layer that Forge swaps brings its weight to the card in each call, on a stream of its own if the user wants: its own code goes.
"""

from __future__ import annotations

import torch

from ...patching.fused import Held, RawWeight
from ..webui.raw_weights import bias_for, goes_by_vector, lies_beside


class ForgeWeight(RawWeight):
    """A layer that makes a temporary weight from its parameter, and multiplies by `scale_weight` where it has one."""

    def of(self, layer: torch.nn.Module, x: torch.Tensor) -> Held | None:
        """Returns what a layer computes with, where its weight lies on the card and only the guard changes what it computes."""
        weight = layer._parameters.get("weight")
        if weight is None or not lies_beside(weight, x) or goes_by_vector(weight, x):
            return None
        if "forge_online_loras" in layer.__dict__:
            return None
        return Held(weight, bias_for(layer, x), layer._parameters.get("scale_weight"))
