"""Reads a card's memory from the NVIDIA driver through its management library (NVML). Needs nothing but the driver.

On Windows cudaMemGetInfo reports what a program could get if all others made room; NVML reports what is free.

Sources: docs.nvidia.com/deploy/nvml-api: nvmlReturn_t, nvmlMemory_t, nvmlMemory_v2_t, nvmlProcessInfo_t,
"Initialization and Cleanup", nvmlDeviceGetHandleByUUID, nvmlDeviceGetHandleByPciBusId_v2, nvmlDeviceGetMemoryInfo(_v2),
nvmlDeviceGetComputeRunningProcesses_v3, nvmlDeviceGetGraphicsRunningProcesses_v3; nvml.h for NVML_STRUCT_VERSION.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..errors import LoraGuardError
from ..messages import Message
from .cuda_card import Card, which_card
from .readings import Reading

if TYPE_CHECKING:
    import torch

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
_NAME_BYTES = 96
_NOT_AVAILABLE = 2**64 - 1
_VERSION_BYTES = 80
"""nvml.h: NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE."""
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""Linux, include/linux/proc_ns.h: PROC_PID_INIT_INO."""


class Memory(ctypes.Structure):
    """nvmlMemory_t; `used` includes the driver's own reserve."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Memory2(ctypes.Structure):
    """nvmlMemory_v2_t. `used` is not read: drivers differ in whether it includes `reserved`."""

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
    """The memory of one card, as NVML reports it."""

    total: Reading
    free: Reading
    held: Reading
    """Held by programs: neither free nor reserved by the driver. Drivers before 510 do not separate the two."""
    ours: Reading
    """Held by this process, with its CUDA context."""


@dataclass(frozen=True)
class GpuProcess:
    """One process that uses the card."""

    pid: int
    name: str
    """"" if the system does not report it."""
    bytes: int | None
    """None if the driver does not report it, as on Windows."""


@dataclass(frozen=True)
class GpuProcesses:
    """The processes that use a card."""

    processes: tuple[GpuProcess, ...]
    """The largest first."""
    missing: Message | None = None
    """The reason why there is no list."""


class Nvml:
    """One session with the library. Never raises: `missing` and the readings hold the reasons for missing numbers.

    The first session of a process takes several milliseconds.
    """

    def __init__(
        self,
        library: Any = None,
        *,
        card_of: Callable[[torch.device], Card] = which_card,
        pids_agree: bool | None = None,
    ) -> None:
        """Opens the library.

        Args:
            library: The loaded library, for tests.
            card_of: Identifies the card of a device, for tests.
            pids_agree: True if the driver's process numbers are those of this process's namespace; for tests.
        """
        self.missing: Message | None = None
        self._card_of = card_of
        self._pids_agree = _pids_agree() if pids_agree is None else pids_agree
        self._handles: dict[Card, ctypes.c_void_p] = {}
        self._library = library or _load(_library_paths(platform.system(), os.environ))
        if self._library is None:
            self.missing = Message("readings.nvml_absent")
            return
        try:
            self._call("nvmlInit_v2")
        except LoraGuardError as error:
            self.missing, self._library = _why(error), None

    def close(self) -> None:
        """Ends the session. Later queries return missing readings."""
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library, self.missing = None, Message("readings.nvml_closed")
            self._handles.clear()

    def memory(self, device: torch.device) -> NvmlMemory:
        """Returns the memory of the card behind `device`."""
        try:
            handle = self._handle(device)
            total, free, held = self._memory(handle)
        except LoraGuardError as error:
            none = Reading(None, SOURCE, _why(error))
            return NvmlMemory(none, none, none, none)
        return NvmlMemory(
            Reading(total, SOURCE), Reading(free, SOURCE), Reading(held, SOURCE), self._ours(handle, total)
        )

    def first_card(self) -> tuple[str, int, int] | None:
        """Returns name, total and free bytes of the driver's first card; None if it has none. Needs no torch."""
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
        try:
            if self.missing is not None:
                return None
            self._call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(handle))
            self._call("nvmlDeviceGetName", handle, name, _NAME_BYTES)
            total, free, _ = self._memory(handle)
        except LoraGuardError:
            return None
        return name.value.decode("utf-8", "replace"), total, free

    def other_processes(self, device: torch.device) -> GpuProcesses:
        """Returns the other processes on the card, which the user could close to free memory."""
        try:
            used = self._used_by_pid(self._handle(device), _NOT_AVAILABLE)
        except LoraGuardError as error:
            return GpuProcesses((), _why(error))
        others = [GpuProcess(pid, _name_of(pid), size) for pid, size in used.items() if pid != os.getpid()]
        return GpuProcesses(tuple(sorted(others, key=lambda p: (-(p.bytes or 0), p.name.lower(), p.pid))))

    def driver(self) -> str:
        """Returns the version of the driver, as "driver 555.42.02"; "" if it does not tell."""
        version = ctypes.create_string_buffer(_VERSION_BYTES)
        try:
            self._ask("nvmlSystemGetDriverVersion", version, _VERSION_BYTES)
        except LoraGuardError:
            return ""
        return "driver " + version.value.decode("ascii", "replace")

    def slot(self, device: torch.device) -> str:
        """Returns the fastest link that the card and its slot have together, as "PCIe 4 x16"; "" if it is not known.

        The link at present may be slower, to save power.
        """
        numbers = []
        try:
            for name in ("nvmlDeviceGetMaxPcieLinkGeneration", "nvmlDeviceGetMaxPcieLinkWidth"):
                number = ctypes.c_uint()
                self._call(name, self._handle(device), ctypes.byref(number))
                numbers.append(number.value)
        except LoraGuardError:
            return ""
        return "PCIe {} x{}".format(*numbers)

    def _ours(self, handle: ctypes.c_void_p, total: int) -> Reading:
        try:
            used = self._used_by_pid(handle, total)
        except LoraGuardError as error:
            return Reading(None, SOURCE, _why(error))
        if os.getpid() not in used:
            return Reading(None, SOURCE, Message("readings.nvml_not_listed"))
        size = used[os.getpid()]
        return Reading(size, SOURCE, Message("readings.nvml_hidden") if size is None else None)

    def _ask(self, name: str, *arguments: Any) -> None:
        if self.missing is not None:
            raise LoraGuardError(self.missing)
        self._call(name, *arguments)

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
            # A MIG instance (a slice of a card) is a device of its own.
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
        """Returns bytes by process number; None if the driver does not report them. A size above `total` is not a real
        one.
        """
        if not self._pids_agree:
            raise LoraGuardError.of("readings.nvml_other_pids")
        used: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):
            for info in self._processes(handle, kind):
                size = info.used if info.used != _NOT_AVAILABLE and info.used <= total else None
                # A process in both lists uses the same memory.
                known = [s for s in (used.get(info.pid), size) if s is not None]
                used[info.pid] = max(known) if known else None
        return used

    def _processes(self, handle: ctypes.c_void_p, kind: str) -> list[Any]:
        name = f"nvmlDeviceGet{kind}RunningProcesses_v"
        newest = name + ("3" if hasattr(self._library, name + "3") else "2")
        count = 32
        for _ in range(3):
            # Half of the buffer is kept back: some drivers of the 535 series wrote entries a third larger.
            infos = (ProcessInfo * (2 * count))()
            found = ctypes.c_uint(count)
            if self._call(newest, handle, ctypes.byref(found), infos, also=_INSUFFICIENT_SIZE) == _SUCCESS:
                return list(infos[: min(found.value, count)])
            count = found.value + 32
        raise LoraGuardError.of("readings.nvml_refused", function=newest, code=_INSUFFICIENT_SIZE)

    def _call(self, name: str, *arguments: Any, also: int = _SUCCESS) -> int:
        """Returns the code of the call: success or `also`.

        Raises:
            LoraGuardError: Any other code, or the function is missing.
        """
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


def _library_paths(system: str, environment: Mapping[str, str]) -> list[str]:
    """Returns the paths of the driver's library. On Windows full paths only: a file of that name elsewhere must not be
    loaded.
    """
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
    """False in a container with its own process numbers: the driver may list those outside."""
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
