"""Keeps how full the memory was over the last images, for the panel's curve: bounded, and for any thread.

Samples come from the phases and steps that the guard sees anyway. Nothing here measures or waits.
"""

from __future__ import annotations

import itertools
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

SAMPLES = 600
"""An image has a dozen phases, and a sample each second of its steps."""
IMAGES = 24
STEP_TIMES = 12
PENDING_SECONDS = 60.0
"""What was done less than this before an image began belongs to it: the host loads its checkpoint first."""

STEP = "sampling_step"
"""The phase of a step, as the flight recorder names it."""


@dataclass(frozen=True)
class Levels:
    """How full the memory is; None for what is not known."""

    vram_bytes: int | None = None
    """In use on the card, by every program, with what torch keeps."""
    vram_total_bytes: int | None = None
    ram_bytes: int | None = None
    """In use of the machine's RAM, by every program."""
    ram_total_bytes: int | None = None


NOTHING_KNOWN = Levels()


@dataclass(frozen=True)
class Sample:
    """One point of the curve."""

    number: int
    """Increases with every sample."""
    time: float
    """Seconds since 1970."""
    image: int
    """The image that it belongs to."""
    phase: str
    """What begins here; empty between two phases."""
    levels: Levels
    promised_bytes: int | None = None
    """The most VRAM that may be in use until the next model is loaded, by the plan."""


@dataclass(frozen=True)
class Image:
    """One request for images."""

    number: int
    begun: float
    ended: float | None = None
    """None while it is being made."""
    peak_bytes: int | None = None
    """The most VRAM that was seen in use."""
    promised_bytes: int | None = None
    """The most VRAM that the plans of its loads allowed."""


@dataclass(frozen=True)
class Now:
    """What is being done at present."""

    phase: str
    """Empty between two phases of an image."""
    image: int
    calls: int = 0
    """Calls of the image model in this run of steps."""
    call_seconds: float | None = None
    """The median time of the last calls; None before the third."""


class Timeline:
    """The samples of one process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            clock: Seconds since 1970; for tests.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._images: deque[Image] = deque(maxlen=IMAGES)
        self._number = self._image = 0
        self._depth = 0
        """Requests that are being worked off: a detailer makes images inside another's."""
        self._pending: float | None = None
        self._open: list[str] = []
        self._calls = 0
        self._times: deque[float] = deque(maxlen=STEP_TIMES)
        self._promised: int | None = None

    def begin_image(self) -> None:
        """Begins a request for images, or one inside another."""
        with self._lock:
            self._depth += 1
            if self._depth > 1:
                return
            now = self._clock()
            self._image += 1
            last = self._samples[-1].time if self._samples else 0.0
            is_near = self._pending is not None and now - last < PENDING_SECONDS
            begun = self._pending if is_near and self._pending is not None else now
            self._images.append(Image(self._image, begun))
            self._pending = None

    def end_image(self, levels: Levels = NOTHING_KNOWN) -> None:
        """Ends what `begin_image` began."""
        with self._lock:
            self._depth = max(0, self._depth - 1)
            if self._depth:
                return
            self._end_steps()
            # An interrupt may have come before the end of a phase could be told.
            self._open.clear()
            self._add("", levels, of_image=True)
            self._promised = None
            if self._images and self._images[-1].ended is None:
                self._images[-1] = replace(self._images[-1], ended=self._clock())

    def enter(self, phase: str, levels: Levels | None = None) -> None:
        """Begins a phase.

        Args:
            phase: Its name.
            levels: The memory before it; None if it was not looked at.
        """
        with self._lock:
            if phase == STEP:
                self._calls += 1
                self._times.append(self._clock())
            else:
                self._open.append(phase)
                self._end_steps()
            if levels is None and phase == STEP and self._calls == 1 and self._samples:
                # The memory was looked at a moment ago. The curve shows when the steps begin all the same.
                levels = self._samples[-1].levels
            if levels is not None:
                self._add(phase, levels)

    def leave(self, phase: str, levels: Levels | None = None, promised_bytes: int | None = None) -> None:
        """Ends a phase.

        Args:
            phase: Its name.
            levels: The memory at its end: torch keeps what the phase took until the host empties its cache.
            promised_bytes: The most VRAM that may be in use from now on, if this phase has planned it.
        """
        with self._lock:
            if phase in self._open:
                self._open.reverse()
                self._open.remove(phase)
                self._open.reverse()
            if promised_bytes is not None:
                self._promised = promised_bytes
            if levels is not None:
                self._add(self._open[-1] if self._open else "", levels)

    def since(self, number: int, limit: int = SAMPLES) -> tuple[Sample, ...]:
        """Returns the newest `limit` samples after sample `number`, oldest first."""
        with self._lock:
            newer = [sample for sample in self._samples if sample.number > number]
        return tuple(newer[-limit:])

    def images(self) -> tuple[Image, ...]:
        """Returns the last images, oldest first."""
        with self._lock:
            return tuple(self._images)

    def now(self) -> Now | None:
        """Returns what is being done; None if nothing is."""
        with self._lock:
            if not self._depth and not self._open and not self._calls:
                return None
            phase = STEP if self._calls else self._open[-1] if self._open else ""
            times = list(self._times)
            between = [after - before for before, after in itertools.pairwise(times)]
            # The first call prepares what the others use.
            known = between[1:] if self._calls <= STEP_TIMES else between
            return Now(phase, self._image_now(), self._calls, median(known) if known else None)

    def _image_now(self) -> int:
        return self._image if self._depth else self._image + 1

    def _end_steps(self) -> None:
        self._calls = 0
        self._times.clear()

    def _add(self, phase: str, levels: Levels, of_image: bool = False) -> None:
        now = self._clock()
        self._number += 1
        last = self._samples[-1].time if self._samples else now
        if not self._depth and not of_image and (self._pending is None or now - last > PENDING_SECONDS):
            self._pending = now
        number = self._image if of_image else self._image_now()
        self._samples.append(Sample(self._number, now, number, phase, levels, self._promised))
        if self._images and self._images[-1].number == number:
            image = self._images[-1]
            self._images[-1] = replace(
                image,
                peak_bytes=_larger(image.peak_bytes, levels.vram_bytes),
                promised_bytes=_larger(image.promised_bytes, self._promised),
            )


def image_of(images: tuple[Image, ...], seconds: float) -> int:
    """Returns the number of the image that a log line of this time belongs to; 0 before the first that is known."""
    place = bisect_right([image.begun for image in images], seconds)
    return images[place - 1].number if place else 0


def _larger(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)
