"""A library that behaves like NVIDIA's, with C functions and a layout of memory written down here a second time."""

import ctypes
from types import SimpleNamespace

SUCCESS, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE, LOST = 0, 3, 4, 6, 7, 15
HIDDEN = 2**64 - 1
MB = 1 << 20

_Pointer, _Text, _Code = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
_PROTOTYPES = {
    "nvmlInit_v2": (),
    "nvmlShutdown": (),
    "nvmlDeviceGetHandleByUUID": (_Text, _Pointer),
    "nvmlDeviceGetHandleByPciBusId_v2": (_Text, _Pointer),
    "nvmlSystemGetDriverVersion": (_Pointer, ctypes.c_uint),
    "nvmlDeviceGetMaxPcieLinkGeneration": (_Pointer, _Pointer),
    "nvmlDeviceGetMaxPcieLinkWidth": (_Pointer, _Pointer),
    "nvmlDeviceGetHandleByIndex_v2": (ctypes.c_uint, _Pointer),
    "nvmlDeviceGetName": (_Pointer, _Pointer, ctypes.c_uint),
    "nvmlDeviceGetMemoryInfo": (_Pointer, _Pointer),
    "nvmlDeviceGetMemoryInfo_v2": (_Pointer, _Pointer),
    "nvmlDeviceGetComputeRunningProcesses_v2": (_Pointer, _Pointer, _Pointer),
    "nvmlDeviceGetComputeRunningProcesses_v3": (_Pointer, _Pointer, _Pointer),
    "nvmlDeviceGetGraphicsRunningProcesses_v2": (_Pointer, _Pointer, _Pointer),
    "nvmlDeviceGetGraphicsRunningProcesses_v3": (_Pointer, _Pointer, _Pointer),
}


class Card:
    """A card of 12 GB as NVML sees it. Numbers in MB; processes as `(number, MB or HIDDEN)`."""

    driver, slot = b"555.42.02", (4, 16)

    def __init__(self, names=("GPU-one",), total=12288, reserved=300, free=4000, compute=(), graphics=()):
        self.names, self.total, self.reserved, self.free = names, total * MB, reserved * MB, free * MB
        self.lists = {"Compute": list(compute), "Graphics": list(graphics)}


def library(*cards, lacks=(), fails=None, calls=None):
    """`lacks`: functions that an old driver does not have; `fails`: codes by function; `calls`: names are added to it."""
    fails, calls = fails or {}, [] if calls is None else calls

    def find(name, handle):
        for number, card in enumerate(cards, 1):
            if name.decode() in card.names:
                # A handle is a pointer; high bits show whether it travels whole.
                ctypes.c_void_p.from_address(handle).value = (number << 40) + number
                return SUCCESS
        return NOT_FOUND

    def by_index(index, handle):
        return find(cards[index].names[0].encode(), handle) if index < len(cards) else NOT_FOUND

    def name(handle, address, size):
        written = b"NVIDIA GeForce RTX 3060\0"
        assert len(written) <= size
        ctypes.memmove(address, written, len(written))
        return SUCCESS

    def card_of(handle):
        assert handle >> 40 == handle & 0xFF, "a handle was cut"
        return cards[(handle & 0xFF) - 1]

    def write(address, *numbers):
        for position, number in enumerate(numbers):
            ctypes.c_uint64.from_address(address + 8 * position).value = number

    def memory(handle, address):
        card = card_of(handle)
        write(address, card.total, card.free, card.total - card.free)
        return SUCCESS

    def memory_2(handle, address):
        card = card_of(handle)
        version = ctypes.c_uint32.from_address(address).value
        if version != 0x02000028:  # version 2 of a structure of 40 bytes
            return 25
        write(address + 8, card.total, card.reserved, card.free, card.total - card.free)
        return SUCCESS

    def processes(kind):
        def listed(handle, count_at, entries_at):
            entries, count = card_of(handle).lists[kind], ctypes.c_uint32.from_address(count_at)
            offered, count.value = count.value, len(entries)
            if offered < len(entries):
                return INSUFFICIENT_SIZE
            for position, (pid, size) in enumerate(entries):
                ctypes.c_uint32.from_address(entries_at + 24 * position).value = pid
                write(entries_at + 24 * position + 8, size if size == HIDDEN else size * MB)
            return SUCCESS

        return listed

    def driver_version(address, size):
        text = cards[0].driver[: size - 1] + b"\0"
        ctypes.memmove(address, text, len(text))
        return SUCCESS

    def slot(place):
        def largest(handle, address):
            ctypes.c_uint32.from_address(address).value = card_of(handle).slot[place]
            return SUCCESS

        return largest

    functions = {
        "nvmlSystemGetDriverVersion": driver_version,
        "nvmlDeviceGetMaxPcieLinkGeneration": slot(0),
        "nvmlDeviceGetMaxPcieLinkWidth": slot(1),
        "nvmlInit_v2": lambda: SUCCESS,
        "nvmlShutdown": lambda: SUCCESS,
        "nvmlDeviceGetHandleByUUID": find,
        "nvmlDeviceGetHandleByPciBusId_v2": find,
        "nvmlDeviceGetHandleByIndex_v2": by_index,
        "nvmlDeviceGetName": name,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetMemoryInfo_v2": memory_2,
    }
    for kind in ("Compute", "Graphics"):
        for version in ("_v2", "_v3"):
            functions[f"nvmlDeviceGet{kind}RunningProcesses{version}"] = processes(kind)

    def recorded(name, function):
        def call(*arguments):
            calls.append(name)
            return fails[name] if name in fails else function(*arguments)

        return ctypes.CFUNCTYPE(_Code, *_PROTOTYPES[name])(call)

    return SimpleNamespace(**{name: recorded(name, f) for name, f in functions.items() if name not in lacks})
