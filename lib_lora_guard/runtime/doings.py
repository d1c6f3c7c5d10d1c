"""What the panel's buttons do to the host: nothing while an image is made, and each says what came of it."""

from __future__ import annotations

import gc
import logging
import platform
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from enum import Enum
from typing import Protocol

import torch

from ..errors import named
from ..messages import Message, say
from ..reporting.bug_report import bug_report
from ..reporting.log import current_ring
from ..settings import Settings
from ..units import GB, MB
from ..version import __version__
from .corrections import OF_PROCESS, Corrections
from .installed import Takeover

log = logging.getLogger(__name__)


class Lock(Protocol):
    """What the host holds while it makes an image."""

    def acquire(self, blocking: bool = True) -> bool: ...
    def release(self) -> None: ...


class Action(str, Enum):
    """A button. The value is its name in the address."""

    FREE_VRAM = "free_vram"
    FREE_RAM = "free_ram"
    FORGET = "forget"


def act(
    action: Action,
    takeover: Takeover | None,
    lock: Lock | None = None,
    corrections: Corrections = OF_PROCESS,
) -> Message:
    """Carries out a button.

    Args:
        action: The button.
        takeover: The guard at work; None if it is switched off.
        lock: Of the host.
        corrections: Of the process.

    Returns:
        What came of it.
    """
    if takeover is None:
        return Message("panel.done.off")
    lock = lock or threading.Lock()
    if not lock.acquire(blocking=False):
        return Message("panel.done.busy")
    try:
        done = _WORK[action](takeover, corrections)
    except Exception as error:
        say(log, logging.WARNING, "panel.done.failed", exc_info=True, error=named(error))
        return Message("panel.done.failed", {"error": named(error)})
    finally:
        lock.release()
    log.info("%s", done)
    return done


def _free_vram(takeover: Takeover, corrections: Corrections) -> Message:
    before = takeover.snapshot().vram_free.bytes
    takeover.free_vram()
    after = takeover.snapshot().vram_free.bytes
    if before is None or after is None:
        return Message("panel.done.no_card")
    return Message("panel.done.free_vram", {"mb": max(0, after - before) / MB, "free_gb": after / GB})


def _free_ram(takeover: Takeover, corrections: Corrections) -> Message:
    freed = takeover.drop_caches()
    gc.collect()
    return Message("panel.done.free_ram", {"mb": freed / MB})


def _forget(takeover: Takeover, corrections: Corrections) -> Message:
    return Message("panel.done.forget", {"count": corrections.forget()})


_WORK: dict[Action, Callable[[Takeover, Corrections], Message]] = {
    Action.FREE_VRAM: _free_vram,
    Action.FREE_RAM: _free_ram,
    Action.FORGET: _forget,
}


def report_text(takeover: Takeover | None, settings: Settings, host: str, flags: Sequence[str]) -> str:
    """Returns the text for a bug report.

    Args:
        takeover: The guard at work.
        settings: The user's.
        host: The host's name and version.
        flags: Names of the flags that the host was started with, without their values.
    """
    facts = [
        ("LoRA Guard", __version__),
        ("host", host),
        ("flags", " ".join(flags) or "none"),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("system", f"{platform.system()} {platform.release()}"),
        ("card", _card()),
        ("settings", ", ".join(f"{one.name}={_value(settings, one.name)}" for one in fields(settings))),
        ("at work", "no" if takeover is None else type(takeover).__name__),
    ]
    if takeover is not None:
        with suppress(Exception):
            numbers = takeover.snapshot().readings()
            facts.append(("memory in MB", ", ".join(f"{n}={r.bytes // MB}" for n, r in numbers if r.bytes is not None)))
        facts.append(("LoRAs", ", ".join(_loras(takeover)) or "none"))
    return bug_report(facts, current_ring().since(0, sys.maxsize))


def _loras(takeover: Takeover) -> list[str]:
    return [
        f"{report.model}: {len(report.loras)} LoRAs, {len(report.refused)} refused, {report.milliseconds:.0f} ms"
        for report in takeover.reports()
    ]


def _card() -> str:
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
        return "not in use"
    version = torch.version.hip or torch.version.cuda
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f"{torch.cuda.get_device_name()}, {total / GB:.1f} GB, {'ROCm' if torch.version.hip else 'CUDA'} {version}"


def _value(settings: Settings, name: str) -> str:
    value = getattr(settings, name)
    return str(value.value if isinstance(value, Enum) else value)
