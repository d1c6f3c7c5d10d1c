"""A ring of memory in RAM that is written by threads and read by a card, first in, first out.

Spans of any size up to a piece are taken one behind the other; the end is followed by the beginning. A span is free again when the card
has read it and all before it are free. So small pieces lie close together, and a large one takes as much work of this thread as a
small one.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .spool import memory_of

MOST_VIEWS = 256
"""Of parts of the ring, which are kept: to make one takes longer than to hand its memory to a thread."""


@dataclass(eq=False, slots=True)
class Span:
    """A part of the ring."""

    start: int
    memory: torch.Tensor
    """Its bytes, `(size,)`."""
    bytes: memoryview
    """The same memory as it was taken, for threads that fill it: they are to hold the interpreter for as short as can be."""
    read: torch.cuda.Event | None = None
    """Recorded after the device's copy out of it."""
    is_back: bool = False
    """True when nobody writes to it or will read it, but for what `read` waits for."""

    @property
    def end(self) -> int:
        """The byte behind its last one."""
        return self.start + self.memory.numel()

    @property
    def is_free(self) -> bool:
        """True when the device has read it."""
        return self.is_back and (self.read is None or bool(self.read.query()))  # type: ignore[no-untyped-call]  # torch's own


class RingMemory:
    """The memory of a ring. Not for several threads at once: they fill spans, one thread takes and gives them.

    Args:
        size_bytes: Of the memory.
        device: That reads it. For a CUDA card it is pinned where the driver gives that.

    Raises:
        RuntimeError: There is no room even for ordinary memory.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.size_bytes, self.is_pinned = size_bytes, False
        memory: torch.Tensor | None = None
        if device.type == "cuda":
            # Refused where the driver locks no more RAM; ordinary memory is slower, and right.
            with contextlib.suppress(RuntimeError):
                memory = torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
                self.is_pinned = True
        self._memory = torch.empty(size_bytes, dtype=torch.uint8, device="cpu") if memory is None else memory
        self._bytes = memory_of(self._memory)
        self._taken: deque[Span] = deque()
        """In the order in which they were taken, which is that of their places from the first one on."""
        self._views: dict[tuple[int, int], torch.Tensor] = {}
        self._events: list[torch.cuda.Event] = []
        """Of spans that are free again."""

    def take(self, size_bytes: int) -> Span | None:
        """Returns a span; None while those before it leave no room.

        Args:
            size_bytes: At most that of the ring.

        Raises:
            ValueError: It is more: waiting would never help.
        """
        if size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} of {self.size_bytes} bytes")
        self._drop_free()
        start = self._place(size_bytes)
        if start is None:
            return None
        end = start + size_bytes
        span = Span(start, self._view(start, end), self._bytes[start:end])
        self._taken.append(span)
        return span

    def give(self, span: Span, stream: torch.cuda.Stream | None = None) -> None:
        """Gives a span back.

        Args:
            span: Nobody writes to it.
            stream: Copies begun there may still read it.
        """
        if stream is not None:
            event = self._events.pop() if self._events else torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
            event.record(stream)
            span.read = event
        span.is_back = True

    def joined(self, spans: Sequence[Span]) -> Span:
        """Makes one span of some that were taken one after the other and lie so: the device reads them at once.

        Raises:
            ValueError: They do not lie one behind the other.
        """
        first, *others = spans
        end = first.end
        for span in others:
            if span.start != end:
                raise ValueError(f"a span from byte {span.start} on is not behind one that ends at {end}")
            end = span.end
        if others:
            # In this order: an interrupt leaves memory that is taken twice, and none that is taken by nobody.
            first.memory = self._view(first.start, end)
            for span in others:
                self._taken.remove(span)
        return first

    def wait(self) -> None:
        """Waits until the device has read the oldest span, which was given back."""
        event = self._taken[0].read if self._taken else None
        if event is not None:
            event.synchronize()

    def forget(self) -> None:
        """Gives all spans back. Nobody may write to them or read them."""
        self._taken = deque()

    @property
    def taken_bytes(self) -> int:
        """What lies in spans that are not free yet."""
        self._drop_free()
        return sum(span.memory.numel() for span in self._taken)

    def _view(self, start: int, end: int) -> torch.Tensor:
        """Returns a part of the memory. Pieces of large weights lie in the same places again and again."""
        found = self._views.get((start, end))
        if found is None:
            if len(self._views) == MOST_VIEWS:
                self._views.clear()
            found = self._views[start, end] = self._memory[start:end]
        return found

    def _drop_free(self) -> None:
        taken = self._taken
        while taken and taken[0].is_free:
            event = taken.popleft().read
            if event is not None:
                self._events.append(event)

    def _place(self, size_bytes: int) -> int | None:
        if not self._taken:
            return 0
        first, last = self._taken[0], self._taken[-1]
        end = last.end
        if last.start < first.start:
            # The last ones lie at the beginning, in front of the first ones.
            return end if end + size_bytes <= first.start else None
        if end + size_bytes <= self.size_bytes:
            return end
        return 0 if size_bytes <= first.start else None
