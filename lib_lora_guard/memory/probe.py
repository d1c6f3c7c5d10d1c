"""How much VRAM, RAM and disk could take backups right now. Measures only: who gets what is decided elsewhere.

Source: fstab(5) for the list of mounts.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .control_groups import ControlGroups
from .readings import MemorySnapshot, fast_ram_bytes, usable_vram_bytes
from .snapshot import group_room, read_ram, read_vram

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


def measure_budget(
    device: torch.device,
    ram_floor_bytes: int,
    spool_dir: Path | None = None,
    snapshot: MemorySnapshot | None = None,
) -> BackupBudget:
    """What is free: VRAM of `device`, RAM above `ram_floor_bytes`, disk below `spool_dir` above DISK_RESERVE_BYTES.

    `snapshot`: whose numbers of memory these are, NVML's with them; None asks the driver and the system alone."""
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
    """Bytes that may be written below `folder` (it need not exist yet). 0 where it lies in RAM: that would spare none."""
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
    """True on a RAM disk, which /tmp is on some Linux systems. Elsewhere there is no such list, and False."""
    try:
        entries = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    types = {Path(entry[1]): entry[2] for entry in entries if len(entry) > 2}
    place = folder.resolve()
    return next((types[p] for p in (place, *place.parents) if p in types), "") in _RAM_DISKS
