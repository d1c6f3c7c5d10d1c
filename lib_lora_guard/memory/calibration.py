"""What peaks were predicted, what was measured, and by how much the next prediction is corrected.

An under-prediction raises the correction at once, since it ends in an out-of-memory error; an over-prediction costs speed
only and lowers it when nothing in the last REMEMBERED measurements speaks against. Pure: files and numbers.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..messages import say
from .calibration_file import CalibrationFile, Entries, Entry

log = logging.getLogger(__name__)

LOWEST, HIGHEST = -0.25, 0.5
"""Of the prediction. An estimate that is wrong by more is wrong in itself, or the measurement was."""

REMEMBERED = 5
LARGEST_ENTRIES = 200
"""About 60 KB in the file. The ones that were not measured for longest go first."""

LARGEST_BYTES = 1 << 50
FILE_NAME = "calibration.json"
MOST_UNWRITTEN = 100
BETWEEN_TRIES_SECONDS = 300.0
"""After the file could not be written: where Windows refuses it, one try takes seconds, and an image waits for it."""
PIXELS_OF_BUCKET = 512 * 512


class Kind(str, Enum):
    """What the peak is of."""

    LOAD = "load"
    APPLY = "apply"
    STEP = "step"
    DECODE = "decode"


@dataclass(frozen=True)
class Key:
    """What is alike enough for one correction. `resolution` from `resolution_bucket`, `stack` from `stack_signature`."""

    kind: Kind
    architecture: str
    storage: str
    resolution: int = 0
    batch: int = 1
    stack: str = ""


class Calibration:
    """The corrections of one card, kept in a file that other processes use too. Nothing here raises but `reset`: where the
    file cannot be written the corrections hold for this process, which is said once. Any thread may call."""

    def __init__(self, path: Path, card: str, torch_version: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`card` as the driver names it: other cards and other versions of torch share the file, not the corrections."""
        self._clock, self._not_before = clock, -math.inf
        self._file = CalibrationFile(path)
        # torch's own version is a string that is slow to compare, and equal to others.
        self._owner = (str(card), str(torch_version))
        self._lock = threading.Lock()
        self._entries = self._file.read()
        self._unwritten: list[tuple[tuple[str, ...], int, int]] = []
        self._said = False

    def record(self, key: Key, predicted_bytes: int, measured_bytes: int) -> None:
        """A measured peak and what was predicted for it, before any correction. Numbers that no memory has are left out."""
        self.record_all([(key, predicted_bytes, measured_bytes)])

    def record_all(self, measured: Iterable[tuple[Key, int, int]]) -> None:
        """Several of `(key, predicted, measured)`, written at once."""
        records = [
            (self._name(key), int(predicted_bytes), int(measured_bytes))
            for key, predicted_bytes, measured_bytes in measured
            if 0 < predicted_bytes <= LARGEST_BYTES and 0 < measured_bytes <= LARGEST_BYTES
        ]
        if not records:
            return
        with self._lock:
            # Those that could not be written are written with the next; what is too old would change nothing any more.
            self._unwritten = [*self._unwritten, *records][-MOST_UNWRITTEN:]
            _take(self._entries, records)
            if self._clock() < self._not_before:
                return
            try:
                self._entries = self._file.change(lambda entries: _take(entries, self._unwritten))
                self._unwritten = []
            except OSError as error:
                self._not_before = self._clock() + BETWEEN_TRIES_SECONDS
                self._say_once(error)

    def correction_bytes(self, key: Key, predicted_bytes: int | None = None) -> int:
        """What to add to `predicted_bytes` (left out: the last one recorded); within LOWEST and HIGHEST of it, 0 for what
        was never measured."""
        with self._lock:
            entry = self._entries.get(self._name(key))
        if entry is None:
            return 0
        return correction_of(entry, predicted_bytes)

    def measurements(self, key: Key) -> int:
        """How often `key` was measured, by every process."""
        with self._lock:
            entry = self._entries.get(self._name(key))
        return 0 if entry is None else entry.count

    def reset(self) -> int:
        """Forgets everything, for every card, and says how many corrections that were. Raises OSError where the file cannot
        be deleted."""
        with self._lock:
            count = self._file.delete()
            self._entries, self._unwritten = {}, []
        return count

    def _name(self, key: Key) -> tuple[str, ...]:
        resolution, batch = str(key.resolution), str(key.batch)
        return (*self._owner, key.kind.value, key.architecture, key.storage, resolution, batch, key.stack)

    def _say_once(self, error: OSError) -> None:
        if not self._said:
            say(log, logging.WARNING, "calibration.not_kept", file=str(self._file.path), error=str(error))
        self._said = True


def correction_of(entry: Entry, predicted_bytes: int | None = None) -> int:
    """See `Calibration.correction_bytes`."""
    predicted = max(0, entry.predicted_bytes if predicted_bytes is None else predicted_bytes)
    # What was not measured yet counts as right: one measurement alone lowers nothing.
    missing = [0] * (REMEMBERED - len(entry.errors_bytes))
    worst = max([*entry.errors_bytes[-REMEMBERED:], *missing])
    return min(max(worst, math.ceil(LOWEST * predicted)), math.floor(HIGHEST * predicted))


def resolution_bucket(width: int, height: int) -> int:
    """Pixels in units of 512 x 512, rounded up: what SDXL and Flux call one megapixel, in any format, is 4."""
    return math.ceil(width * height / PIXELS_OF_BUCKET)


def stack_signature(loras: Iterable[str]) -> str:
    """A stack of LoRAs without its names: "" for none. The caller says what makes two stacks alike (names, ranks, order)."""
    names = list(loras)
    return hashlib.blake2s("\0".join(names).encode("utf-8", "replace"), digest_size=8).hexdigest() if names else ""


def _take(entries: Entries, records: Iterable[tuple[tuple[str, ...], int, int]]) -> None:
    """Puts records into `entries`, the one measured last at the end, and forgets those at the beginning."""
    for name, predicted, measured in records:
        old = entries.pop(name, Entry(0, 0, ()))
        errors = (*old.errors_bytes, measured - predicted)[-REMEMBERED:]
        entries[name] = Entry(old.count + 1, predicted, errors)
    for name in list(entries)[: max(0, len(entries) - LARGEST_ENTRIES)]:
        del entries[name]
