"""Which kernels this process uses: compiled and probed in the background, refused once and said once."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

SWITCH = "LORA_GUARD_KERNELS"
"""The environment variable: "0" keeps plain torch, for bug reports."""
LARGEST_RANK = 256
"""Joined ranks above it have no kernel."""


class Kernels:
    """The process-wide choice. A state by kind of kernel: "untried", "compiling", "works" or "refused: WHY"."""

    def __init__(self) -> None:
        self.enabled = os.environ.get(SWITCH, "1") != "0"
        """False: plain torch everywhere. The settings may write it."""

    def state(self, kind: str) -> str:
        """Returns the state of a kind."""
        return "untried" if self.enabled else "refused: switched off"

    def ready(self, kind: str, device: torch.device, dtype: torch.dtype, rank: int) -> bool:
        """Returns True where a probed kernel is there for a weight of this kind. Never waits."""
        return False

    def prepare(self, kinds: Iterable[str], device: torch.device, dtype: torch.dtype, ranks: Iterable[int]) -> None:
        """Begins to compile and probe in a background thread, each kernel once; returns at once.

        Args:
            kinds: `Stored.kind` of the weights.
            device: Where they lie when they are used.
            dtype: The layers' compute dtype.
            ranks: Their joined ranks; 0 for the dequantisation alone.
        """


KERNELS = Kernels()
"""The choice of this process."""
