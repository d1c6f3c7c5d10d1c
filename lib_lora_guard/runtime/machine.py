"""Reads the memory of the host's device and of this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..memory import HostMemory, MemorySnapshot, Nvml, take_snapshot


class Machine:
    """Made once: what does not change is looked up once."""

    def __init__(self, device: Callable[[], torch.device]) -> None:
        """
        Args:
            device: returns where the host makes images. It may start CUDA.
        """
        self.device = device
        self._host_memory = HostMemory()

    def snapshot(self, nvml: Nvml | None = None) -> MemorySnapshot:
        """Reads the memory now.

        Args:
            nvml: the driver's library, to be asked too.
        """
        return take_snapshot(self.device(), nvml, self._host_memory)
