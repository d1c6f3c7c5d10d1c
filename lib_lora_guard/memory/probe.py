"""How much VRAM, RAM and disk could take backups right now. Measures only: who gets what is decided elsewhere.

Sources: docs.kernel.org `admin-guide/cgroup-v1/memory` and `admin-guide/cgroup-v2`; fstab(5) for the list of mounts.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

DISK_RESERVE_BYTES = 2 << 30
"""Left free on the disk: a full system disk stops page files, browsers and the saving of pictures."""

_RAM_DISKS = {"tmpfs", "ramfs", "devtmpfs"}


@dataclass(frozen=True)
class BackupBudget:
    """What backups may take at this moment, beyond everything that lies there already."""

    vram_spare_bytes: int
    ram_spare_bytes: int
    disk_spare_bytes: int


def default_spool_dir() -> Path:
    """Where backups go on disk when nobody says otherwise."""
    return Path(tempfile.gettempdir()) / "lora-guard-spool"


def measure_budget(device: torch.device, ram_floor_bytes: int, spool_dir: Path | None = None) -> BackupBudget:
    """What is free: VRAM of `device`, RAM above `ram_floor_bytes`, disk below `spool_dir` above DISK_RESERVE_BYTES."""
    return BackupBudget(
        vram_spare_bytes=_free_vram_bytes(device),
        ram_spare_bytes=max(0, _available_ram_bytes() - ram_floor_bytes),
        disk_spare_bytes=disk_spare_bytes(spool_dir or default_spool_dir()),
    )


def disk_spare_bytes(folder: Path) -> int:
    """Bytes that may be written below `folder` (it need not exist yet). 0 where it lies in RAM: that would spare none."""
    existing = next((f for f in (folder, *folder.parents) if f.is_dir()), None)
    if existing is None or _lies_in_ram(existing):
        return 0
    usage = shutil.disk_usage(existing)
    return _between(usage.free - DISK_RESERVE_BYTES, usage.total)


def _free_vram_bytes(device: torch.device) -> int:
    """What the driver has free and what torch holds without using it; 0 for anything but CUDA and ROCm."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info(device)
    statistics = torch.cuda.memory_stats(device)
    held = statistics.get("reserved_bytes.all.current", 0) - statistics.get("active_bytes.all.current", 0)
    return _between(free + max(0, held), total)


def _available_ram_bytes() -> int:
    memory = psutil.virtual_memory()
    limited = _cgroup_available_bytes(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return _between(memory.available if limited is None else min(memory.available, limited), memory.total)


def _cgroup_available_bytes(mount: Path, membership: Path) -> int | None:
    """The least that any control group around this process leaves it; None where no group says anything.

    Page cache of files read once counts as used there and is given up first, so it is free to us.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    rooms: list[int] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            rooms += _group_rooms(mount, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            rooms += _group_rooms(mount / "memory", path, *files)
    return max(0, min(rooms)) if rooms else None


def _group_rooms(root: Path, path: str, limit_file: str, usage_file: str, cache_name: str) -> list[int]:
    """The room in the group at `path` and in all above it. A container may see its own group as the root."""
    inner = PurePosixPath(path.lstrip("/"))
    rooms = []
    for group in (root / folder for folder in (inner, *inner.parents)):
        limit, usage = _number(group / limit_file), _number(group / usage_file)
        if limit is not None and usage is not None:
            rooms.append(limit - usage + _statistic(group / "memory.stat", cache_name))
    return rooms


def _number(file: Path) -> int | None:
    """The number in a one-line file; None for a file that is not there and for the word "max"."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        pairs = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
        return next((int(pair[1]) for pair in pairs if pair[0] == name), 0)
    except (OSError, ValueError, IndexError):
        return 0


def _lies_in_ram(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """True on a RAM disk, which /tmp is on some Linux systems. Elsewhere there is no such list, and False."""
    try:
        entries = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    types = {Path(entry[1]): entry[2] for entry in entries if len(entry) > 2}
    place = folder.resolve()
    return next((types[p] for p in (place, *place.parents) if p in types), "") in _RAM_DISKS


def _between(number: int, total: int) -> int:
    return max(0, min(number, total))
