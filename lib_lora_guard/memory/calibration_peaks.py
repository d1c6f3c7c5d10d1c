"""Measures the peak VRAM of parts of the work, which may be nested, with the counters of torch's allocator.

Compares the *used* bytes (`allocated_bytes`), not the bytes that the allocator holds (`reserved_bytes`). A part uses
the same after a hundred images as in a fresh process. The held bytes include blocks left by earlier parts and may not
grow at all. Source: docs.pytorch.org, torch.cuda.memory_stats, reset_peak_memory_stats.

torch has one peak for each device, so every part begins by resetting it. The old peak is kept for other readers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

log = logging.getLogger(__name__)


class Count(NamedTuple):
    """Bytes at present and at the peak since the last reset."""

    allocated: int
    allocated_peak: int
    active_peak: int
    reserved_peak: int


class Counter(Protocol):
    """Reads and resets torch's counters. TorchCounter implements it; tests use others."""

    def read(self, device: torch.device) -> Count: ...
    def reset(self, device: torch.device) -> None: ...


class TorchCounter:
    """Takes microseconds: torch counts on the CPU while it allocates, and nothing synchronizes with the GPU."""

    def read(self, device: torch.device) -> Count:
        found = torch.cuda.memory_stats_as_nested_dict(device)

        def number(name: str, which: str) -> int:
            return int(found.get(name, {}).get("all", {}).get(which, 0))

        return Count(
            number("allocated_bytes", "current"),
            number("allocated_bytes", "peak"),
            number("active_bytes", "peak"),
            number("reserved_bytes", "peak"),
        )

    def reset(self, device: torch.device) -> None:
        torch.cuda.reset_peak_memory_stats(device)


@dataclass(eq=False)
class Part:
    """One part of the work, during and after it."""

    device: Any
    thread: int
    began: int = 0
    base: int = 0
    """Used bytes that do not belong to this part."""
    highest: int = 0
    is_alone: bool = True
    peak_bytes: int | None = None
    """After the end: the most bytes it used beyond those used before. None if unknown: another thread or device was
    active too.
    """
    stays_bytes: int = 0
    """After the end: the growth of the used bytes since the beginning."""


class Peaks:
    """The parts of one process. A nested part's peak and remaining bytes are not counted for the outer part."""

    def __init__(self, counter: Counter | None = None) -> None:
        self._counter = counter or TorchCounter()
        self._lock = threading.RLock()
        self._open: list[Part] = []
        self._is_broken = False
        self.active_peak = self.reserved_peak = 0
        """The highest peaks that a reset here erased, since `forget`."""

    @contextmanager
    def part(self, device: Any) -> Iterator[Part]:
        """Measures the CUDA memory that the block uses. If the block raises, there is no peak."""
        part = Part(device, threading.get_ident())
        self._begin(part)
        try:
            yield part
        except BaseException:
            self._end(part)
            part.peak_bytes = None
            raise
        self._end(part)

    def forget(self) -> None:
        """Starts the highest peaks anew, for a reader that begins to observe now."""
        with self._lock:
            self.active_peak = self.reserved_peak = 0

    def _begin(self, part: Part) -> None:
        with self._lock:
            others = [one for one in self._open if one.thread != part.thread or one.device != part.device]
            for one in (*others, *([part] if others else [])):
                one.is_alone = False
            count = self._count(part.device)
            if self._open:
                outer = self._open[-1]
                outer.highest = max(outer.highest, count.allocated_peak - outer.base)
            part.began = part.base = count.allocated
            self._open.append(part)

    def _end(self, part: Part) -> None:
        with self._lock:
            count = self._count(part.device)
            self._open.remove(part)
            part.stays_bytes = count.allocated - part.began
            highest = max(part.highest, count.allocated_peak - part.base)
            part.peak_bytes = highest if part.is_alone and not self._is_broken else None
            if self._open:
                # The parts further out get it when this one ends.
                self._open[-1].base += part.stays_bytes

    def _count(self, device: torch.device) -> Count:
        """Returns the counters and resets torch's peak."""
        if not self._is_broken:
            try:
                count = self._counter.read(device)
                self._counter.reset(device)
            except Exception:
                # Some drivers and builds have no counters: images must work all the same.
                log.debug("peaks cannot be read", exc_info=True)
                self._is_broken = True
            else:
                self.active_peak = max(self.active_peak, count.active_peak)
                self.reserved_peak = max(self.reserved_peak, count.reserved_peak)
                return count
        return Count(0, 0, 0, 0)
