"""A change of LoRAs re-places nothing.

A new stack is a new patcher object for the same model, and Forge loads that like a new model: it unpatches the loaded one,
evicts others, and places every layer again, a little fewer of them on the GPU each time. Here the loaded model is handed
to the new patcher where it lies.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from .forge_probe import ForgeApi

log = logging.getLogger(__name__)


class Placement:
    def __init__(self, api: ForgeApi) -> None:
        self._memory = api.memory

    def hand_over(self, patcher: Any, needed_bytes: int, staying: Sequence[Any] = ()) -> bool:
        """Gives the loaded model of another patcher to `patcher`, refreshed with its LoRAs; False where the host has to
        place it: it is not loaded, or parts of it lie outside the device and could all be on it now.

        `needed_bytes`: what has to be free on the device then; `staying`: patchers that cannot leave for it.
        """
        loaded = self._loaded_clone(patcher)
        if loaded is None or self._could_be_whole(loaded, needed_bytes, staying):
            return False
        before = loaded.model
        try:
            before.forge_unpatch_model()
            patcher.model_patches_to(loaded.device)
            patcher.model_patches_to(patcher.model_dtype())
            loaded.model = patcher
            loaded.real_model = patcher.forge_patch_model(None)
            patcher.current_device = patcher.load_device
        except Exception:
            # The host's own way does the same and says what is wrong with it in its own words.
            log.debug("%s could not be handed over", type(patcher.model).__name__, exc_info=True)
            loaded.model = before
            return False
        patcher.refresh_loras()
        return True

    def _loaded_clone(self, patcher: Any) -> Any:
        """What is loaded of the same model for another patcher; None where that is nothing, or more than one thing."""
        clones = [one for one in self._memory.current_loaded_models if patcher.is_clone(one.model)]
        if len(clones) != 1 or getattr(clones[0], "real_model", None) is not patcher.model:
            return None
        if clones[0].device != patcher.load_device or self._is_optimised():
            return None
        return clones[0]

    def _is_optimised(self) -> bool:
        """Intel's extension rewrites a model each time the host loads it; that stays with the host."""
        is_intel_xpu = getattr(self._memory, "is_intel_xpu", None)
        return bool(is_intel_xpu is not None and is_intel_xpu())

    def _could_be_whole(self, loaded: Any, needed_bytes: int, staying: Sequence[Any]) -> bool:
        """True where some of the model lies outside its device and all of it would fit if what can leave left."""
        memory, device = self._memory, loaded.device
        if device.type == "cpu":
            return False
        outside = memory.module_size(loaded.real_model, exclude_device=device)
        if outside <= 0:
            return False
        others = sum(
            memory.module_size(one.model.model, include_device=device)
            for one in memory.current_loaded_models
            if one is not loaded and one.device == device and all(one.model is not p for p in staying)
        )
        return bool(memory.get_free_memory(device) + others - outside >= needed_bytes)
