"""Reads the system memory that the GPU uses for this process from Windows' performance counters. Returns None
elsewhere.

Sources: learn.microsoft.com, pdh.h (PdhOpenQueryW, PdhAddEnglishCounterW, PdhCollectQueryData,
PdhGetFormattedCounterArrayW, PdhCloseQuery; PDH_FMT_COUNTERVALUE_ITEM_W) and pdhmsg.h. The counter set "GPU Process
Memory" exists since Windows 10 1709. Its instances are named pid_<number>_luid_<adapter>_phys_<number>, one for each
adapter.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_FORMAT_LARGE = 0x400
_MORE_DATA = 0x800007D2
_VALID = (0, 1)
"""PDH_CSTATUS_VALID_DATA and PDH_CSTATUS_NEW_DATA."""


class CounterItem(ctypes.Structure):
    """PDH_FMT_COUNTERVALUE_ITEM_W with the value as LONGLONG."""

    _fields_ = (("name", ctypes.c_wchar_p), ("status", ctypes.c_uint32), ("value", ctypes.c_int64))


def shared_usage_bytes(pdh: Any = None) -> int | None:
    """Returns the "Shared GPU memory" of this process on all adapters, as the task manager shows it; None if
    unavailable.

    Takes some milliseconds. It includes pinned memory, so only its growth is meaningful. `pdh`: the library, for tests.
    """
    library = pdh or _pdh()
    if library is None:
        return None
    query = ctypes.c_void_p()
    if library.PdhOpenQueryW(None, None, ctypes.byref(query)):
        return None
    try:
        return _sum_of_counters(library, query)
    finally:
        library.PdhCloseQuery(query)


def _sum_of_counters(library: Any, query: ctypes.c_void_p) -> int | None:
    counter = ctypes.c_void_p()
    # The underscore ends the number: pid_12 is a prefix of pid_123.
    path = ctypes.c_wchar_p(rf"\GPU Process Memory(pid_{os.getpid()}_*)\Shared Usage")
    if library.PdhAddEnglishCounterW(query, path, None, ctypes.byref(counter)):
        return None
    if library.PdhCollectQueryData(query):
        return None
    size, count = ctypes.c_uint32(), ctypes.c_uint32()
    sizes = ctypes.byref(size), ctypes.byref(count)
    # The first call returns the size, the second the data. ctypes returns the status as a signed number.
    if library.PdhGetFormattedCounterArrayW(counter, _FORMAT_LARGE, *sizes, None) & 0xFFFFFFFF != _MORE_DATA:
        return None
    # The buffer also holds the names that the items point to.
    buffer = ctypes.create_string_buffer(size.value)
    if library.PdhGetFormattedCounterArrayW(counter, _FORMAT_LARGE, *sizes, buffer):
        return None
    items = ctypes.cast(buffer, ctypes.POINTER(CounterItem))
    values = [items[n].value for n in range(count.value) if items[n].status in _VALID]
    return sum(values) if values else None


def _pdh() -> Any:
    if sys.platform == "win32":
        try:
            return ctypes.WinDLL("pdh")
        except OSError:
            return None
    return None
