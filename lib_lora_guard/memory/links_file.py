"""The file with the measured speeds between RAM and the card: versioned JSON that one process changes at a time."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..private_files import make_private_folder, open_private
from .calibration_file import retry_while_open
from .file_lock import locked

FILE_NAME = "links.json"
VERSION = 3
"""Since version 3 a measurement has its time, and its name the driver."""
KEPT_SECONDS = 24 * 3600
"""A laptop changes between mains and battery, or takes its card out of a dock, within a day; the card and the driver stay the
same. Measuring takes a tenth of a second, so it costs nothing to be right again the next day."""
LONGEST_BYTES = 1 << 20
LEAST, MOST = 1e8, 1e12
"""Bytes per second that are believed: a machine that slept meanwhile shows less."""
WAIT_SECONDS = 1.0


class Measured(NamedTuple):
    """Bytes per second between RAM and one card.

    Attributes:
        to_card: From ordinary RAM.
        to_ram: Into RAM that is allocated for it.
        pinned: To the card from pinned RAM.
        when: Of the measurement, in seconds since 1970.
    """

    to_card: float
    to_ram: float
    pinned: float
    when: float = 0.0

    def holds(self, now: float) -> bool:
        """Returns False for a measurement that is too old, or from the future of a clock that was wrong.

        Args:
            now: In seconds since 1970.
        """
        return abs(now - self.when) <= KEPT_SECONDS


def read(folder: Path) -> dict[str, Measured]:
    """Returns the kept rates by card, old ones too; none if there is no file of this version."""
    with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError, LookupError):
        with open_private(folder / FILE_NAME, "rb") as file:
            document = json.loads(file.read(LONGEST_BYTES))
        if document["version"] == VERSION:
            cards = document["cards"].items()
            return {name: found for name, numbers in cards if (found := _checked(numbers)) is not None}
    return {}


def keep(folder: Path, name: str, measured: Measured) -> None:
    """Writes the rates of one card beside those of others that still hold.

    Args:
        folder: Of the file.
        name: The card and all that its rates depend on.
        measured: The rates.

    Raises:
        OSError: The file cannot be locked or written.
    """
    make_private_folder(folder)
    path = folder / FILE_NAME
    with locked(_lock(path), WAIT_SECONDS):
        cards = {other: one for other, one in read(folder).items() if one.holds(measured.when)} | {name: measured}
        temporary = path.with_name(path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        with open_private(temporary, "xb") as file:
            file.write(json.dumps({"version": VERSION, "cards": cards}).encode())
        os.replace(temporary, path)


def delete(folder: Path) -> int:
    """Deletes the file and returns how many cards it had.

    Raises:
        OSError: The file cannot be locked or deleted.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return 0
    with locked(_lock(path), WAIT_SECONDS):
        count = len(read(folder))
        retry_while_open(lambda: path.unlink(missing_ok=True))
    return count


def _lock(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _checked(numbers: object) -> Measured | None:
    """Returns one card's rates; None if they are no rates, after an edit by hand."""
    if not isinstance(numbers, list) or len(numbers) != len(Measured._fields):
        return None
    if not all(isinstance(number, (int, float)) and 0 <= number <= MOST for number in numbers):
        return None
    found = Measured(*map(float, numbers))
    return found if min(found.to_card, found.to_ram, found.pinned) >= LEAST else None
