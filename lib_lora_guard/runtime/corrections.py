"""The corrections of this machine's estimates, as a host needs them: opened when a card is in use, told of a picture's largest
peaks, and written a few times a picture at most.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import torch

from ..memory.calibration import FILE_NAME, REMEMBERED, Calibration, Key
from ..memory.calibration_file import CalibrationFile
from ..planning.activations import Activations

log = logging.getLogger(__name__)


class Corrections:
    """Belongs to the process, not to one takeover. Any thread may call."""

    def __init__(self, folder: Path | None = None) -> None:
        """
        Args:
            folder: of the file; without one nothing is corrected and nothing kept.
        """
        self.folder = folder
        self._kept: Calibration | None = None
        self._lock = threading.Lock()
        self._waiting: dict[Key, tuple[int, int]] = {}
        """Measured and not recorded yet: the `(predicted, measured)` of each key's largest peak, in bytes."""
        self._of_picture: dict[Key, int] = {}
        """The largest peak that was recorded for this picture."""
        self._repeated: dict[Key, tuple[int, int, int]] = {}
        """The `(predicted, measured)` that was recorded last, and how often in a row."""

    def open_for(self, device: torch.device | None) -> bool:
        """True if peaks of models on `device` are measured: a CUDA card (ROCm's too) that is in use already. Starts nothing, and
        asks torch nothing about any other device."""
        if self.folder is None or device is None or device.type != "cuda":
            return False
        with self._lock:
            if self._kept is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
                name = torch.cuda.get_device_name(device)
                self._kept = Calibration(self.folder / FILE_NAME, name, torch.__version__)
            return self._kept is not None

    def forget(self) -> int:
        """Forgets every correction, of every card; returns their number.

        Raises:
            OSError: The file cannot be deleted.
        """
        with self._lock:
            self._waiting, self._of_picture, self._repeated = {}, {}, {}
            kept, folder = self._kept, self.folder
        if kept is not None:
            return kept.reset()
        return 0 if folder is None else CalibrationFile(folder / FILE_NAME).delete()

    def bytes(self, key: Key, predicted_bytes: int) -> int:
        """Returns what to add to a prediction; see `Calibration.correction_bytes`. 0 before a card is in use."""
        return 0 if self._kept is None else self._kept.correction_bytes(key, predicted_bytes)

    def held(self, key: Key, predicted: Activations) -> int:
        """Returns what has to be free for a part of the work. Peaks measure what it uses; what torch holds for that grows with
        it.

        Args:
            key: of the correction.
            predicted: bytes that the part uses and holds, before any correction.
        """
        used = predicted.used_bytes
        if used <= 0:
            return predicted.held_bytes
        return max(0, predicted.held_bytes + self.bytes(key, used) * predicted.held_bytes // used)

    def note(self, key: Key, predicted_bytes: int, measured_bytes: int | None) -> None:
        """Takes one measured peak; None if it could not be measured. Touches no file: steps come by the dozen."""
        if measured_bytes is None:
            return
        with self._lock:
            if measured_bytes > self._waiting.get(key, (0, self._of_picture.get(key, 0)))[1]:
                self._waiting[key] = (predicted_bytes, measured_bytes)

    def settle(self, is_new_picture: bool = False) -> None:
        """Records what was noted, all of it in one write."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            if is_new_picture:
                self._of_picture = {}
            else:
                self._of_picture.update({key: measured for key, (_, measured) in waiting.items()})
            kept = self._kept
            if kept is None:
                return
            news = [(key, *numbers) for key, numbers in waiting.items() if self._is_news(kept, key, *numbers)]
        kept.record_all(news)

    def _is_news(self, kept: Calibration, key: Key, predicted: int, measured: int) -> bool:
        """False if the last REMEMBERED measurements said the same: one more changes nothing."""
        before = self._repeated.get(key, (0, 0, 0))
        times = before[2] + 1 if before[:2] == (predicted, measured) else 1
        self._repeated[key] = (predicted, measured, times)
        # The user may have reset the file meanwhile.
        return times <= REMEMBERED or kept.measurements(key) < REMEMBERED


OF_PROCESS = Corrections()
"""As the journal: switching the guard off and on forgets nothing. Without a folder until `keep_calibration`."""


def keep_calibration(folder: Path) -> None:
    """Keeps corrections in a file in `folder` from now on. Nothing is read or written before a card is in use."""
    OF_PROCESS.folder = folder
