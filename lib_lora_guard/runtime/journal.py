"""Writes down what the host is doing, so that the next start can say what a killed process died of.

The phases are those of `recorder.flight_recorder`. A host lays them around its own functions, with the bytes that a call is
about to take where these are known before it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..memory.readings import MemorySnapshot, trusted_free_bytes
from ..recorder.crash import Crash, last_crash
from ..recorder.crash_report import Precaution, avoid
from ..recorder.flight_recorder import ALIVE, KEPT_FREE, RAM_NEED, FlightRecorder, Phase
from ..reporting.timeline import Levels, Timeline
from .hooks import Layer, P, R

log = logging.getLogger(__name__)

BETWEEN_SNAPSHOTS_SECONDS = 1.0
"""For steps, which may be many a second. Every other phase takes longer than a look at the memory."""

Plan: TypeAlias = Mapping[str, int | None]
"""Bytes by the names of `flight_recorder`."""


@dataclass(frozen=True)
class ModelFacts:
    """Describes a model for the record: no prompt, no folder."""

    name: str
    storage: str = ""
    loras: tuple[str, ...] = ()


class Journal:
    """The record of one process. It exists from the start and writes nothing until it is opened.

    Switching the guard off and on is no end of the process, so takeovers that follow each other share the journal.
    """

    def __init__(self, snapshot: Callable[[], MemorySnapshot], recorder: FlightRecorder | None = None) -> None:
        """
        Args:
            snapshot: reads the memory now; may raise.
            recorder: for tests; `open` makes one.
        """
        self._snapshot = snapshot
        self._crash: Crash | None = None
        self._folder: Path | None = None
        self.recorder = recorder or FlightRecorder()
        self._last_look = 0.0
        self.timeline = Timeline()
        """How full the memory was, for the panel."""
        self.others = 0
        """Grows with every phase that begins or ends, except steps: unchanged while nothing but steps is done."""

    @property
    def is_open(self) -> bool:
        return self._folder is not None

    @property
    def crash(self) -> Crash | None:
        """How the last process died; None if it ended normally, or if the journal is not open."""
        return self._crash

    def open(self, folder: Path) -> Crash | None:
        """Begins to write, in a file below `folder`. A second call does nothing.

        Returns:
            How the last process died; None if it ended normally, or if the journal was open already.
        """
        if self._folder is not None:
            return None
        self._folder = folder
        self._crash = last_crash(folder)
        self.recorder = FlightRecorder.open(folder) or self.recorder
        return self._crash

    def close(self) -> None:
        """Marks the normal end of the process."""
        self.recorder.close()

    @contextlib.contextmanager
    def phase(self, phase: Phase, about: ModelFacts | None = None, plan: Plan | None = None) -> Iterator[None]:
        """Records `phase` while the block runs.

        Args:
            phase: what is being done.
            about: the model that it is done with.
            plan: what it is about to take.
        """
        is_step = phase is Phase.SAMPLING_STEP
        self.others += not is_step
        look = self._look(phase)
        self.timeline.enter(phase.value, look.levels)
        try:
            with self.recorder.enter(
                phase,
                memory=look.numbers,
                plan=plan,
                model=None if about is None else about.name,
                storage=None if about is None else about.storage,
                loras=None if about is None else about.loras,
            ):
                yield
        finally:
            self.others += not is_step
            if not is_step:
                self._end(phase, None if plan is None else plan.get(KEPT_FREE))

    @contextlib.contextmanager
    def image(self) -> Iterator[None]:
        """Wraps a request for images, for the panel."""
        self.timeline.begin_image()
        try:
            yield
        finally:
            self.timeline.end_image(self._look(Phase.OTHER).levels or Levels())

    def around(self, phase: Phase, plan: Callable[..., Plan | None] | None = None) -> Layer:
        """Makes a layer that records a phase while a function of the host runs.

        Args:
            phase: what the function does.
            plan: gets what the function gets; None from it means that this call is no such phase.
        """

        def layer(original: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
            planned: Plan | None = {}
            try:
                planned = {} if plan is None else plan(*args, **kwargs)
            except Exception:
                # Another version of the host passes other things; the phase is what matters.
                log.debug("no plan for %s", phase.value, exc_info=True)
            if planned is None:
                return original(*args, **kwargs)
            with self.phase(phase, plan=planned or None):
                return original(*args, **kwargs)

        return layer

    def work(self, phase: Phase, ram_bytes: int) -> contextlib.AbstractContextManager[None]:
        """Records what an engine is about to do (`patching.watching.Watch`)."""
        return self.phase(phase, plan={RAM_NEED: ram_bytes or None})

    def precautions(self, about: ModelFacts) -> frozenset[Precaution]:
        """Returns what to plan around, because the last process died of it with a model like this one."""
        return avoid(self._crash, about.name, about.storage)

    def _end(self, phase: Phase, kept_free_bytes: int | None) -> None:
        look = self._look(phase)
        promised = None
        if look.levels is not None and look.levels.vram_bytes is not None and kept_free_bytes is not None:
            most = look.levels.vram_bytes - look.unused_bytes + kept_free_bytes
            promised = min(most, look.levels.vram_total_bytes or most)
        self.timeline.leave(phase.value, look.levels, promised)

    def _look(self, phase: Phase) -> _Look:
        now = time.monotonic()
        if phase is Phase.SAMPLING_STEP and now - self._last_look < BETWEEN_SNAPSHOTS_SECONDS:
            return _Look()
        self._last_look = now
        try:
            return _look_at(self._snapshot())
        except Exception:
            # The record must not be what stops an image.
            log.debug("no look at the memory", exc_info=True)
            return _Look()


@dataclass(frozen=True)
class _Look:
    """The memory at one moment; None where it was not looked at."""

    numbers: dict[str, int | None] | None = None
    """Under the names of `flight_recorder`."""
    levels: Levels | None = None
    unused_bytes: int = 0
    """VRAM that torch keeps without using it."""


def _look_at(snapshot: MemorySnapshot) -> _Look:
    numbers: dict[str, int | None] = {ALIVE: snapshot.alive_ram_bytes}
    numbers |= {name: one.bytes for name, one in snapshot.readings()}
    unused = max(0, (numbers.get("vram_reserved") or 0) - (numbers.get("vram_active") or 0))
    if "ram_total" not in numbers:
        return _Look(numbers)
    return _Look(numbers, _levels(snapshot), unused)


def _levels(look: MemorySnapshot) -> Levels:
    vram_total, ram_total = look.vram_total.bytes, look.ram_total.bytes
    vram_free, ram_free = trusted_free_bytes(look.vram_free.bytes, look.vram_free_nvml.bytes), look.fast_ram_bytes(0)
    return Levels(
        None if vram_total is None or vram_free is None else max(0, vram_total - vram_free),
        vram_total,
        None if ram_total is None or ram_free is None else max(0, ram_total - ram_free),
        ram_total,
    )
