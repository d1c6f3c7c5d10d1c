"""Corrects predictions of peak memory by what earlier runs measured.

An under-prediction ends in an out-of-memory error, so it raises the correction at once. An over-prediction costs only
speed, so it lowers the correction only if all of the last REMEMBERED measurements agree. Pure: files and numbers.
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

from ..messages import reason, say
from .calibration_file import CalibrationFile, Entries, Entry

log = logging.getLogger(__name__)

LOWEST, HIGHEST = -0.25, 0.5
"""Bounds of a correction, as a share of the prediction. A larger error means that the estimate or the measurement is
wrong.
"""

REMEMBERED = 5
LARGEST_ENTRIES = 200
"""About 60 KB in the file. The entries that were not measured for the longest time are dropped first."""

LARGEST_BYTES = 1 << 50
FILE_NAME = "calibration.json"
MOST_UNWRITTEN = 100
BETWEEN_TRIES_SECONDS = 300.0
"""Pause after a failed write. A refused write takes seconds under Windows, and an image waits for it."""
PIXELS_OF_BUCKET = 512 * 512


class Kind(str, Enum):
    """The operation whose peak is measured."""

    LOAD = "load"
    APPLY = "apply"
    STEP = "step"
    DECODE = "decode"


@dataclass(frozen=True)
class Key:
    """Identifies the measurements that share one correction.

    `resolution` comes from `resolution_bucket`, `stack` from `stack_signature`.
    """

    kind: Kind
    architecture: str
    storage: str
    resolution: int = 0
    batch: int = 1
    stack: str = ""


class Calibration:
    """The corrections of one card, in a file shared with other processes. Thread-safe.

    If the file cannot be written, the corrections last for this process only, and one warning is logged.
    """

    def __init__(self, path: Path, card: str, torch_version: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the file.

        Args:
            path: The file; it need not exist.
            card: The driver's name of the card. Other cards and other versions of torch share the file, not the
                corrections.
            torch_version: The version of torch.
            clock: Returns monotonic seconds.
        """
        self._clock, self._not_before = clock, -math.inf
        self._file = CalibrationFile(path)
        # `torch.__version__` is a subclass of str that compares slowly and equals other spellings.
        self._owner = (str(card), str(torch_version))
        self._lock = threading.Lock()
        self._entries = self._file.read()
        self._unwritten: list[tuple[tuple[str, ...], int, int]] = []
        self._warned = False

    def record(self, key: Key, predicted_bytes: int, measured_bytes: int) -> None:
        """Records a measured peak and its prediction, before any correction. Implausible numbers are ignored."""
        self.record_all([(key, predicted_bytes, measured_bytes)])

    def record_all(self, measured: Iterable[tuple[Key, int, int]]) -> None:
        """Records several `(key, predicted bytes, measured bytes)` with one write."""
        records = [
            (self._entry_key(key), int(predicted_bytes), int(measured_bytes))
            for key, predicted_bytes, measured_bytes in measured
            if 0 < predicted_bytes <= LARGEST_BYTES and 0 < measured_bytes <= LARGEST_BYTES
        ]
        if not records:
            return
        with self._lock:
            # Records that could not be written are written with the next ones. The oldest are dropped: they would no
            # longer change a correction.
            self._unwritten = [*self._unwritten, *records][-MOST_UNWRITTEN:]
            _add_records(self._entries, records)
            if self._clock() < self._not_before:
                return
            try:
                self._entries = self._file.change(lambda entries: _add_records(entries, self._unwritten))
                self._unwritten = []
            except OSError as error:
                self._not_before = self._clock() + BETWEEN_TRIES_SECONDS
                self._warn_once(error)

    def correction_bytes(self, key: Key, predicted_bytes: int | None = None) -> int:
        """Returns the bytes to add to a prediction: between LOWEST and HIGHEST times the prediction; 0 if `key` was never
        measured.

        Args:
            key: The operation, model and conditions whose measurements count.
            predicted_bytes: The prediction; None takes the last recorded one.
        """
        with self._lock:
            entry = self._entries.get(self._entry_key(key))
        if entry is None:
            return 0
        return correction_of(entry, predicted_bytes)

    def measurements(self, key: Key) -> int:
        """Returns how often `key` was measured, by all processes."""
        with self._lock:
            entry = self._entries.get(self._entry_key(key))
        return 0 if entry is None else entry.count

    def reset(self) -> int:
        """Deletes all corrections, of every card, and returns their number.

        Raises:
            OSError: The file cannot be deleted.
        """
        with self._lock:
            count = self._file.delete()
            self._entries, self._unwritten = {}, []
        return count

    def _entry_key(self, key: Key) -> tuple[str, ...]:
        resolution, batch = str(key.resolution), str(key.batch)
        return (*self._owner, key.kind.value, key.architecture, key.storage, resolution, batch, key.stack)

    def _warn_once(self, error: OSError) -> None:
        if not self._warned:
            say(log, logging.WARNING, "calibration.not_kept", file=str(self._file.path), error=reason(error))
        self._warned = True


def correction_of(entry: Entry, predicted_bytes: int | None = None) -> int:
    """Returns the correction that `entry` gives; see `Calibration.correction_bytes`."""
    predicted = max(0, entry.predicted_bytes if predicted_bytes is None else predicted_bytes)
    # Missing measurements count as errors of 0, so that a single measurement lowers nothing.
    missing = [0] * (REMEMBERED - len(entry.errors_bytes))
    worst = max([*entry.errors_bytes[-REMEMBERED:], *missing])
    return min(max(worst, math.ceil(LOWEST * predicted)), math.floor(HIGHEST * predicted))


def resolution_bucket(width: int, height: int) -> int:
    """Returns the pixels in units of 512 x 512, rounded up. One megapixel of SDXL or Flux, in any aspect ratio, is 4."""
    return math.ceil(width * height / PIXELS_OF_BUCKET)


def stack_signature(loras: Iterable[str]) -> str:
    """Returns a hash of a stack of LoRAs, without their names; "" for no LoRA.

    `loras`: one string for each; the caller decides which facts it contains (name, rank, order).
    """
    names = list(loras)
    return hashlib.blake2s("\0".join(names).encode("utf-8", "replace"), digest_size=8).hexdigest() if names else ""


def _add_records(entries: Entries, records: Iterable[tuple[tuple[str, ...], int, int]]) -> None:
    """Adds records to `entries`, the latest at the end, and drops the oldest entries above LARGEST_ENTRIES."""
    for name, predicted, measured in records:
        old = entries.pop(name, Entry(0, 0, ()))
        errors = (*old.errors_bytes, measured - predicted)[-REMEMBERED:]
        entries[name] = Entry(old.count + 1, predicted, errors)
    for name in list(entries)[: max(0, len(entries) - LARGEST_ENTRIES)]:
        del entries[name]
