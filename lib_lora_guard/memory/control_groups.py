"""Reads the memory that Linux control groups leave to this process. At its limit a group kills processes, even if the
machine has free memory.

Sources: docs.kernel.org `admin-guide/cgroup-v1/memory` and `admin-guide/cgroup-v2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT = 1 << 62
"""Version 1 writes "no limit" as the largest multiple of a page below 2^63."""


@dataclass(frozen=True)
class Rooms:
    """Bytes left by the groups; None if no group has a limit."""

    ram: int | None
    ram_and_swap: int | None


class ControlGroups:
    """The groups around this process. Their folders are looked up once, their limits are read at each call."""

    def __init__(self, mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> None:
        try:
            lines = membership.read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        groups: list[_Version1 | _Version2] = []
        for line in lines:
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if controllers == "":
                groups += [_Version2(folder) for folder in _with_parents(mount, path)]
            elif "memory" in controllers.split(","):
                groups += [_Version1(folder) for folder in _with_parents(mount / "memory", path)]
        self._groups = tuple(group for group in groups if group.limit_file.is_file())

    def rooms(self, swap_free_bytes: int = 0) -> Rooms:
        """Returns the smallest room that any group leaves.

        `swap_free_bytes`: free swap of the machine, which no group can exceed.
        """
        rooms = [room for group in self._groups if (room := group.room(swap_free_bytes)) is not None]
        if not rooms:
            return Rooms(None, None)
        return Rooms(max(0, min(ram for ram, _ in rooms)), max(0, min(both for _, both in rooms)))


@dataclass(frozen=True)
class _Version2:
    folder: Path

    @property
    def limit_file(self) -> Path:
        return self.folder / "memory.max"

    def room(self, swap_free: int) -> tuple[int, int] | None:
        """Returns `(RAM, RAM and swap)`, in bytes.

        The group counts cached file pages as used, but the kernel drops inactive ones first, so they are free for us. A
        swap limit that cannot be read counts as no swap.
        """
        limit = _number(self.limit_file)
        usage = None if limit is None else _number(self.folder / "memory.current")
        if limit is None or usage is None:
            return None
        ram = limit - usage + _statistic(self.folder / "memory.stat", "inactive_file")
        allowed = _text(self.folder / "memory.swap.max")
        if allowed == "max":
            return ram, ram + swap_free
        swap_limit, swapped = _as_number(allowed), _number(self.folder / "memory.swap.current")
        if swap_limit is None or swapped is None:
            return ram, ram
        return ram, ram + max(0, min(swap_limit - swapped, swap_free))


@dataclass(frozen=True)
class _Version1:
    folder: Path

    @property
    def limit_file(self) -> Path:
        return self.folder / "memory.limit_in_bytes"

    def room(self, swap_free: int) -> tuple[int, int] | None:
        """As for version 2, but the second limit is the sum of RAM and swap."""
        limit = _number(self.limit_file)
        usage = None if limit is None or limit >= _NO_LIMIT else _number(self.folder / "memory.usage_in_bytes")
        if limit is None or usage is None:
            return None
        cache = _statistic(self.folder / "memory.stat", "total_inactive_file")
        ram = limit - usage + cache
        both_limit = _number(self.folder / "memory.memsw.limit_in_bytes")
        both_usage = _number(self.folder / "memory.memsw.usage_in_bytes")
        if both_limit is None or both_usage is None:
            return ram, ram
        return ram, min(ram + swap_free, both_limit - both_usage + cache)


def _with_parents(root: Path, path: str) -> list[Path]:
    """Returns the group at `path` and all its parents. A container may see its own group as the root."""
    inner = PurePosixPath(path.lstrip("/"))
    return [root / folder for folder in (inner, *inner.parents)]


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _number(file: Path) -> int | None:
    """Returns the number in a one-line file; None if the file is missing or contains "max"."""
    return _as_number(_text(file))


def _as_number(word: str | None) -> int | None:
    return int(word) if word is not None and word.isdecimal() else None


def _statistic(file: Path, name: str) -> int:
    pairs = (line.split() for line in (_text(file) or "").splitlines())
    return next((_as_number(pair[1]) or 0 for pair in pairs if len(pair) == 2 and pair[0] == name), 0)
