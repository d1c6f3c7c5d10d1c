"""The short way of layers without a LoRA, on models that have LoRAs: the host's own temporary weight, made by a kernel, where that is
measured to be faster.

Bit for bit the host's weight, so that it is no part of a change: it is settled after one, and nothing has to be undone.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Collection

import torch

from ..weights.storage import storage_of
from .access import ModelAccess
from .bypass import CAST, Bypass, call_of_layer
from .fused import Fused
from .fused_choice import CHOICE, Key
from .fused_measured import beats_host_cast
from .marked_class import unmark
from .operators import WEIGHT_PATCH

log = logging.getLogger(__name__)


class HostCasts:
    """Those of one engine."""

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def settle(self, access: ModelAccess, patched: Collection[torch.nn.Module], device: torch.device) -> None:
        """Gives the short way to the layers of a model that have no LoRA, if the user wants it, and takes it from the others.

        Args:
            access: The model.
            patched: Its layers with LoRAs. A model that has none is left alone.
            device: Where it runs.
        """
        wanted = patched and CHOICE.is_on() and CHOICE.casts_too()
        if not wanted and not self._layers:
            return
        try:
            found = [(layer, raw) for layer, raw in access.raw_weights() if layer not in patched] if wanted else []
            self.take_all(patched)
            kernels: set[Key] = set()
            for layer, raw in found:
                fused = Fused(raw, None)
                key = fused.key(layer, device, access.compute_dtype())
                if key is None or not _is_faster(key.kind, layer) or not CHOICE.may_take(key):
                    continue
                kernels.add(key)
                # First, so that an interrupt leaves nothing on the layer that is not found again.
                self._layers.add(layer)
                layer.__dict__[CAST] = fused
                access.show_bypass(layer, False, call_of_layer)
            CHOICE.prepare(kernels)
        except Exception:
            # The host's own way goes on.
            log.debug("layers without LoRAs keep their own way", exc_info=True)

    def take_all(self, patched: Collection[torch.nn.Module] = ()) -> None:
        """Takes the short way from all layers. The class of a layer in `patched` may be its LoRA's by now, and stays then."""
        for layer in list(self._layers):
            layer.__dict__.pop(CAST, None)
            if layer not in patched or not _is_of_lora(layer):
                unmark(layer)
            self._layers.discard(layer)


def _is_of_lora(layer: torch.nn.Module) -> bool:
    """Returns True if a LoRA has given the layer its class: one on the weight itself may leave the class that was there."""
    own_call = type(layer).__dict__.get("__call__")
    return (
        own_call is not call_of_layer
        or WEIGHT_PATCH in layer.__dict__
        or any(isinstance(hook, Bypass) for hook in list(layer._forward_hooks.values()))
    )


def _is_faster(kind: str, layer: torch.nn.Module) -> bool:
    return beats_host_cast(kind, math.prod(storage_of(layer.get_parameter("weight")).shape))
