"""Measures how much VRAM, RAM and disk backups could take now. Other modules decide how it is used.

Source: fstab(5) for the list of mounts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..lazy_torch import torch
from .control_groups import ControlGroups
from .readings import MemorySnapshot, fast_ram_bytes, usable_vram_bytes
from .snapshot import group_room, read_ram, read_vram

DISK_RESERVE_BYTES = 2 << 30
"""Left free on the disk: a full system disk stops page files, browsers and the saving of images."""

_RAM_DISKS = {"tmpfs", "ramfs", "devtmpfs"}


@dataclass(frozen=True)
class BackupBudget:
    """Bytes that backups may take now, in addition to those that exist already."""

    vram_spare_bytes: int
    ram_spare_bytes: int
    disk_spare_bytes: int


def default_spool_dir() -> Path:
    """Returns the folder for backups on disk if none is configured: one for each user, who alone may enter it."""
    name = "lora-guard-spool"
    return Path(tempfile.gettempdir()) / (f"{name}-{os.getuid()}" if os.name == "posix" else name)


def measure_budget(
    device: torch.device,
    ram_floor_bytes: int,
    spool_dir: Path | None = None,
    snapshot: MemorySnapshot | None = None,
) -> BackupBudget:
    """Measures the room for backups.

    Args:
        device: Its free VRAM counts.
        ram_floor_bytes: RAM that must stay free.
        spool_dir: The folder for backups on disk; DISK_RESERVE_BYTES stay free there.
        snapshot: Supplies the numbers (with NVML's); None asks the driver and the system.
    """
    if snapshot is None:
        vram, ram = _usable_vram_bytes(device), _fast_ram_bytes(ram_floor_bytes)
    else:
        vram, ram = snapshot.usable_vram_bytes, snapshot.fast_ram_bytes(ram_floor_bytes)
    return BackupBudget(
        vram_spare_bytes=vram or 0,
        ram_spare_bytes=ram or 0,
        disk_spare_bytes=disk_spare_bytes(spool_dir or default_spool_dir()),
    )


def disk_spare_bytes(folder: Path) -> int:
    """Returns the bytes that may be written below `folder`, which need not exist. 0 if it lies in RAM: that would save
    nothing.
    """
    existing = next((f for f in (folder, *folder.parents) if f.is_dir()), None)
    if existing is None or _lies_in_ram(existing):
        return 0
    usage = shutil.disk_usage(existing)
    return max(0, min(usage.free - DISK_RESERVE_BYTES, usage.total))


def _usable_vram_bytes(device: torch.device) -> int | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    vram = read_vram(device)
    return usable_vram_bytes(vram.free, vram.reserved, vram.active, vram.total)


def _fast_ram_bytes(floor_bytes: int) -> int | None:
    total, available = read_ram()
    return fast_ram_bytes(available, group_room(ControlGroups().rooms().ram), total, floor_bytes)


def _lies_in_ram(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """True on a RAM disk, such as /tmp on some Linux systems. Other systems have no list of mounts: False."""
    try:
        entries = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    types = {Path(entry[1]): entry[2] for entry in entries if len(entry) > 2}
    place = folder.resolve()
    return next((types[p] for p in (place, *place.parents) if p in types), "") in _RAM_DISKS
