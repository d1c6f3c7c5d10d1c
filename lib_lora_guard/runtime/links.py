"""Measures how fast this machine copies between RAM and the card, once, and keeps that beside the corrections."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from ..memory.file_lock import locked
from ..planning.job_cost import Links
from ..planning.rates import PAGEABLE_TO_GPU, PAGEABLE_TO_RAM
from ..private_files import make_private_folder, open_private
from ..units import MB

log = logging.getLogger(__name__)

FILE_NAME = "links.json"
VERSION = 2
PROBE_BYTES = 32 * MB
"""As large as a layer. Three copies in each direction take 0.1 s on a machine that zeroes new RAM with 1 GB/s."""
TRIES = 3
LONGEST_BYTES = 1 * MB
LEAST, MOST = 1e8, 1e12
"""Bytes per second that are believed: a machine that slept meanwhile shows less."""
WAIT_SECONDS = 1.0


class Measured(NamedTuple):
    """Bytes per second on this machine."""

    to_card: float = PAGEABLE_TO_GPU
    """From ordinary RAM."""
    to_ram: float = PAGEABLE_TO_RAM
    """Into RAM that is allocated for it."""
    pinned: float = PAGEABLE_TO_GPU
    """To the card from pinned RAM."""

    def links(self, pins: bool) -> Links:
        """Returns what the choice for a job reckons with.

        Args:
            pins: Swapped layers lie in pinned RAM.
        """
        to_card = max(self.pinned, self.to_card) if pins else self.to_card
        return Links(to_card, self.to_ram, to_card, keeps_copies=pins)


class LinkRates:
    """The rates by card. Belongs to the process."""

    def __init__(self, folder: Callable[[], Path | None], pins: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            folder: returns where the rates are kept; None: nowhere, and nothing is measured.
            pins: True while swapped weights lie in pinned RAM.
        """
        self._folder, self._pins = folder, pins
        self._known: dict[torch.device, Measured] = {}

    def of(self, device: torch.device) -> Links:
        """Returns the rates of a card: as kept, else measured now, else the usual ones."""
        return self._measured(device).links(self._pins())

    def _measured(self, device: torch.device) -> Measured:
        if device in self._known:
            return self._known[device]
        folder = self._folder()
        if folder is None or device.type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
            return Measured()
        name = f"{torch.cuda.get_device_name(device)} | torch {torch.__version__}"
        found = read(folder).get(name)
        if found is None:
            try:
                found = measure(device)
            except Exception:
                # No VRAM left for a probe, or a driver's error that the next copy will show too.
                log.debug("the link to the card could not be measured", exc_info=True)
                return Measured()
            with suppress(OSError):
                keep(folder, name, found)
        self._known[device] = found
        return found


def measure(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """Copies a few layers' worth of bytes and returns the rates.

    Raises:
        RuntimeError: the card has no room for it.
    """
    with torch.inference_mode(False), torch.no_grad():
        in_ram = torch.ones(PROBE_BYTES, dtype=torch.uint8)
        on_card = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
        on_card.copy_(in_ram)
        to_card = _rate(lambda: on_card.copy_(in_ram), device, clock)
        to_ram = _rate(lambda: on_card.to("cpu"), device, clock)
        pinned = to_card
        if device.type == "cuda":
            in_ram = in_ram.pin_memory()
            pinned = _rate(lambda: on_card.copy_(in_ram, non_blocking=True), device, clock)
    return Measured(to_card, to_ram, pinned)


def read(folder: Path) -> dict[str, Measured]:
    """Returns the kept rates by card; none if there is no file of this version."""
    with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError, LookupError):
        with open_private(folder / FILE_NAME, "rb") as file:
            document = json.loads(file.read(LONGEST_BYTES))
        if document["version"] == VERSION:
            cards = document["cards"].items()
            return {name: found for name, rates in cards if (found := _checked(rates)) is not None}
    return {}


def keep(folder: Path, name: str, measured: Measured) -> None:
    """Writes the rates of one card beside those of others.

    Raises:
        OSError: the file cannot be locked or written.
    """
    make_private_folder(folder)
    path = folder / FILE_NAME
    with locked(path.with_name(path.name + ".lock"), WAIT_SECONDS):
        cards = read(folder) | {name: measured}
        rates = {name: list(one) for name, one in cards.items()}
        temporary = path.with_name(path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        with open_private(temporary, "xb") as file:
            file.write(json.dumps({"version": VERSION, "cards": rates}).encode())
        os.replace(temporary, path)


def _rate(copy: Callable[[], torch.Tensor], device: torch.device, clock: Callable[[], float]) -> float:
    """Returns the median, in bytes per second."""
    seconds = []
    for _ in range(TRIES):
        _settle(device)
        begun = clock()
        copied = copy()
        _settle(device)
        seconds.append(clock() - begun)
        del copied
    return min(MOST, max(LEAST, PROBE_BYTES / max(sorted(seconds)[TRIES // 2], 1e-9)))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _checked(rates: object) -> Measured | None:
    """Returns one card's rates; None if they are no rates, after an edit by hand."""
    if not isinstance(rates, list) or len(rates) != 3:
        return None
    if not all(isinstance(rate, (int, float)) and LEAST <= rate <= MOST for rate in rates):
        return None
    return Measured(*map(float, rates))
