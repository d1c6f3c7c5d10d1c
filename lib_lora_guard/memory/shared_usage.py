"""How much system memory the GPU uses for this process, from Windows' performance counters. Elsewhere the answer is None.

Sources: learn.microsoft.com, pdh.h (PdhOpenQueryW, PdhAddEnglishCounterW, PdhCollectQueryData, PdhGetFormattedCounterArrayW,
PdhCloseQuery; PDH_FMT_COUNTERVALUE_ITEM_W) and pdhmsg.h. The counter set "GPU Process Memory" is there since Windows 10
1709; its instances are named pid_<number>_luid_<adapter>_phys_<number>, one for each adapter.
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
    """ "Shared GPU memory" of this process as the task manager shows it, of all adapters; some milliseconds. It counts pinned
    memory too: only its growth says something. None outside Windows and where no counter answers. `pdh`: the library, for
    tests."""
    library = pdh or _pdh()
    if library is None:
        return None
    query = ctypes.c_void_p()
    if library.PdhOpenQueryW(None, None, ctypes.byref(query)):
        return None
    try:
        return _asked(library, query)
    finally:
        library.PdhCloseQuery(query)


def _asked(library: Any, query: ctypes.c_void_p) -> int | None:
    counter = ctypes.c_void_p()
    # The underscore ends the number: pid_12 is also the beginning of pid_123.
    path = ctypes.c_wchar_p(rf"\GPU Process Memory(pid_{os.getpid()}_*)\Shared Usage")
    if library.PdhAddEnglishCounterW(query, path, None, ctypes.byref(counter)):
        return None
    if library.PdhCollectQueryData(query):
        return None
    size, count = ctypes.c_uint32(), ctypes.c_uint32()
    sizes = ctypes.byref(size), ctypes.byref(count)
    # Asked twice: how large, then what. A status is a signed number to ctypes.
    if library.PdhGetFormattedCounterArrayW(counter, _FORMAT_LARGE, *sizes, None) & 0xFFFFFFFF != _MORE_DATA:
        return None
    # Behind the items lie the names that they point to.
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
