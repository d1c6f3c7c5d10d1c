"""Remembers what the last image model was loaded with. Source of the sizes: Forge's `module_size`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..hosts.forge.memory import Needs
from ..planning.last_plan import LastPlan


class LastPlans:
    """One plan, of the denoiser that was loaded last; text encoders and VAEs come and go beside it."""

    def __init__(self, memory: Any, resident_bytes: Callable[[Any], int]) -> None:
        """`memory`: Forge's `backend.memory_management`; `resident_bytes`: what LoRAs of a loader hold on the device."""
        self._memory, self._resident_bytes = memory, resident_bytes
        self._noted: tuple[weakref.ref[torch.nn.Module], LastPlan] | None = None
        """Replaced as a whole: it is read from other threads."""

    @property
    def last(self) -> LastPlan | None:
        """None before the first load, and once that model is gone."""
        noted = self._noted
        return None if noted is None or noted[0]() is None else noted[1]

    def note(self, patchers: Sequence[Any], device: Any, needs: Needs, coming_factor_bytes: int) -> None:
        """After a load, with the LoRAs in place. `coming_factor_bytes`: what of `needs.hard_bytes` was for LoRAs."""
        denoisers = [patcher for patcher in patchers if hasattr(patcher.model, "diffusion_model")]
        if not denoisers:
            return
        model = denoisers[0].model
        loader = getattr(denoisers[0], "lora_loader", None)
        plan = LastPlan(
            type(model).__name__,
            int(self._memory.module_size(model)),
            int(self._memory.module_size(model, include_device=device)),
            # Those that are still to come get there in the model's first call.
            coming_factor_bytes + (0 if loader is None else self._resident_bytes(loader)),
            max(needs.inference_bytes, needs.estimate_bytes),
            max(0, needs.hard_bytes - coming_factor_bytes),
        )
        self._noted = weakref.ref(model), plan
