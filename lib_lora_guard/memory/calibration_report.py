"""Describes the stored corrections in words, for all cards in the file. Pure."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ..messages import Message
from ..units import MB
from .calibration import PIXELS_OF_BUCKET, Key, Kind, correction_of
from .calibration_file import CalibrationFile, Entry

_MILLION = 1_000_000


@dataclass(frozen=True)
class Kept:
    """One stored correction."""

    card: str
    torch_version: str
    key: Key | None
    """None if another version wrote it."""
    measurements: int
    predicted_bytes: int
    """The last prediction."""
    measured_bytes: int
    """The last measurement."""
    correction_bytes: int
    """Added to the next prediction of the same size."""

    @property
    def line(self) -> Message:
        """The correction as one line of text."""
        facts = {
            "predicted_mb": self.predicted_bytes / MB,
            "measured_mb": self.measured_bytes / MB,
            "correction_mb": self.correction_bytes / MB,
        }
        return Message("calibration.line", {"what": self.what, "card": _shown(self.card), **facts})

    @property
    def what(self) -> Message:
        """The operation in words: kind, model, size."""
        key = self.key
        if key is None:
            return Message("calibration.other")
        model = {"model": _shown(key.architecture), "storage": _shown(key.storage) or "?"}
        if key.kind in (Kind.LOAD, Kind.APPLY):
            return Message(f"calibration.{key.kind.value}", model)
        size = {"megapixels": key.resolution * PIXELS_OF_BUCKET / _MILLION}
        if key.kind is Kind.DECODE:
            return Message("calibration.decode", {**model, **size})
        name = "calibration.step_with_loras" if key.stack else "calibration.step"
        return Message(name, {**model, **size, "rows": key.batch})


def kept_in(path: Path) -> list[Kept]:
    """Returns every correction in the file, the largest first; none if the file is missing or unreadable."""
    found = [_kept(name, entry) for name, entry in CalibrationFile(path).read().items()]
    return sorted(found, key=lambda one: -abs(one.correction_bytes))


def _kept(name: tuple[str, ...], entry: Entry) -> Kept:
    card, torch_version, kind, architecture, storage, resolution, batch, stack = name
    key = None
    with contextlib.suppress(ValueError):
        key = Key(Kind(kind), architecture, storage, int(resolution), int(batch), stack)
    last = entry.errors_bytes[-1] if entry.errors_bytes else 0
    measured = entry.predicted_bytes + last
    return Kept(card, torch_version, key, entry.count, entry.predicted_bytes, measured, correction_of(entry))


def _shown(text: str) -> str:
    """Replaces unprintable characters: the file may have been edited."""
    return "".join(c if c.isprintable() else "?" for c in text)
