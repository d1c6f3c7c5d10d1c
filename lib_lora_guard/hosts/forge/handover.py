"""Hands the loaded model to a new patcher where it lies, so that a change of LoRAs moves nothing.

A new stack is a new patcher object for the same model, and Forge loads that like a new model: it unpatches the loaded one,
evicts others, and places every layer again, each time a little fewer of them on the GPU. The same happens after Forge gave the
old patcher up in between, because nothing held it any more (`free_memory`, when a text encoder comes): the model itself stays
on the GPU then, and Forge forgets how it was placed. Source: Forge's `backend/memory_management.py`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .facts import loaded_module
from .types import LoadedModel, MemoryManagement, Patcher

log = logging.getLogger(__name__)


class Placement:
    """Remembers how models were placed that Forge has given up."""

    def __init__(
        self,
        memory: MemoryManagement,
        make_patcher: Callable[[torch.nn.Module, torch.device, torch.device], Patcher],
        away_bytes: Callable[[torch.nn.Module], int],
        loose_bytes: Callable[[torch.nn.Module, torch.device], int],
    ) -> None:
        """
        Args:
            memory: Forge's `backend.memory_management`.
            make_patcher: Forge's `ModelPatcher`: from a model, its device, and the device it is offloaded to.
            away_bytes: returns the bytes of a model's swapped layers.
            loose_bytes: returns the bytes of a model outside a device that need not be on it.
        """
        self._memory, self._make_patcher = memory, make_patcher
        self._away_bytes, self._loose_bytes = away_bytes, loose_bytes
        self._given_up: weakref.WeakKeyDictionary[torch.nn.Module, LoadedModel] = weakref.WeakKeyDictionary()
        """Forge's record of each model whose patcher it gave up, without references to either."""
        self._is_replacing = False

    def hand_over(
        self, patcher: Patcher, needed_bytes: float, staying: Sequence[Patcher] = (), grows: bool = False
    ) -> bool:
        """Gives the loaded model of another patcher to `patcher`, which is not refreshed yet.

        Args:
            patcher: gets the model.
            needed_bytes: has to be free on the device then.
            staying: patchers that cannot leave for it.
            grows: True if the caller brings swapped layers back itself. Then Forge never places them again: it keeps a model
                to the share that it had, less a layer, and that share may have been left for a decode.

        Returns:
            False if Forge has to place it: it is not loaded, or parts of it are outside the device and all could be on it now.
        """
        loaded = self._loaded_clone(patcher)
        given_up = self._given_up.pop(patcher.model, None) if loaded is None else None
        found = loaded or given_up
        if found is None:
            return False
        if self._must_be_placed(found, patcher, needed_bytes, staying, grows):
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
            # Forge's own way does the same, and reports the error in its own words.
            log.debug("%s could not be handed over", type(patcher.model).__name__, exc_info=True)
            found.model = before
            if given_up is not None:
                self._forget(given_up, patcher)
            return False
        if given_up is not None:
            self._memory.current_loaded_models.insert(0, given_up)
        return True

    def give_up(self, loaded: LoadedModel) -> bool:
        """Stands in place of `model_unload(avoid_model_moving=True)`, which leaves the layers where they are and forgets which
        of them are swapped. Keeps that for the next patcher of the model.

        Returns:
            False if Forge is about to place the model anew.
        """
        model = loaded_module(loaded)
        if self._is_replacing or model is None:
            return False
        loaded.model.forge_unpatch_model()
        loaded.offload_device = loaded.model.offload_device
        self._given_up[model] = loaded
        loaded.model = loaded.real_model = None  # type: ignore[assignment]  # not used until it is handed over or taken back
        return True

    def take_back(self, device: torch.device) -> list[LoadedModel]:
        """Makes loaded models again of what Forge has forgotten and still lies on `device`, so that it can leave."""
        found = [(model, one) for model, one in self._given_up.items() if one.device == device]
        for model, one in found:
            del self._given_up[model]
            one.model, one.real_model = self._make_patcher(model, one.device, one.offload_device), model
        return [one for _, one in found]

    def forget_all(self) -> None:
        """Called when the guard goes: each model that was given up gets from Forge what it would have got then."""
        while self._given_up:
            model, one = self._given_up.popitem()
            self._forget(one, self._make_patcher(model, one.device, one.offload_device))

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Wraps Forge's unloading of one patcher of a model in order to load another."""
        self._is_replacing = True
        try:
            yield
        finally:
            self._is_replacing = False

    def _forget(self, given_up: LoadedModel, patcher: Patcher) -> None:
        """Does what Forge would have done when it gave the model up."""
        given_up.model, given_up.real_model = patcher, patcher.model
        with self.replacing():
            given_up.model_unload(avoid_model_moving=True)

    def _loaded_clone(self, patcher: Patcher) -> LoadedModel | None:
        """Returns the same model loaded for another patcher; None if there is none, or more than one."""
        clones = [one for one in self._memory.current_loaded_models if patcher.is_clone(one.model)]
        return clones[0] if len(clones) == 1 and loaded_module(clones[0]) is patcher.model else None

    def _must_be_placed(
        self,
        loaded: LoadedModel,
        patcher: Patcher,
        needed_bytes: float,
        staying: Sequence[Patcher],
        grows: bool = False,
    ) -> bool:
        if loaded.device != patcher.load_device or self._is_optimised():
            return True
        if loaded.device.type != "cpu" and not self._memory.module_size(patcher.model, include_device=loaded.device):
            # Moved away without Forge's knowledge.
            return True
        outside = int(self._memory.module_size(patcher.model, exclude_device=loaded.device))
        # Each is a look at every layer, and usually there is nothing to find.
        may_stay = self._away_bytes(patcher.model) if grows and outside else 0
        if grows and outside > may_stay:
            may_stay += self._loose_bytes(patcher.model, loaded.device)
        return outside > may_stay and self._could_be_whole(loaded, patcher.model, needed_bytes, staying)

    def _is_optimised(self) -> bool:
        """True on Intel GPUs: an extension rewrites a model each time Forge loads it, and that stays with Forge."""
        is_intel_xpu = getattr(self._memory, "is_intel_xpu", None)
        return bool(is_intel_xpu is not None and is_intel_xpu())

    def _could_be_whole(
        self, loaded: LoadedModel, model: torch.nn.Module, needed_bytes: float, staying: Sequence[Patcher]
    ) -> bool:
        """True if some of the model is outside its device and all of it would fit once the models that can leave have left."""
        memory, device = self._memory, loaded.device
        if device.type == "cpu":
            return False
        outside = memory.module_size(model, exclude_device=device)
        others = sum(
            memory.module_size(one.model.model, include_device=device)
            for one in memory.current_loaded_models
            if one is not loaded and one.device == device and all(one.model is not p for p in staying)
        )
        return bool(memory.get_free_memory(device) + others - outside >= needed_bytes)
