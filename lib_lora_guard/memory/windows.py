"""Reads Windows' commit limit, commit charge and page files. Importable everywhere; returns None outside Windows.

Sources: learn.microsoft.com, sysinfoapi.h (MEMORYSTATUSEX, GlobalMemoryStatusEx) and psapi.h (PERFORMANCE_INFORMATION,
GetPerformanceInfo, ENUM_PAGE_FILE_INFORMATION, EnumPageFilesW). kernel32.dll exports the psapi functions with the
prefix K32 since Windows 7.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Commit:
    """Committed memory. Windows refuses to commit above the limit, whatever RAM is free."""

    limit_bytes: int
    """RAM and page files at their present size."""
    charge_bytes: int
    room_bytes: int
    """Bytes that this process may still commit; its job object may allow less than the system."""


@dataclass(frozen=True)
class PageFiles:
    """All page files together, at their present size."""

    total_bytes: int
    free_bytes: int


class MemoryStatusEx(ctypes.Structure):
    """MEMORYSTATUSEX."""

    # DWORD has 32 bits on every Windows; ctypes.wintypes defines it as long, which is wider on other systems.
    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total_physical", ctypes.c_uint64),
        ("available_physical", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    )


class PerformanceInformation(ctypes.Structure):
    """PERFORMANCE_INFORMATION. `size` and `page_size` are bytes, the last three are numbers of objects, all others
    pages.
    """

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("commit_total", ctypes.c_size_t),
        ("commit_limit", ctypes.c_size_t),
        ("commit_peak", ctypes.c_size_t),
        ("physical_total", ctypes.c_size_t),
        ("physical_available", ctypes.c_size_t),
        ("system_cache", ctypes.c_size_t),
        ("kernel_total", ctypes.c_size_t),
        ("kernel_paged", ctypes.c_size_t),
        ("kernel_nonpaged", ctypes.c_size_t),
        ("page_size", ctypes.c_size_t),
        ("handle_count", ctypes.c_uint32),
        ("process_count", ctypes.c_uint32),
        ("thread_count", ctypes.c_uint32),
    )


class PageFileInformation(ctypes.Structure):
    """ENUM_PAGE_FILE_INFORMATION, sizes in pages."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("total_size", ctypes.c_size_t),
        ("total_in_use", ctypes.c_size_t),
        ("peak_usage", ctypes.c_size_t),
    )


_EachPageFile = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE)(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(PageFileInformation), ctypes.c_wchar_p
)


def commit(kernel32: Any = None) -> Commit | None:
    """Returns the commit limit and charge; None outside Windows.

    Args:
        kernel32: The library, for tests.

    Raises:
        OSError: Windows refuses.
    """
    library = kernel32 or _kernel32()
    if library is None:
        return None
    pages = _performance(library)
    status = MemoryStatusEx(length=ctypes.sizeof(MemoryStatusEx))
    _check(library.GlobalMemoryStatusEx(ctypes.byref(status)), "GlobalMemoryStatusEx")
    return Commit(
        pages.commit_limit * pages.page_size, pages.commit_total * pages.page_size, status.available_page_file
    )


def page_files(kernel32: Any = None) -> PageFiles | None:
    """Returns the size of all page files together; None outside Windows.

    Args:
        kernel32: The library, for tests.

    Raises:
        OSError: Windows refuses.
    """
    library = kernel32 or _kernel32()
    if library is None:
        return None
    pages, used = 0, 0

    def add(context: object, file: Any, name: str) -> int:
        nonlocal pages, used
        pages, used = pages + file.contents.total_size, used + file.contents.total_in_use
        return 1  # continue with the next one

    _check(library.K32EnumPageFilesW(_EachPageFile(add), None), "EnumPageFilesW")
    page_size = _performance(library).page_size
    return PageFiles(pages * page_size, max(0, pages - used) * page_size)


def _performance(library: Any) -> PerformanceInformation:
    size = ctypes.sizeof(PerformanceInformation)
    pages = PerformanceInformation(size=size)
    _check(library.K32GetPerformanceInfo(ctypes.byref(pages), size), "GetPerformanceInfo")
    return pages


def _kernel32() -> Any:
    if sys.platform == "win32":
        return ctypes.WinDLL("kernel32", use_last_error=True)
    return None


def _check(succeeded: int, function: str) -> None:
    if succeeded:
        return
    code = 0
    if sys.platform == "win32":
        code = ctypes.get_last_error()
    raise OSError(code, f"{function} failed with Windows error {code}")
