"""Measures how fast this machine copies between RAM and the card, once a day, and keeps that beside the corrections.

A measurement is that of one card at one slot with one driver: with another of them it is made anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ..memory import Nvml
from ..memory.links_file import LEAST, MOST, Measured, keep, read
from ..planning.job_cost import Links
from ..planning.rates import PAGEABLE_TO_GPU, PAGEABLE_TO_RAM
from ..units import MB

log = logging.getLogger(__name__)

PROBE_BYTES = 32 * MB
"""As large as a layer. Three copies in each direction take 0.1 s on a machine that zeroes new RAM with 1 GB/s."""
TRIES = 3
USUAL = Measured(PAGEABLE_TO_GPU, PAGEABLE_TO_RAM, PAGEABLE_TO_GPU)
"""Of a machine that could not be measured."""


class LinkRates:
    """The rates by card, which the choice for a job reckons with. Belongs to the process."""

    def __init__(
        self,
        folder: Callable[[], Path | None],
        pins: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
        nvml: Callable[[], Nvml] = Nvml,
    ) -> None:
        """
        Args:
            folder: returns where the rates are kept; None: nowhere, and nothing is measured.
            pins: True while swapped weights lie in pinned RAM.
            clock: returns seconds since 1970; for tests.
            nvml: opens the driver's library; for tests.
        """
        self._folder, self._pins, self._clock, self._nvml = folder, pins, clock, nvml
        self._known: dict[torch.device, Measured] = {}
        self._names: dict[torch.device, str] = {}

    def of(self, device: torch.device) -> Links:
        """Returns the rates of a card: as kept, else measured now, else the usual ones."""
        found, pins = self._measured(device), self._pins()
        to_card = max(found.pinned, found.to_card) if pins else found.to_card
        return Links(to_card, found.to_ram, to_card, keeps_copies=pins)

    def _measured(self, device: torch.device) -> Measured:
        now = self._clock()
        if device in self._known and self._known[device].holds(now):
            return self._known[device]
        folder = self._folder()
        if folder is None or device.type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
            return USUAL
        name = self._name(device)
        found = read(folder).get(name)
        if found is None or not found.holds(now):
            try:
                found = measure(device)._replace(when=now)
            except Exception:
                # No VRAM left for a probe, or a driver's error that the next copy will show too.
                log.debug("the link to the card could not be measured", exc_info=True)
                return USUAL
            with suppress(OSError):
                keep(folder, name, found)
        self._known[device] = found
        return found

    def _name(self, device: torch.device) -> str:
        """Returns the card and what its rates depend on: the slot, the driver and torch. Asked once: without the card or its
        driver the process ends."""
        if device in self._names:
            return self._names[device]
        nvml = self._nvml()
        try:
            slot, driver = nvml.slot(device), nvml.driver()
        finally:
            nvml.close()
        parts = (torch.cuda.get_device_name(device), slot, driver, f"torch {torch.__version__}")
        self._names[device] = " | ".join(filter(None, parts))
        return self._names[device]


def measure(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """Copies a few layers' worth of bytes and returns the rates.

    Raises:
        RuntimeError: the card has no room for it.
    """
    with torch.inference_mode(False), torch.no_grad():
        on_card = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
        in_ram = torch.ones(PROBE_BYTES, dtype=torch.uint8)
        on_card.copy_(in_ram)
        to_card = _rate(lambda: on_card.copy_(in_ram), device, clock)
        to_ram = _rate(lambda: on_card.to("cpu"), device, clock)
        pinned = to_card
        if device.type == "cuda":
            in_ram = in_ram.pin_memory()
            pinned = _rate(lambda: on_card.copy_(in_ram, non_blocking=True), device, clock)
    return Measured(to_card, to_ram, pinned)


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
