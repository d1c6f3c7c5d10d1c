"""Reads the record of an earlier process that was killed, from the flight recorder's file that it left behind."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..messages import say
from ..private_files import open_private, other_than_file
from .flight_recorder import Phase, name_only
from .flight_ring import bodies
from .processes import is_running, machine_name

log = logging.getLogger(__name__)

KEPT_FILES = 3
"""Number of files of reported crashes that are kept for inspection."""

FOREIGN_SECONDS = 86400.0
"""A file of another machine or container counts as abandoned after this time without a record; until then it may be in
use.
"""

LONGEST_BYTES = 1 << 20
"""The largest part of a file that is read."""

_NAME = re.compile(r"flight-(\d{1,9})-(\d{1,15})\.ring")
_REPORTED = ".told"


@dataclass(frozen=True)
class Crash:
    """The last record of a killed process.

    Times are seconds since 1970. Numbers are bytes, under the names in `flight_recorder`. An unknown name is "".
    """

    phase: Phase
    """The innermost of `phases`."""
    phases: tuple[Phase, ...]
    """The phases that were open, outermost first."""
    since: float
    """The start of `phase`."""
    time: float
    """The time of the last record."""
    pid: int
    model: str = ""
    architecture: str = ""
    storage: str = ""
    loras: tuple[str, ...] = ()
    lora_count: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    memory_time: float = 0.0
    plan: Mapping[str, int] = field(default_factory=dict)
    """Predicted for the innermost phase that had a prediction."""
    version: str = ""
    """The version of LoRA Guard."""


def last_crash(folder: Path) -> Crash | None:
    """Returns the newest crash that was not reported yet, and marks all of them as reported.

    None if every process has ended normally, was in no phase, or still runs. Deletes the files of dead processes, and says
    how many of them were damaged.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return None
    damaged: list[str] = []
    crashes = [crash for path in found if (crash := _claim(path, damaged)) is not None]
    _delete_old(folder)
    if damaged:
        say(log, logging.WARNING, "flight.damaged", count=len(damaged), first=damaged[0])
    return max(crashes, key=lambda crash: crash.time, default=None)


def _claim(path: Path, damaged: list[str]) -> Crash | None:
    """Returns the crash in a file and marks the file as reported. None if the process still runs, or if there is no
    crash; then the file is deleted.

    Args:
        path: The file.
        damaged: Gets its name if it has something in it and no complete record.
    """
    name = _NAME.fullmatch(path.name)
    if name is None:
        return None
    pid, start_ms = int(name[1]), int(name[2])
    try:
        with open_private(path, "rb") as file:
            ring = file.read(LONGEST_BYTES)
    except OSError:
        return None
    record = _newest(ring)
    machine = record.get("machine", machine_name())
    seen = max(_number(record.get("time")), start_ms / 1000)
    in_use = is_running(pid, start_ms) if machine == machine_name() else abs(time.time() - seen) < FOREIGN_SECONDS
    if in_use:
        return None
    crash = _crash(pid, record)
    try:
        told = path.with_suffix(_REPORTED)
        if crash is None or other_than_file(told) is not None:
            path.unlink()
        else:
            path.replace(told)
    except FileNotFoundError:
        # Another process was faster and reports it.
        return None
    except OSError:
        # The file cannot be moved (read-only folder): report it again rather than never.
        return crash
    if not record and ring.strip(b"\0"):
        damaged.append(path.name)
    return crash


def _newest(ring: bytes) -> dict[str, Any]:
    """Returns the newest complete record; empty if there is none."""
    for body in reversed(bodies(ring)):
        with suppress(ValueError, RecursionError):
            record = json.loads(body)
            if isinstance(record, dict):
                return record
    return {}


def _crash(pid: int, record: Mapping[str, Any]) -> Crash | None:
    """Returns the crash; None if no phase was open: closing the window of an idle program is no crash."""
    open_phases = [entry for entry in _list(record.get("open")) if isinstance(entry, list) and len(entry) == 2]
    if not open_phases:
        return None
    phases = tuple(_phase(phase) for phase, _ in open_phases)
    loras = tuple(_name(name) for name in _list(record.get("loras")))
    return Crash(
        phase=phases[-1],
        phases=phases,
        since=_time(open_phases[-1][1]),
        time=_time(record.get("time")),
        pid=pid,
        model=_name(record.get("model")),
        architecture=_name(record.get("architecture")),
        storage=_name(record.get("storage")),
        loras=loras,
        lora_count=max(len(loras), int(_number(record.get("lora_count")))),
        memory=_numbers(record.get("memory")),
        memory_time=_time(record.get("memory_time")),
        plan=_numbers(record.get("plan")),
        version=_name(record.get("version")),
    )


def _delete_old(folder: Path) -> None:
    """Deletes reported files, except the newest KEPT_FILES."""
    with suppress(OSError):
        found = [path for path in folder.glob(f"flight-*{_REPORTED}") if other_than_file(path) is None]
        for path in sorted(found, key=lambda path: path.lstat().st_mtime, reverse=True)[KEPT_FILES:]:
            path.unlink(missing_ok=True)


# The file may be of another version or edited by hand: a value of the wrong type counts as missing.


def _phase(value: Any) -> Phase:
    try:
        return Phase(value)
    except ValueError:
        return Phase.OTHER


def _name(value: Any) -> str:
    return name_only(value) if isinstance(value, str) else ""


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e15 else 0.0


def _time(value: Any) -> float:
    """Clamps a time to the range that every system's calendar supports."""
    return min(max(0.0, _number(value)), 4e9)


def _numbers(value: Any) -> dict[str, int]:
    return {name_only(name): int(_number(number)) for name, number in value.items()} if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
