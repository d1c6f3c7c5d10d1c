"""The contract between the guard's runtime and a host: what a host provides, as Protocols.

A host's own objects may fit as they are. Where they do not, the host has a small class that fits.
"""

from __future__ import annotations

from typing import Protocol

import torch


class ModelSizes(Protocol):
    """The host's sizes of models."""

    def module_size(
        self,
        module: torch.nn.Module,
        exclude_device: torch.device | None = ...,
        include_device: torch.device | None = ...,
    ) -> float:
        """Returns the bytes of a model's weights, as the host will place them.

        Args:
            module: the model.
            exclude_device: leaves out what lies on this device.
            include_device: counts only what lies on this device.
        """
        ...


class TotalMemory(Protocol):
    """The host's size of each device."""

    def get_total_memory(self, dev: torch.device | None = ...) -> int:
        """Returns the bytes of memory that a device has."""
        ...
