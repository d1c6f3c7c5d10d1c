"""The NVIDIA driver's own view of a card's memory, through its management library. Nothing is needed but the driver.

On Windows cudaMemGetInfo tells a program what it could have if all others made room; NVML tells what is free.

Sources: docs.nvidia.com/deploy/nvml-api: nvmlReturn_t, nvmlMemory_t, nvmlMemory_v2_t, nvmlProcessInfo_t, "Initialization and
Cleanup", nvmlDeviceGetHandleByUUID, nvmlDeviceGetHandleByPciBusId_v2, nvmlDeviceGetMemoryInfo(_v2),
nvmlDeviceGetComputeRunningProcesses_v3, nvmlDeviceGetGraphicsRunningProcesses_v3; nvml.h for NVML_STRUCT_VERSION.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..errors import LoraGuardError
from ..messages import Message
from .cuda_card import Card, which_card
from .readings import Reading

SOURCE = Message("readings.nvml")

_SUCCESS, _NOT_FOUND, _INSUFFICIENT_SIZE = 0, 6, 7
_REASONS = {
    3: "readings.nvml_not_supported",
    4: "readings.nvml_no_permission",
    _NOT_FOUND: "readings.nvml_not_found",
    9: "readings.nvml_no_driver",
    15: "readings.nvml_card_lost",
    17: "readings.nvml_blocked",
    18: "readings.nvml_driver_changed",
}
_NOT_AVAILABLE = 2**64 - 1
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""Linux, include/linux/proc_ns.h: PROC_PID_INIT_INO."""


class Memory(ctypes.Structure):
    """nvmlMemory_t; `used` counts what the driver sets aside."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Memory2(ctypes.Structure):
    """nvmlMemory_v2_t. Whether `used` counts `reserved` changed between drivers, so it is not read."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t of the functions _v2 and _v3."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


@dataclass(frozen=True)
class NvmlMemory:
    total: Reading
    free: Reading
    held: Reading
    """By programs: what is neither free nor set aside by the driver. Drivers before 510 do not tell these apart."""
    ours: Reading
    """By this process, its CUDA context counted in."""


@dataclass(frozen=True)
class GpuProcess:
    pid: int
    name: str
    """"" where the system does not tell."""
    bytes: int | None
    """None where the driver does not tell, as on Windows."""


@dataclass(frozen=True)
class GpuProcesses:
    processes: tuple[GpuProcess, ...]
    """The largest first."""
    missing: Message | None = None
    """Why there is no list."""


class Nvml:
    """One session with the library; the first takes some milliseconds and more. Never raises: `missing` and the readings
    say what cannot be had."""

    def __init__(
        self,
        library: Any = None,
        *,
        card_of: Callable[[torch.device], Card] = which_card,
        pids_agree: bool | None = None,
    ) -> None:
        """`library`, `card_of` and `pids_agree` (the driver's process numbers are ours) are for tests."""
        self.missing: Message | None = None
        self._card_of = card_of
        self._pids_agree = _pids_agree() if pids_agree is None else pids_agree
        self._handles: dict[Card, ctypes.c_void_p] = {}
        self._library = library or _load(_places(platform.system(), os.environ))
        if self._library is None:
            self.missing = Message("readings.nvml_absent")
            return
        try:
            self._call("nvmlInit_v2")
        except LoraGuardError as error:
            self.missing, self._library = _why(error), None

    def close(self) -> None:
        """Ends the session; what is asked afterwards is missing."""
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library, self.missing = None, Message("readings.nvml_closed")
            self._handles.clear()

    def memory(self, device: torch.device) -> NvmlMemory:
        """The memory of the card that `device` is."""
        try:
            handle = self._handle(device)
            total, free, held = self._memory(handle)
        except LoraGuardError as error:
            none = Reading(None, SOURCE, _why(error))
            return NvmlMemory(none, none, none, none)
        return NvmlMemory(
            Reading(total, SOURCE), Reading(free, SOURCE), Reading(held, SOURCE), self._ours(handle, total)
        )

    def other_processes(self, device: torch.device) -> GpuProcesses:
        """Who else uses the card: programs that could be closed to get memory."""
        try:
            used = self._used_by_pid(self._handle(device), _NOT_AVAILABLE)
        except LoraGuardError as error:
            return GpuProcesses((), _why(error))
        others = [GpuProcess(pid, _name_of(pid), size) for pid, size in used.items() if pid != os.getpid()]
        return GpuProcesses(tuple(sorted(others, key=lambda p: (-(p.bytes or 0), p.name.lower(), p.pid))))

    def _ours(self, handle: ctypes.c_void_p, total: int) -> Reading:
        try:
            used = self._used_by_pid(handle, total)
        except LoraGuardError as error:
            return Reading(None, SOURCE, _why(error))
        if os.getpid() not in used:
            return Reading(None, SOURCE, Message("readings.nvml_not_listed"))
        size = used[os.getpid()]
        return Reading(size, SOURCE, Message("readings.nvml_hidden") if size is None else None)

    def _handle(self, device: torch.device) -> ctypes.c_void_p:
        if self.missing is not None:
            raise LoraGuardError(self.missing)
        card = self._card_of(device)
        if card not in self._handles:
            self._handles[card] = self._find(card)
        return self._handles[card]

    def _find(self, card: Card) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        if not card.uuid:
            self._call("nvmlDeviceGetHandleByPciBusId_v2", card.pci_bus_id.encode("ascii"), ctypes.byref(handle))
            return handle
        name, by_uuid = card.uuid.encode("ascii"), "nvmlDeviceGetHandleByUUID"
        if self._call(by_uuid, b"GPU-" + name, ctypes.byref(handle), also=_NOT_FOUND) == _NOT_FOUND:
            # A slice of a divided card (MIG) is a device of its own.
            self._call(by_uuid, b"MIG-" + name, ctypes.byref(handle))
        return handle

    def _memory(self, handle: ctypes.c_void_p) -> tuple[int, int, int]:
        """`(total, free, held by programs)`."""
        size = ctypes.sizeof(Memory2)
        second = Memory2(version=size | 2 << 24)
        try:
            self._call("nvmlDeviceGetMemoryInfo_v2", handle, ctypes.byref(second))
            return second.total, second.free, max(0, second.total - second.reserved - second.free)
        except LoraGuardError:
            first = Memory()
            self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(first))
            return first.total, first.free, max(0, first.total - first.free)

    def _used_by_pid(self, handle: ctypes.c_void_p, total: int) -> dict[int, int | None]:
        """Bytes by process number; None where the driver does not tell. More than `total` is no number of bytes."""
        if not self._pids_agree:
            raise LoraGuardError.of("readings.nvml_other_pids")
        used: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):
            for info in self._processes(handle, kind):
                size = info.used if info.used != _NOT_AVAILABLE and info.used <= total else None
                # A process in both lists is the same memory twice.
                known = [s for s in (used.get(info.pid), size) if s is not None]
                used[info.pid] = max(known) if known else None
        return used

    def _processes(self, handle: ctypes.c_void_p, kind: str) -> list[Any]:
        name = f"nvmlDeviceGet{kind}RunningProcesses_v"
        newest = name + ("3" if hasattr(self._library, name + "3") else "2")
        count = 32
        for _ in range(3):
            # Half of the room is never offered: some drivers of the 535 series wrote entries a third larger.
            infos = (ProcessInfo * (2 * count))()
            found = ctypes.c_uint(count)
            if self._call(newest, handle, ctypes.byref(found), infos, also=_INSUFFICIENT_SIZE) == _SUCCESS:
                return list(infos[: min(found.value, count)])
            count = found.value + 32
        raise LoraGuardError.of("readings.nvml_refused", function=newest, code=_INSUFFICIENT_SIZE)

    def _call(self, name: str, *arguments: Any, also: int = _SUCCESS) -> int:
        """The code of the call: success or `also`. Raises LoraGuardError for every other and for a missing function."""
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise LoraGuardError.of("readings.nvml_function", function=name) from error
        code: int = function(*arguments)
        if code not in (_SUCCESS, also):
            key = _REASONS.get(code)
            raise (
                LoraGuardError.of(key) if key else LoraGuardError.of("readings.nvml_refused", function=name, code=code)
            )
        return code


def _places(system: str, environment: Mapping[str, str]) -> list[str]:
    """Where the driver puts the library. On Windows by its full path: a file of that name elsewhere must not be loaded."""
    if system == "Windows":
        places = [Path(environment.get("SystemRoot", r"C:\Windows")) / "System32" / "nvml.dll"]
        programs = environment.get("ProgramW6432")
        if programs:
            places.append(Path(programs) / "NVIDIA Corporation" / "NVSMI" / "nvml.dll")
        return [str(place) for place in places]
    return ["libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1"] if system == "Linux" else []


def _load(places: list[str]) -> Any:
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    return None


def _pids_agree() -> bool:
    """False in a container with process numbers of its own: the driver may list those outside."""
    if platform.system() != "Linux":
        return True
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def _name_of(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def _why(error: LoraGuardError) -> Message:
    assert isinstance(error.message, Message)
    return error.message
