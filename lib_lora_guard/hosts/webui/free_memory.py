"""Corrects how much of the card is free: without what other programs hold and Windows still calls free.

Source: `backend/memory_management.py` (`get_free_memory`) of Forge and of Forge Neo.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Concatenate, Protocol, TypeAlias

import torch

from ...memory import Nvml, rules
from ...memory.step_times import driver_spills
from ...runtime.hooks import P
from ...runtime.rule_log import RuleLog

BETWEEN_DRIVER_SECONDS = 1.0

Free: TypeAlias = int | tuple[int, int]
"""Bytes; or all of them, and those that torch holds without using them."""


class Devices(Protocol):
    """The module `backend.memory_management`."""

    def get_torch_device(self) -> torch.device: ...


class FreeMemory:
    """Asks the driver's library where torch's number may be wrong."""

    def __init__(self, memory: Devices, rule_log: RuleLog) -> None:
        """
        Args:
            memory: the host's `backend.memory_management`.
            rule_log: gets what the rules change.
        """
        self._memory, self._rule_log = memory, rule_log
        self.nvml: Nvml | None = Nvml() if driver_spills() else None
        """None if torch's number is right: the driver does not spill into RAM."""
        self._answers = False
        self._overstated: dict[torch.device, tuple[float, int]] = {}
        """By device: when the driver was asked, and how much more than the driver torch called free."""

    @property
    def is_believed(self) -> bool:
        """False if torch may be wrong by gigabytes and the driver's library does not answer."""
        return self.nvml is None or self._answers

    def get_free_memory(
        self,
        original: Callable[Concatenate[torch.device | None, P], Free],
        dev: torch.device | None = None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Free:
        """Stands in place of `get_free_memory`. Of a pair the first number is corrected."""
        found = original(dev, *args, **kwargs)
        if self.nvml is None:
            return found
        device = dev or self._memory.get_torch_device()
        if device.type != "cuda":
            return found
        total = int(found[0] if isinstance(found, tuple) else found)
        total = max(0, total - self._overstated_bytes(self.nvml, device, total))
        return (total, *found[1:]) if isinstance(found, tuple) else total

    def _overstated_bytes(self, nvml: Nvml, device: torch.device, torch_bytes: int) -> int:
        """Asks once in a while: attention asks for free memory in every layer."""
        asked, excess = self._overstated.get(device, (-math.inf, 0))
        now = time.monotonic()
        if now - asked > BETWEEN_DRIVER_SECONDS:
            driver = nvml.memory(device).free.bytes
            self._answers = driver is not None
            held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            usable, finding = rules.free_vram_bytes(torch_bytes, None if driver is None else driver + held)
            excess = max(0, torch_bytes - usable)
            self._rule_log.tell(finding)
            self._overstated[device] = (now, excess)
        return excess
