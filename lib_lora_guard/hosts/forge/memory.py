"""Forge's memory management and loaded models, as the guard's runtime sees them.

Sources: Forge's `backend/memory_management.py` (`current_loaded_models`, most recently used first; `free_memory`) and
`backend/stream.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ...runtime.host import HostModel, Swapped
from ...runtime.swapping import SwappingRoom
from ...units import MB
from ..webui.free_memory import FreeMemory
from .facts import is_denoiser, is_forges_text_encoder, is_forges_vae
from .handover import Placement
from .residency import Residency
from .types import LoadedModel, MemoryManagement, Patcher

TEXT_ENCODER_PASSES = 2
"""For the prompt and the negative prompt."""
VAE_PASSES = 1
FORGES_SWAPPING_BYTES = 1280 * MB
"""Forge leaves so much of the room, or a quarter of it where that is less."""


class ForgePlaced:
    """A loaded model of Forge. Holds no patcher: Forge counts their references."""

    def __init__(self, loaded: LoadedModel, memory: MemoryManagement, residency: Residency) -> None:
        """
        Args:
            loaded: Forge's.
            memory: lists it.
            residency: moves its layers.
        """
        self._loaded, self._memory, self._residency = loaded, memory, residency

    @property
    def module(self) -> torch.nn.Module:
        """The model itself."""
        return self._loaded.model.model

    def is_for(self, model: HostModel) -> bool:
        """True if Forge has loaded exactly this patcher."""
        return self._loaded.model is model

    def returns(self) -> bool:
        """True for the denoiser: an image needs it again after the text encoder and the VAE."""
        return is_denoiser(self.module)

    def swappable_bytes(self) -> int:
        """Returns the bytes that `shrink` can take at most."""
        return self._residency.swappable_bytes(self._loaded)

    def swapped(self) -> Swapped:
        """Returns what is copied to the card in each call."""
        return self._residency.swapped(self.module)

    def copied_bytes(self) -> int:
        """Returns the bytes on the card that have their copy in RAM."""
        return self._residency.copied_bytes(self.module)

    def shrink(self, wanted_bytes: int) -> int:
        """Moves layers into RAM; see `Residency.shrink`."""
        return self._residency.shrink(self._loaded, wanted_bytes)

    def grow(self, room_bytes: int) -> int:
        """Brings layers back; see `Residency.grow`."""
        return self._residency.grow(self._loaded, room_bytes)

    def unload(self) -> None:
        """Lets Forge move the whole model into RAM and forget its placement."""
        self._memory.current_loaded_models.remove(self._loaded)
        self._loaded.model_unload()


class ForgeMemory:
    """Forge's devices and the models on them: `runtime.host.DeviceMemory`."""

    def __init__(
        self,
        forges: MemoryManagement,
        residency: Residency,
        placement: Placement,
        free: FreeMemory,
        swapping: SwappingRoom,
    ) -> None:
        """
        Args:
            forges: Forge's `backend.memory_management`.
            residency: moves layers of loaded models.
            placement: knows the models that Forge has forgotten.
            free: says if free VRAM is known.
            swapping: says what swapped layers need.
        """
        self.forges = forges
        self._residency, self._placement, self._free, self._swapping = residency, placement, free, swapping

    def plans_for(self, device: torch.device | None) -> bool:
        """False if Forge moves models by a rule of its own: not CUDA, or told to keep nothing on the card."""
        state = getattr(getattr(self.forges, "vram_state", None), "name", "NORMAL_VRAM")
        always = bool(getattr(self.forges, "ALWAYS_VRAM_OFFLOAD", False))
        is_cuda = device is not None and device.type == "cuda"
        return is_cuda and state in ("LOW_VRAM", "NORMAL_VRAM") and not always

    def total_bytes(self, device: torch.device) -> int:
        """Returns the VRAM of a card."""
        return int(torch.cuda.get_device_properties(device).total_memory)

    def free_bytes(self, device: torch.device) -> int:
        """Returns the free memory of a device, as Forge counts it."""
        return int(self.forges.get_free_memory(device))

    def size_bytes(
        self, model: torch.nn.Module, on: torch.device | None = None, outside: torch.device | None = None
    ) -> int:
        """Returns the size of a model's weights, or of those `on` a device or `outside` of one."""
        return int(self.forges.module_size(model, exclude_device=outside, include_device=on))

    def fixed_bytes(self, model: torch.nn.Module, outside: torch.device) -> int:
        """Returns the size of a model's part `outside` a device that Forge cannot run swapped."""
        return self._residency.fixed_bytes(model, outside)

    def inference_bytes(self) -> float:
        """Returns what the "GPU Weights" slider leaves, unchecked."""
        return float(self.forges.minimum_inference_memory())

    def set_inference_bytes(self, size_bytes: int) -> None:
        """Sets what the slider leaves, in versions of Forge that keep it."""
        if hasattr(self.forges, "current_inference_memory"):
            self.forges.current_inference_memory = size_bytes

    def is_loaded(self, patcher: Patcher) -> bool:
        """True if Forge has loaded exactly this patcher."""
        return any(loaded.model is patcher for loaded in self.forges.current_loaded_models)

    def placed(self, model: HostModel) -> ForgePlaced | None:
        """Returns the loaded model of a patcher's module; None if there is none, or more than one."""
        found = [one for one in self.forges.current_loaded_models if one.model.model is model.model]
        return self._placed(found[0]) if len(found) == 1 else None

    def placed_on(self, device: torch.device, but: Sequence[HostModel]) -> list[ForgePlaced]:
        """Returns the loaded models of a device, least recently used first, except those that share a module with one
        of `but`."""
        return [
            self._placed(one)
            for one in reversed(self.forges.current_loaded_models)
            if one.device == device and all(one.model.model is not kept.model for kept in but)
        ]

    def take_back(self, device: torch.device) -> list[Patcher]:
        """Lists again what lies on a device and was forgotten by Forge; see `Placement.take_back`.

        Returns:
            The patchers. Forge forgets them again once nothing holds them.
        """
        forgotten = self._placement.take_back(device)
        self.forges.current_loaded_models.extend(forgotten)
        return [one.model for one in forgotten]

    def drop_abandoned(self) -> None:
        """Takes models off Forge's list that nothing else holds, as Forge's own `free_memory` does: the count is of the
        list's reference and of the question."""
        loaded = self.forges.current_loaded_models
        for place in range(len(loaded) - 1, -1, -1):
            if sys.getrefcount(loaded[place].model) <= 2:
                loaded.pop(place).model_unload(avoid_model_moving=True)

    def empty_cache(self) -> None:
        """Gives back what torch holds of the card without using it."""
        self.forges.soft_empty_cache()

    def passes(self, models: Sequence[HostModel]) -> int | None:
        """Returns how often models run before others need the room; None for the denoiser, unknown models, or several."""
        if len(models) != 1:
            return None
        model = models[0].model
        if is_forges_text_encoder(model):
            return TEXT_ENCODER_PASSES
        return VAE_PASSES if is_forges_vae(model) else None

    def knows_swapping(self) -> bool:
        """True if the VRAM that swapping takes was measured, and free VRAM is known.

        Copies on a stream of their own ("Async") pile up where the card is slower than the bus. A driver that spills into
        RAM gives torch no number of its own.
        """
        stream = sys.modules.get("backend.stream")
        is_async = bool(getattr(stream, "should_use_stream", lambda: False)())
        return not is_async and self._free.is_believed

    def swapping_bytes(self, model: torch.nn.Module) -> int:
        """Returns the VRAM to leave for a model's swapped layers: Forge's own share where swapping was not measured."""
        return self._swapping.bytes(model) if self.knows_swapping() else FORGES_SWAPPING_BYTES

    def _placed(self, loaded: LoadedModel) -> ForgePlaced:
        return ForgePlaced(loaded, self.forges, self._residency)
