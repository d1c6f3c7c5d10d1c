"""Remembers what the last image model was loaded with."""

from __future__ import annotations

import weakref

import torch

from ..planning.last_plan import LastPlan
from .host import DeviceMemory
from .needs import Needs


class LastPlans:
    """Keeps one plan: that of the denoiser that was loaded last. Loads of text encoders and VAEs leave it as it is."""

    def __init__(self, memory: DeviceMemory) -> None:
        """
        Args:
            memory: the host's.
        """
        self._memory = memory
        self._noted: tuple[weakref.ref[torch.nn.Module], LastPlan] | None = None
        """Replaced as a whole: it is read from other threads."""

    @property
    def last(self) -> LastPlan | None:
        """None before the first load, and once that model is gone."""
        noted = self._noted
        return None if noted is None or noted[0]() is None else noted[1]

    def note(self, model: torch.nn.Module, device: torch.device, needs: Needs, factor_bytes: int) -> None:
        """Keeps the plan of a load, once its LoRAs are in place.

        Args:
            model: the denoiser.
            device: where it runs.
            needs: of the load. Its factors were foreseen before it, and count as `factor_bytes` alone.
            factor_bytes: what LoRA factors take in a step: those on the device by now, and those that are still to come.
        """
        plan = LastPlan(
            type(model).__name__,
            self._memory.size_bytes(model),
            self._memory.size_bytes(model, on=device),
            factor_bytes,
            max(needs.inference_bytes, needs.estimate_bytes),
            max(0, needs.hard_bytes - needs.factor_bytes),
        )
        self._noted = weakref.ref(model), plan
