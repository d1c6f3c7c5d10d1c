"""The file of the corrections: JSON with a version, changed by one process at a time and never half written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .file_lock import locked

VERSION = 2
"""2: a step counts the copy of the largest low-bit layer. Corrections of another version do not fit."""
WAIT_SECONDS = 2.0
"""For another process, which holds the lock for some milliseconds."""

_LONGEST_BYTES = 4 << 20
_NAME_PARTS = 8
_NAME_CHARACTERS = 200
_REPLACE_TRIES, _REPLACE_SECONDS = 50, 0.01


@dataclass(frozen=True)
class Entry:
    """`errors_bytes`: measured - predicted, of the last measurements, oldest first. `count`: of all."""

    count: int
    predicted_bytes: int
    errors_bytes: tuple[int, ...]


Entries = dict[tuple[str, ...], Entry]
"""By the parts of the key, the one used last at the end."""


class CalibrationFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path.with_name(path.name + ".lock")

    def read(self) -> Entries:
        """What the file holds; nothing where there is none, or one that cannot be understood."""
        return self._found() or {}

    def change(self, change: Callable[[Entries], None]) -> Entries:
        """Applies `change` to what the file holds now, writes that and returns it. Raises OSError where it cannot."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._lock_path, WAIT_SECONDS):
            found = self._found()
            if found is None:
                self._keep_aside()
            entries = found or {}
            change(entries)
            self._write(entries)
        return entries

    def delete(self) -> int:
        """Removes the file, and says how many entries it had. Raises OSError where it cannot."""
        if not self.path.exists():
            return 0
        with locked(self._lock_path, WAIT_SECONDS):
            count = len(self.read())
            _patiently(lambda: self.path.unlink(missing_ok=True))
        return count

    def _found(self) -> Entries | None:
        """None for a file that is not of this version, or no such file at all."""
        try:
            with self.path.open("rb") as file:
                raw = file.read(_LONGEST_BYTES)
        except OSError:
            return {}
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict) or document.get("version") != VERSION:
            return None
        listed = document.get("entries")
        known = (_entry(entry) for entry in (listed if isinstance(listed, list) else []))
        return dict(pair for pair in known if pair is not None)

    def _keep_aside(self) -> None:
        """What another version wrote may be wanted again: the first such file is kept."""
        aside = self.path.with_name(self.path.name + ".old")
        if not aside.exists():
            with suppress(OSError):
                os.replace(self.path, aside)

    def _write(self, entries: Entries) -> None:
        listed = [
            {"key": name, "count": entry.count, "predicted": entry.predicted_bytes, "errors": entry.errors_bytes}
            for name, entry in entries.items()
        ]
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps({"version": VERSION, "entries": listed}), encoding="utf-8")
        _patiently(lambda: os.replace(temporary, self.path))


def _entry(entry: Any) -> tuple[tuple[str, ...], Entry] | None:
    """One entry of the file; None where a hand or a fault changed it into something else."""
    if not isinstance(entry, dict):
        return None
    name, errors = entry.get("key"), entry.get("errors")
    numbers = [entry.get("count"), entry.get("predicted"), *(errors if isinstance(errors, list) else [None])]
    if not isinstance(name, list) or len(name) != _NAME_PARTS or not all(isinstance(part, str) for part in name):
        return None
    if not all(type(number) is int and abs(number) < 1 << 62 for number in numbers):
        return None
    count, predicted, *kept = numbers
    return (tuple(name), Entry(count, predicted, tuple(kept))) if count > 0 and predicted > 0 else None


def _patiently(act: Callable[[], None]) -> None:
    """Windows refuses to replace or delete a file for as long as anybody, a virus scanner too, has it open."""
    for _ in range(_REPLACE_TRIES):
        with suppress(PermissionError):
            return act()
        time.sleep(_REPLACE_SECONDS)
    return act()
