"""Takes a snapshot of all memory numbers. About half a millisecond without NVML; never initializes CUDA.

Sources: docs.pytorch.org (torch.cuda.mem_get_info, memory_stats, host_memory_stats), psutil's documentation, proc(5)
for VmHWM.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..lazy_torch import is_loaded, torch
from ..messages import Message
from . import windows
from .control_groups import ControlGroups
from .nvml import SOURCE as NVML
from .nvml import Nvml, NvmlMemory
from .readings import MemorySnapshot, Reading

DRIVER = Message("readings.driver")
TORCH = Message("readings.torch")
PINNED = Message("readings.pinned")
SYSTEM = Message("readings.system")
GROUPS = Message("readings.groups")
COMPUTED = Message("readings.computed")
WINDOWS = Message("readings.windows")

NOT_WINDOWS = Message("readings.not_windows")
NOT_COUNTED = Message("readings.not_counted")
NOT_STARTED = Message("readings.cuda_not_started")
NOT_ASKED = Message("readings.nvml_not_asked")
NO_GROUP = Message("readings.no_group")


class HostMemory:
    """Constant facts of this process: its system, its control groups, its psutil handle. Made once and passed to every
    snapshot.
    """

    def __init__(self, groups: ControlGroups | None = None, proc: Path = Path("/proc")) -> None:
        self.system = platform.system()
        self.groups = groups or ControlGroups()
        self.process = psutil.Process()
        self._meminfo, self._status = proc / "meminfo", proc / "self" / "status"

    def swap_bytes(self) -> tuple[int | None, int | None]:
        """Returns `(total, free)`, outside Windows. Reads Linux' file directly: psutil reads a second file for numbers
        unused here.
        """
        if self.system == "Linux":
            total, free = _lines(self._meminfo, "SwapTotal", "SwapFree")
            return total, free
        swap = psutil.swap_memory()
        return swap.total, swap.free

    def rss_peak_bytes(self) -> int | None:
        """Returns the peak of the resident bytes; None if the system does not keep it. getrusage is not used: its peak
        starts with that of the parent process.
        """
        if self.system == "Windows":
            peak: int = getattr(self.process.memory_info(), "peak_wset")  # noqa: B009  # typed on Windows alone
            return peak
        return _lines(self._status, "VmHWM")[0]


def take_snapshot(
    device: torch.device | None, nvml: Nvml | None = None, host: HostMemory | None = None
) -> MemorySnapshot:
    """Returns the memory of `device` and of this machine now.

    Args:
        device: The device that the models run on; None for the CPU, without asking torch.
        nvml: Asks NVML too, which takes longer.
        host: Constant facts to reuse.
    """
    host = host or HostMemory()
    vram = _vram(device)
    card = _nvml_memory(nvml, device)
    ours = vram.reserved if card.ours.bytes is None else card.ours
    ram_total, ram_available = read_ram()
    swap_total, swap_free = _swap(host)
    rooms = host.groups.rooms(swap_free.bytes or 0)
    commit_limit, commit_charge, commit_room = _commit(host)
    return MemorySnapshot(
        system=host.system,
        vram_total=vram.total,
        vram_free=vram.free,
        vram_free_nvml=card.free,
        vram_reserved=vram.reserved,
        vram_active=vram.active,
        vram_ours=ours,
        vram_others=_others(vram, card, ours),
        ram_total=ram_total,
        ram_available=ram_available,
        ram_cgroup_room=group_room(rooms.ram),
        ram_and_swap_cgroup_room=group_room(rooms.ram_and_swap),
        swap_total=swap_total,
        swap_free=swap_free,
        commit_limit=commit_limit,
        commit_charge=commit_charge,
        commit_room=commit_room,
        pinned=_pinned(),
        rss=Reading(host.process.memory_info().rss, SYSTEM),
        rss_peak=_known(host.rss_peak_bytes(), SYSTEM),
    )


@dataclass(frozen=True)
class Vram:
    """The memory of a device, as the driver and torch report it."""

    total: Reading
    free: Reading
    reserved: Reading
    active: Reading


def _vram(device: torch.device | None) -> Vram:
    if device is None or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
        return _no_vram(_why_no_vram(device))
    return read_vram(device)


def read_vram(device: torch.device) -> Vram:
    """Reads the memory of a CUDA device (ROCm too) from the driver and torch's allocator. Initializes CUDA."""
    if device.type != "cuda":
        return _no_vram(Message("readings.not_cuda", {"device": device.type}))
    current = None if device.index is None else device  # older torch takes no device without a number
    try:
        free, total = torch.cuda.mem_get_info(current)
    except RuntimeError as error:
        return _no_vram(Message("readings.driver_refused", {"error": str(error).strip().split("\n")[0]}))
    statistics = torch.cuda.memory_stats_as_nested_dict(current)
    # torch keeps no statistics of a device that was never used: it holds nothing there.
    none = {"all": {"current": 0}}
    reserved, active = (
        int(statistics.get(name, none)["all"]["current"]) for name in ("reserved_bytes", "active_bytes")
    )
    return Vram(Reading(total, DRIVER), Reading(free, DRIVER), Reading(reserved, TORCH), Reading(active, TORCH))


def read_ram() -> tuple[Reading, Reading]:
    """Returns `(total, available)` of the machine."""
    memory = psutil.virtual_memory()
    return Reading(memory.total, SYSTEM), Reading(memory.available, SYSTEM)


def available_ram_bytes() -> int:
    """Returns the RAM of the machine that is free or can be freed without paging. Control groups do not count."""
    return psutil.virtual_memory().available


def group_room(room: int | None) -> Reading:
    """Makes a reading of the room that control groups leave."""
    return _known(room, GROUPS, NO_GROUP)


def _no_vram(why: Message) -> Vram:
    driver, ours = Reading(None, DRIVER, why), Reading(None, TORCH, why)
    return Vram(driver, driver, ours, ours)


def _why_no_vram(device: torch.device | None) -> Message:
    kind = "cpu" if device is None else device.type
    return NOT_STARTED if kind == "cuda" else Message("readings.not_cuda", {"device": kind})


def _nvml_memory(nvml: Nvml | None, device: torch.device | None) -> NvmlMemory:
    if nvml is not None and device is not None:
        return nvml.memory(device)
    none = Reading(None, NVML, NOT_ASKED)
    return NvmlMemory(none, none, none, none)


def _others(vram: Vram, card: NvmlMemory, ours: Reading) -> Reading:
    """Prefers NVML's numbers: torch's free memory may include what other programs hold."""
    held = card.held.bytes
    if held is None:
        if vram.total.bytes is None or vram.free.bytes is None:
            return Reading(None, COMPUTED, vram.total.missing)
        held = vram.total.bytes - vram.free.bytes
    if ours.bytes is None:
        return Reading(None, COMPUTED, ours.missing)
    return Reading(max(0, held - ours.bytes), COMPUTED)


def _swap(host: HostMemory) -> tuple[Reading, Reading]:
    if host.system != "Windows":
        total, free = host.swap_bytes()
        return _known(total, SYSTEM), _known(free, SYSTEM)
    # psutil uses performance counters there, which are slow and disabled on some machines.
    try:
        files = windows.page_files()
    except OSError as error:
        none = _refused(error)
        return none, none
    if files is None:
        none = Reading(None, WINDOWS, NOT_WINDOWS)
        return none, none
    return Reading(files.total_bytes, WINDOWS), Reading(files.free_bytes, WINDOWS)


def _commit(host: HostMemory) -> tuple[Reading, Reading, Reading]:
    """`(limit, charge, room)`."""
    try:
        commit = windows.commit() if host.system == "Windows" else None
    except OSError as error:
        none = _refused(error)
        return none, none, none
    if commit is None:
        none = Reading(None, WINDOWS, NOT_WINDOWS)
        return none, none, none
    numbers = (commit.limit_bytes, commit.charge_bytes, commit.room_bytes)
    limit, charge, room = (Reading(number, WINDOWS) for number in numbers)
    return limit, charge, room


def _refused(error: OSError) -> Reading:
    return Reading(None, WINDOWS, Message("readings.windows_refused", {"error": error.strerror or str(error)}))


def _pinned() -> Reading:
    # Asked first: so every torch says the same, loaded or not, while no card is at work.
    if not (is_loaded() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]  # torch's own
        return Reading(None, PINNED, NOT_STARTED)
    statistics: Any = getattr(torch.cuda, "host_memory_stats_as_nested_dict", None)  # since torch 2.7
    if statistics is None:
        return Reading(None, PINNED, NOT_COUNTED)
    numbers = statistics()
    # Until torch 2.9 `allocated_bytes` were those in use and `reserved_bytes` all.
    size = numbers.get("reserved_bytes", numbers.get("allocated_bytes", {}))
    return _known(size.get("current"), PINNED)


def _known(number: int | None, source: Message, why: Message = NOT_COUNTED) -> Reading:
    return Reading(number, source, why if number is None else None)


def _lines(file: Path, *names: str) -> list[int | None]:
    """Returns the bytes of lines `name:   123 kB`; None for each missing line."""
    try:
        text = file.read_bytes()
    except OSError:
        return [None] * len(names)
    found = (re.search(rb"^%s:\s*(\d+) kB" % name.encode("ascii"), text, re.MULTILINE) for name in names)
    return [None if match is None else int(match[1]) << 10 for match in found]
