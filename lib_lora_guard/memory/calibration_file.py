"""The file with the corrections: versioned JSON that one process changes at a time and that is replaced atomically."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..messages import say
from ..private_files import make_private_folder, open_private, other_than_file
from .file_lock import locked

log = logging.getLogger(__name__)

VERSION = 2
"""Since version 2 a step includes the copy of the largest low-bit layer. Corrections of another version do not fit."""
WAIT_SECONDS = 2.0
"""Timeout for the lock. Another process holds it for some milliseconds."""

_LONGEST_BYTES = 4 << 20
_NAME_PARTS = 8
_NAME_CHARACTERS = 200
_REPLACE_TRIES, _REPLACE_SECONDS = 50, 0.01


@dataclass(frozen=True)
class Entry:
    """The measurements of one key."""

    count: int
    """The number of all measurements."""
    predicted_bytes: int
    """The last prediction."""
    errors_bytes: tuple[int, ...]
    """Measured minus predicted, of the last measurements, oldest first."""


Entries = dict[tuple[str, ...], Entry]
"""The entries by the parts of their key, the one measured last at the end."""


class CalibrationFile:
    """Reads and changes one such file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path.with_name(path.name + ".lock")

    def read(self) -> Entries:
        """Returns the entries; none if the file is missing, unreadable or of another version."""
        try:
            return self._read_entries() or {}
        except OSError:
            return {}

    def change(self, change: Callable[[Entries], None]) -> Entries:
        """Applies `change` to the entries of the file, writes the result and returns it.

        Raises:
            OSError: The file cannot be locked, read or written; it stays as it is.
        """
        make_private_folder(self.path.parent)
        with locked(self._lock_path, WAIT_SECONDS):
            found = self._read_entries()
            if found is None:
                self._keep_other_version()
            entries = found or {}
            change(entries)
            self._write(entries)
        return entries

    def delete(self) -> int:
        """Deletes the file and returns how many entries it had.

        Raises:
            OSError: The file cannot be locked or deleted.
        """
        if not self.path.exists():
            return 0
        with locked(self._lock_path, WAIT_SECONDS):
            count = len(self.read())
            retry_while_open(lambda: self.path.unlink(missing_ok=True))
        return count

    def _read_entries(self) -> Entries | None:
        """Returns the entries; empty if there is no file, None for a file that is not of this version.

        Raises:
            OSError: There is something that cannot be read.
        """
        try:
            with open_private(self.path, "rb") as file:
                raw = file.read(_LONGEST_BYTES)
        except FileNotFoundError:
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

    def _keep_other_version(self) -> None:
        """Keeps the first file of another version as `.old`: its user may want it back."""
        aside = self.path.with_name(self.path.name + ".old")
        if not os.path.lexists(aside):
            with suppress(OSError):
                os.replace(self.path, aside)
                say(log, logging.WARNING, "calibration.begun_anew", file=str(self.path), kept=aside.name)

    def _write(self, entries: Entries) -> None:
        listed = [
            {"key": name, "count": entry.count, "predicted": entry.predicted_bytes, "errors": entry.errors_bytes}
            for name, entry in entries.items()
        ]
        temporary = self.path.with_name(self.path.name + ".tmp")
        if other_than_file(temporary) is None:
            # Left by a killed process, or a link to another file.
            temporary.unlink(missing_ok=True)
        with open_private(temporary, "xb") as file:
            file.write(json.dumps({"version": VERSION, "entries": listed}).encode())
        retry_while_open(lambda: os.replace(temporary, self.path))


def _entry(entry: Any) -> tuple[tuple[str, ...], Entry] | None:
    """Returns one entry of the file; None if it is malformed, after an edit by hand or a fault."""
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


def retry_while_open(act: Callable[[], None]) -> None:
    """Repeats `act`: Windows refuses to replace or delete a file while another program (a virus scanner, say) has it
    open.
    """
    for _ in range(_REPLACE_TRIES):
        with suppress(PermissionError):
            return act()
        time.sleep(_REPLACE_SECONDS)
    return act()
