"""What a part of the work takes of the card beside what was there before: peaks of torch's allocator, parts within parts.

Compared is what is *used* (`allocated_bytes`), not what the allocator holds for it (`reserved_bytes`): a part uses as much
after a hundred pictures as in a fresh process, while what it holds lies among blocks that earlier parts left behind and
grows by nothing where these are enough. Source: docs.pytorch.org, torch.cuda.memory_stats, reset_peak_memory_stats.

Torch has one peak for a device, so each part begins by resetting it. What it was is kept for whoever else reads it.
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
    """Bytes, now and at the peak since the last reset."""

    allocated: int
    allocated_peak: int
    active_peak: int
    reserved_peak: int


class Counter(Protocol):
    """See TorchCounter, the only one outside tests."""

    def read(self, device: torch.device) -> Count: ...
    def reset(self, device: torch.device) -> None: ...


class TorchCounter:
    """Microseconds each: torch counts as it allocates, on this side of the card, and nothing waits for the card."""

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
    """One part of the work, while it runs and after."""

    device: Any
    thread: int
    began: int = 0
    base: int = 0
    """What of the memory in use is not this part's."""
    highest: int = 0
    is_alone: bool = True
    peak_bytes: int | None = None
    """After the end: the most that it used beside what was there before. None where nobody can say, because another thread
    was at work on the card too, or another device was."""
    stays_bytes: int = 0
    """After the end: how much more is used than at the beginning."""


class Peaks:
    """The parts of one process. What a part within another one took, and what it left behind, is not the outer one's."""

    def __init__(self, counter: Counter | None = None) -> None:
        self._counter = counter or TorchCounter()
        self._lock = threading.RLock()
        self._open: list[Part] = []
        self._is_broken = False
        self.active_peak = self.reserved_peak = 0
        """The highest that were reset here, since `forget`."""

    @contextmanager
    def part(self, device: Any) -> Iterator[Part]:
        """Measures what the block takes of a CUDA device. Where it raises there is no peak."""
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
        """Somebody else begins to look at the peaks from here on."""
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
                # Those further out get it with the end of this one.
                self._open[-1].base += part.stays_bytes

    def _count(self, device: torch.device) -> Count:
        """The numbers until now; the peak begins anew."""
        if not self._is_broken:
            try:
                count = self._counter.read(device)
                self._counter.reset(device)
            except Exception:
                # A driver or build that does not count: images are made all the same.
                log.debug("peaks cannot be read", exc_info=True)
                self._is_broken = True
            else:
                self.active_peak = max(self.active_peak, count.active_peak)
                self.reserved_peak = max(self.reserved_peak, count.reserved_peak)
                return count
        return Count(0, 0, 0, 0)
