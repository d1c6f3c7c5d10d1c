"""NVML for frequent queries from any thread: each answer is cached for a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .nvml import GpuProcesses, Nvml, NvmlMemory

BETWEEN_SECONDS = 1.0

_Answer = TypeVar("_Answer")


class PacedNvml(Nvml):
    """Nvml, opened at the first query. Caches only `memory` and `other_processes`."""

    def __init__(self, opened: Callable[[], Nvml] = Nvml, clock: Callable[[], float] = time.monotonic) -> None:
        """`opened` and `clock` are for tests."""
        # Nvml.__init__ is not called: it opens the library, which takes milliseconds.
        self._opened, self._clock = opened, clock
        self._nvml: Nvml | None = None
        self.missing = None
        self._answers: dict[Any, tuple[float, Any]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._answers.clear()
            if self._nvml is not None:
                self._nvml.close()

    def memory(self, device: torch.device) -> NvmlMemory:
        return self._cached(("memory", device), lambda nvml: nvml.memory(device))

    def other_processes(self, device: torch.device) -> GpuProcesses:
        return self._cached(("processes", device), lambda nvml: nvml.other_processes(device))

    def _cached(self, key: tuple[str, torch.device], ask: Callable[[Nvml], _Answer]) -> _Answer:
        with self._lock:
            when, answer = self._answers.get(key, (-BETWEEN_SECONDS, None))
            now = self._clock()
            if answer is None or now - when >= BETWEEN_SECONDS:
                self._nvml = self._nvml or self._opened()
                self.missing = self._nvml.missing
                answer = ask(self._nvml)
                # The pause starts after the answer: a slow query must not be repeated all the time.
                self._answers[key] = (self._clock(), answer)
            found: _Answer = answer
            return found
