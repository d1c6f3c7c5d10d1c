"""A model of Forge or Forge Neo as the engine sees it, as far as both are the same: stored rows, biases, spare memory, dtype."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch

from ...memory.probe import BackupBudget, measure_budget
from ...patching.access import ModuleAccess, Site
from ...patching.fused import RawWeight
from ...patching.parameters import named_parameters
from ...planning.limits import RAM_FLOOR_BYTES
from .models import compute_dtype
from .stored_rows import bnb_rows, gguf_rows, is_bnb, is_gguf, stored_bias


class WebuiAccess(ModuleAccess):
    """The part of `ModelAccess` that is the same in both. Each host adds its layer classes and its place for on-the-fly patches."""

    def decoded_rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Returns `length` rows from `start` as plain numbers, without a scale that the layer itself has."""
        parameter = site.parameter
        if is_gguf(parameter):
            return gguf_rows(parameter, start, length, device)
        if is_bnb(parameter):
            return bnb_rows(parameter, start, length, device)
        return parameter.data.narrow(0, start, length)

    def bias(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """Returns the bias as the layer's forward pass adds it, on any device; None if the layer has none."""
        return stored_bias(layer)

    def raw_weight(self, site: Site) -> RawWeight | None:
        """Returns how the weight is held, if it is of low bits and the layer computes by the host's own code."""
        return self._raw_weight(site.layer) if site.name == "weight" else None

    def raw_weights(self) -> Iterator[tuple[torch.nn.Module, RawWeight]]:
        """Yields the layers with weights of low bits that compute by the host's own code."""
        for layer in self.model.modules():
            raw = self._raw_weight(layer)
            if raw is not None:
                yield layer, raw

    @abstractmethod
    def _raw_weight(self, layer: torch.nn.Module) -> RawWeight | None:
        """Returns how the layer's weight is held; None where the host's own code does not make a temporary weight of it."""

    def device(self) -> torch.device:
        """Returns the GPU that parts of the model are on, or the CPU."""
        devices = {parameter.device for parameter in named_parameters(self.model).values()}
        return next((d for d in sorted(devices, key=str) if d.type not in ("cpu", "meta")), torch.device("cpu"))

    def backup_budget(self) -> BackupBudget:
        """Measures how much memory backups of merged weights may take now."""
        # Both hosts plan with all VRAM that is free: none of it is spare.
        return replace(measure_budget(self.device(), RAM_FLOOR_BYTES), vram_spare_bytes=0)

    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype of the model's activations."""
        return compute_dtype(self.model)
