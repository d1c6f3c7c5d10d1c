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

from ..memory.readings import MemorySnapshot
from ..recorder.crash import Crash, last_crash
from ..recorder.crash_report import Precaution, avoid
from ..recorder.flight_recorder import ALIVE, RAM_NEED, FlightRecorder, Phase
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
        self.others = 0
        """Grows with every phase that begins or ends, except steps: unchanged while nothing but steps is done."""

    @property
    def is_open(self) -> bool:
        return self._folder is not None

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
        is_other = phase is not Phase.SAMPLING_STEP
        self.others += is_other
        try:
            with self.recorder.enter(
                phase,
                memory=self._memory(phase),
                plan=plan,
                model=None if about is None else about.name,
                storage=None if about is None else about.storage,
                loras=None if about is None else about.loras,
            ):
                yield
        finally:
            self.others += is_other

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

    def _memory(self, phase: Phase) -> dict[str, int | None] | None:
        now = time.monotonic()
        if phase is Phase.SAMPLING_STEP and now - self._last_look < BETWEEN_SNAPSHOTS_SECONDS:
            return None
        self._last_look = now
        try:
            snapshot = self._snapshot()
        except Exception:
            # The record must not be what stops an image.
            log.debug("no look at the memory", exc_info=True)
            return None
        return {ALIVE: snapshot.alive_ram_bytes, **{name: one.bytes for name, one in snapshot.readings()}}
