"""How much of the card is free, in place of Forge's `get_free_memory`: without what other programs hold and Windows calls free
all the same. Source: Forge's `backend/memory_management.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from ...memory import Nvml, rules
from ...memory.step_times import driver_spills
from ...runtime.rule_log import RuleLog

BETWEEN_DRIVER_SECONDS = 1.0


class ForgeFree:
    def __init__(self, memory: Any, rule_log: RuleLog) -> None:
        """`memory`: Forge's `backend.memory_management`."""
        self._memory, self._rule_log = memory, rule_log
        self.nvml: Any = Nvml() if driver_spills() else None
        """None where torch's number is right: where drivers do not spill."""
        self._answers = False
        self._overstated: dict[Any, tuple[float, int]] = {}
        """By device: when it was asked, and how much more than NVML torch called free."""

    @property
    def is_believed(self) -> bool:
        """False where torch may be wrong by gigabytes and the driver's library says nothing."""
        return self.nvml is None or self._answers

    def get_free_memory(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Bytes, or a pair of them whose first counts, as Forge's."""
        found = original(*args, **kwargs)
        if self.nvml is None:
            return found
        device = (args[0] if args else kwargs.get("dev")) or self._memory.get_torch_device()
        if getattr(device, "type", "") != "cuda":
            return found
        is_pair = isinstance(found, tuple)
        total = int(found[0] if is_pair else found)
        total = max(0, total - self._overstated_bytes(device, total))
        return (total, *found[1:]) if is_pair else total

    def _overstated_bytes(self, device: Any, torch_bytes: int) -> int:
        """Asked once in a while: attention asks for free memory in every layer."""
        asked, excess = self._overstated.get(device, (-math.inf, 0))
        now = time.monotonic()
        if now - asked > BETWEEN_DRIVER_SECONDS:
            driver = self.nvml.memory(device).free.bytes
            self._answers = driver is not None
            held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            usable, finding = rules.free_vram_bytes(torch_bytes, None if driver is None else driver + held)
            excess = max(0, torch_bytes - usable)
            self._rule_log.tell(finding)
            self._overstated[device] = (now, excess)
        return excess
