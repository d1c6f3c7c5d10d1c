"""Records the running operation in a small memory-mapped file that survives a killed process; `crash.py` reads it.

The system owns the pages of a mapped file. Data written to them reaches the file even after SIGKILL, the out-of-memory
killer or TerminateProcess (mmap(2), MAP_SHARED; Windows, CreateFileMapping). A power failure may lose it.

Records names only: no prompts, and only the last part of a path.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..messages import reason, say
from ..private_files import make_private_folder, open_private, other_than_file
from ..version import __version__
from .flight_ring import BODY_BYTES, SLOT_BYTES, packed, start_of
from .processes import machine_name, own_start_ms

log = logging.getLogger(__name__)

RING_BYTES = 64 << 10
SPARE_DISK_BYTES = 16 << 20
"""With less free disk no file is mapped: some file systems allocate blocks only on the first write and then end the
process.
"""

VRAM_FREE, VRAM_TOTAL, RAM_AVAILABLE, RAM_TOTAL = "vram_free", "vram_total", "ram_available", "ram_total"
"""Names of memory numbers that a crash report understands; others are kept too. ALIVE: bytes that can be allocated
before the system refuses or kills; without it, RAM_AVAILABLE + SWAP_FREE.
"""
SWAP_FREE, SWAP_TOTAL, ALIVE, RSS = "swap_free", "swap_total", "alive", "rss"
"""Names of memory numbers that a crash report understands; others are kept too. ALIVE: what can be had before the system
refuses or kills (design, section 7); without it, RAM_AVAILABLE + SWAP_FREE."""

RAM_NEED, VRAM_NEED = "ram", "vram"
"""Names of planned bytes that a crash report understands."""
KEPT_FREE = "kept_free"
"""Name of the planned bytes of VRAM that stay free beside the models."""

_NAME_CHARACTERS = 80
_LORAS, _NUMBERS, _DEPTH = 16, 24, 8


class Phase(str, Enum):
    """An operation that a process may be killed in. Idle time is no phase."""

    LOAD_CHECKPOINT = "load_checkpoint"
    LOAD_TEXT_ENCODER = "load_text_encoder"
    MOVE_TO_GPU = "move_to_gpu"
    APPLY_LORA = "apply_lora"
    MERGE = "merge"
    BACKUP = "backup"
    RESTORE = "restore"
    ENCODE_PROMPT = "encode_prompt"
    SAMPLING_STEP = "sampling_step"
    VAE_ENCODE = "vae_encode"
    VAE_DECODE = "vae_decode"
    UNLOAD = "unload"
    OTHER = "other"


@dataclass(eq=False)
class _Open:
    """A phase that has begun and not ended."""

    phase: Phase
    since: float
    plan: dict[str, int] = field(default_factory=dict)


class FlightRecorder:
    """The file of one process. Thread-safe; methods never raise.

    Every record is complete in itself, so the newest one suffices. If the file cannot be written any more, the recorder
    stops and logs one warning.
    """

    def __init__(self, ring: mmap.mmap | None = None, path: Path | None = None) -> None:
        """Without a ring nothing is written: `FlightRecorder.open(folder) or FlightRecorder()`."""
        self._ring, self._path = ring, path
        self._pid = os.getpid()
        # Re-entrant: a Ctrl+C handler may call close() during a write of the same thread.
        self._lock = threading.RLock()
        self._number = 0
        self._open: list[_Open] = []
        self._names: dict[str, Any] = {}
        self._names_json = ""
        self._memory: dict[str, Any] = {"memory": {}, "memory_time": 0.0}
        self._set_facts({"version": __version__, "machine": machine_name()})

    @classmethod
    def open(cls, folder: Path, ring_bytes: int = RING_BYTES) -> FlightRecorder | None:
        """Returns a recorder with a new file in `folder`; None, with a warning in the log, if no file can be written
        there.
        """
        try:
            make_private_folder(folder)
            if shutil.disk_usage(folder).free < SPARE_DISK_BYTES:
                raise OSError(f"less than {SPARE_DISK_BYTES >> 20} MB free")
            path = folder / f"flight-{os.getpid()}-{own_start_ms()}.ring"
            # Never truncate: an earlier recorder of this process ("Reload UI") may still map the file. It keeps what it maps.
            if other_than_file(path) is None:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            # Windows does not take a file away that is mapped: it is used again.
            open_private(path, "ab").close()
            with open_private(path, "r+b") as file:
                # Write and sync so that the blocks exist: on a full disk, a hole would end the process later.
                file.write(bytes(max(2, ring_bytes // SLOT_BYTES) * SLOT_BYTES))
                file.flush()
                os.fsync(file.fileno())
                ring = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError) as error:
            say(log, logging.WARNING, "flight.not_kept", folder=str(folder), error=reason(error))
            return None
        return cls(ring, path)

    @contextmanager
    def enter(
        self,
        phase: Phase,
        *,
        model: str | None = None,
        architecture: str | None = None,
        storage: str | None = None,
        loras: Iterable[str] | None = None,
        memory: Mapping[str, int | None] | None = None,
        plan: Mapping[str, int | None] | None = None,
    ) -> Iterator[None]:
        """Records `phase` while the block runs. Phases may be nested.

        Facts stay until they are replaced, except `plan`, which belongs to this phase.

        Args:
            phase: The operation.
            model: Name or path of the model.
            architecture: Its architecture.
            storage: Its storage format.
            loras: Names or paths of the LoRAs.
            memory: Bytes by name; None for a number that is not available.
            plan: Predicted bytes by name.
        """
        begun = _Open(phase, time.time())
        with self._lock:
            self._open.append(begun)
        self.note(model=model, architecture=architecture, storage=storage, loras=loras, memory=memory, plan=plan)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(begun)
            self.note()

    def note(
        self,
        *,
        model: str | None = None,
        architecture: str | None = None,
        storage: str | None = None,
        loras: Iterable[str] | None = None,
        memory: Mapping[str, int | None] | None = None,
        plan: Mapping[str, int | None] | None = None,
    ) -> None:
        """Records new facts about the innermost phase; arguments as for `enter`."""
        if self._ring is None:
            return
        try:
            names = {"model": model, "architecture": architecture, "storage": storage}
            facts: dict[str, Any] = {key: name_only(name) for key, name in names.items() if name is not None}
            if loras is not None:
                all_names = [name_only(name) for name in loras]
                facts |= {"loras": all_names[:_LORAS], "lora_count": len(all_names)}
            with self._lock:
                self._set_facts(facts)
                if memory is not None:
                    self._memory = {"memory": _numbers(memory), "memory_time": time.time()}
                if plan is not None and self._open:
                    self._open[-1].plan = _numbers(plan)
                self._write()
        except Exception as error:
            # The recorder runs in critical moments: its own failure must not add to them.
            self._give_up(error)

    def close(self) -> None:
        """Marks the normal end of the process and deletes the file."""
        if os.getpid() != self._pid:
            # In a forked child: the file belongs to the parent, and a lock held at the fork is never released.
            return
        with self._lock:
            ring, self._ring = self._ring, None
            if ring is None:
                return
            with suppress(OSError, ValueError):
                _check_size(ring)
                ring[:] = bytes(len(ring))
            with suppress(OSError, ValueError, BufferError):
                ring.close()
        if self._path is not None:
            # If it cannot be deleted, it is empty by now, and the next start deletes it.
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _set_facts(self, facts: Mapping[str, Any]) -> None:
        if any(self._names.get(key) != name for key, name in facts.items()):
            self._names |= facts
            # Encode only on changes, not in every step.
            self._names_json = _encode(self._names)

    def _write(self) -> None:
        if self._ring is None or os.getpid() != self._pid:
            return
        phases = self._open[-_DEPTH:]
        numbers = {
            "time": time.time(),
            "open": [[begun.phase.value, begun.since] for begun in phases],
            "plan": next((begun.plan for begun in reversed(phases) if begun.plan), {}),
            **self._memory,
        }
        body = _bytes(f"{_encode(numbers)[:-1]},{self._names_json[1:]}")
        if len(body) > BODY_BYTES:
            body = _shortened(self._names | numbers)
        raw = packed(self._number, body)
        start = start_of(self._number, len(self._ring))
        _check_size(self._ring)
        self._ring[start : start + len(raw)] = raw
        self._number += 1

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            self._ring = None
        say(log, logging.WARNING, "flight.given_up", error=f"{type(error).__name__}: {error}")


def _check_size(ring: mmap.mmap) -> None:
    """Guards a write to the map.

    Raises:
        OSError: The file was truncated: on POSIX, a write past its end kills the process.
    """
    if ring.size() < len(ring):
        raise OSError(f"the file has {ring.size()} bytes, expected {len(ring)}")


@lru_cache(maxsize=256)  # the same few names come in every step
def name_only(path: str) -> str:
    """Returns the last part of a path of any system, shortened, with '?' for control characters."""
    name = re.split(r"[\\/]", path)[-1][:_NAME_CHARACTERS]
    return "".join(c if c.isprintable() else "?" for c in name)


def _numbers(by_name: Mapping[str, int | None]) -> dict[str, int]:
    known = [(name_only(name), int(number)) for name, number in by_name.items() if number is not None]
    return dict(known[:_NUMBERS])


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _shortened(record: dict[str, Any]) -> bytes:
    """Encodes `record` in at most BODY_BYTES; drops the least important facts first."""
    for key in ("loras", "plan", "memory"):
        record.pop(key)
        body = _bytes(_encode(record))
        if len(body) <= BODY_BYTES:
            break
    return body
