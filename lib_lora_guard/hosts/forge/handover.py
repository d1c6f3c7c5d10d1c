"""A change of LoRAs re-places nothing.

A new stack is a new patcher object for the same model, and Forge loads that like a new model: it unpatches the loaded one,
evicts others, and places every layer again, a little fewer of them on the GPU each time. Here the loaded model is handed
to the new patcher where it lies. So it is where Forge gave the old patcher up in between, because nobody held it any more
(`free_memory`, when a text encoder comes): the model itself stays on the GPU then, and Forge forgets how it was placed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .api import ForgeApi

log = logging.getLogger(__name__)


class Placement:
    def __init__(self, api: ForgeApi, away_bytes: Callable[[torch.nn.Module], int] = lambda model: 0) -> None:
        """`away_bytes`: what has left the device of a model for a while, and comes back without a new placement."""
        self._memory, self._away_bytes, self._patcher_class = api.memory, away_bytes, api.base.ModelPatcher
        self._given_up: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
        """What Forge had noted of a model when it gave its patcher up; without references to either."""
        self._is_replacing = False

    def hand_over(self, patcher: Any, needed_bytes: int, staying: Sequence[Any] = ()) -> bool:
        """Gives the loaded model of another patcher to `patcher`, which is not refreshed yet; False where the host has to
        place it: it is not loaded, or parts of it lie outside the device and could all be on it now.

        `needed_bytes`: what has to be free on the device then; `staying`: patchers that cannot leave for it.
        """
        loaded = self._loaded_clone(patcher)
        given_up = self._given_up.pop(patcher.model, None) if loaded is None else None
        found = loaded or given_up
        if found is None:
            return False
        if self._must_be_placed(found, patcher, needed_bytes, staying):
            if given_up is not None:
                self._forget(given_up, patcher)
            return False
        before = found.model
        try:
            if before is not None:
                before.forge_unpatch_model()
            patcher.model_patches_to(found.device)
            patcher.model_patches_to(patcher.model_dtype())
            found.model = patcher
            found.real_model = patcher.forge_patch_model(None)
            patcher.current_device = patcher.load_device
        except Exception:
            # The host's own way does the same and says what is wrong with it in its own words.
            log.debug("%s could not be handed over", type(patcher.model).__name__, exc_info=True)
            found.model = before
            if given_up is not None:
                self._forget(given_up, patcher)
            return False
        if given_up is not None:
            self._memory.current_loaded_models.insert(0, given_up)
        return True

    def give_up(self, loaded: Any) -> bool:
        """In place of `model_unload(avoid_model_moving=True)`, which leaves the layers where they are and forgets which of
        them are swapped: keeps that for the next patcher of the model. False where the host is about to place it anew."""
        if self._is_replacing or getattr(loaded, "real_model", None) is None:
            return False
        loaded.model.forge_unpatch_model()
        loaded.offload_device = loaded.model.offload_device
        self._given_up[loaded.real_model] = loaded
        loaded.model = loaded.real_model = None
        return True

    def take_back(self, device: Any) -> list[Any]:
        """What Forge has forgotten and still lies on `device`, as loaded models again, so that it can leave."""
        found = [(model, one) for model, one in self._given_up.items() if one.device == device]
        for model, one in found:
            del self._given_up[model]
            one.model, one.real_model = self._patcher_class(model, one.device, one.offload_device), model
        return [one for _, one in found]

    def forget_all(self) -> None:
        """For when the guard goes: each model that was given up gets from the host what it would have got then."""
        while self._given_up:
            model, one = self._given_up.popitem()
            self._forget(one, self._patcher_class(model, one.device, one.offload_device))

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """While the host unloads one patcher of a model in order to load another."""
        self._is_replacing = True
        try:
            yield
        finally:
            self._is_replacing = False

    def _forget(self, given_up: Any, patcher: Any) -> None:
        """Does what the host would have done when it gave the model up."""
        given_up.model, given_up.real_model = patcher, patcher.model
        with self.replacing():
            given_up.model_unload(avoid_model_moving=True)

    def _loaded_clone(self, patcher: Any) -> Any:
        """What is loaded of the same model for another patcher; None where that is nothing, or more than one thing."""
        clones = [one for one in self._memory.current_loaded_models if patcher.is_clone(one.model)]
        if len(clones) != 1 or getattr(clones[0], "real_model", None) is not patcher.model:
            return None
        return clones[0]

    def _must_be_placed(self, loaded: Any, patcher: Any, needed_bytes: int, staying: Sequence[Any]) -> bool:
        if loaded.device != patcher.load_device or self._is_optimised():
            return True
        if loaded.device.type != "cpu" and not self._memory.module_size(patcher.model, include_device=loaded.device):
            # Someone has moved it away without telling the host.
            return True
        return self._could_be_whole(loaded, patcher.model, needed_bytes, staying)

    def _is_optimised(self) -> bool:
        """Intel's extension rewrites a model each time the host loads it; that stays with the host."""
        is_intel_xpu = getattr(self._memory, "is_intel_xpu", None)
        return bool(is_intel_xpu is not None and is_intel_xpu())

    def _could_be_whole(
        self, loaded: Any, model: torch.nn.Module, needed_bytes: int, staying: Sequence[Any] = ()
    ) -> bool:
        """True where some of the model lies outside its device and all of it would fit if what can leave left."""
        memory, device = self._memory, loaded.device
        if device.type == "cpu":
            return False
        outside = memory.module_size(model, exclude_device=device) - self._away_bytes(model)
        if outside <= 0:
            return False
        others = sum(
            memory.module_size(one.model.model, include_device=device)
            for one in memory.current_loaded_models
            if one is not loaded and one.device == device and all(one.model is not p for p in staying)
        )
        return bool(memory.get_free_memory(device) + others - outside >= needed_bytes)
