"""Windows' structures have the documented layout, its numbers the right units, and nothing is asked elsewhere."""

import ctypes
import sys
from types import SimpleNamespace

import pytest

from lib_lora_guard.memory.windows import (
    Commit,
    MemoryStatusEx,
    PageFileInformation,
    PageFiles,
    PerformanceInformation,
    commit,
    page_files,
)

PAGE = 4096
GB = 1 << 30
POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)

STATUS = [("I", 4), ("I", 4), *[("Q", 8)] * 7]
PERFORMANCE = [("DWORD", 4), *[("SIZE_T", POINTER_BYTES)] * 10, *[("DWORD", 4)] * 3]
PAGE_FILE = [("DWORD", 4), ("DWORD", 4), *[("SIZE_T", POINTER_BYTES)] * 3]


def laid_out(members):
    """`(offsets, size)` as C lays members out: each at a multiple of its size, the whole at one of the largest."""
    offsets, end = [], 0
    for _, size in members:
        offsets.append(-(-end // size) * size)
        end = offsets[-1] + size
    widest = max(size for _, size in members)
    return offsets, -(-end // widest) * widest


@pytest.mark.parametrize(
    ("structure", "members"),
    [(MemoryStatusEx, STATUS), (PerformanceInformation, PERFORMANCE), (PageFileInformation, PAGE_FILE)],
)
def test_layouts_are_the_documented_ones(structure, members):
    offsets, size = laid_out(members)
    assert [getattr(structure, name).offset for name, _ in structure._fields_] == offsets
    assert ctypes.sizeof(structure) == size


def test_sizes_are_those_of_a_64_bit_windows():
    sizes = [ctypes.sizeof(s) for s in (MemoryStatusEx, PerformanceInformation, PageFileInformation)]
    assert sizes == [64, 104, 32]
    assert (PerformanceInformation.commit_limit.offset, PerformanceInformation.page_size.offset) == (16, 80)
    assert (MemoryStatusEx.available_page_file.offset, PageFileInformation.total_in_use.offset) == (32, 16)


def kernel32(limit=3_000_000, charge=2_000_000, room=5 * GB, files=((1000, 400),), fails=()):
    """A library that writes raw bytes where a structure is handed in, as Windows would, after looking at its size."""

    def pages_at(address, offset, number):
        ctypes.c_size_t.from_address(address + offset).value = number

    def status(pointer):
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        assert ctypes.c_uint32.from_address(address).value == 64
        ctypes.c_uint64.from_address(address + 32).value = room
        return "GlobalMemoryStatusEx" not in fails

    def performance(pointer, size):
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        assert ctypes.c_uint32.from_address(address).value == size == ctypes.sizeof(PerformanceInformation)
        for position, number in ((1, charge), (2, limit), (10, PAGE)):
            pages_at(address, position * POINTER_BYTES, number)
        return "GetPerformanceInfo" not in fails

    def enumerate_files(callback, context):
        for total, used in files:
            info = PageFileInformation(size=ctypes.sizeof(PageFileInformation), total_size=total, total_in_use=used)
            assert callback(context, ctypes.pointer(info), r"\Device\HarddiskVolume3\pagefile.sys")
        return "EnumPageFilesW" not in fails

    return SimpleNamespace(
        GlobalMemoryStatusEx=status, K32GetPerformanceInfo=performance, K32EnumPageFilesW=enumerate_files
    )


def test_counts_of_pages_become_bytes():
    assert commit(kernel32()) == Commit(3_000_000 * PAGE, 2_000_000 * PAGE, 5 * GB)


def test_page_files_are_added_up():
    assert page_files(kernel32(files=((1000, 400), (50, 50)))) == PageFiles(1050 * PAGE, 600 * PAGE)
    assert page_files(kernel32(files=())) == PageFiles(0, 0)


@pytest.mark.parametrize("function", ["GlobalMemoryStatusEx", "GetPerformanceInfo"])
def test_a_refusal_names_the_function(function):
    with pytest.raises(OSError, match=f"{function} failed with Windows error"):
        commit(kernel32(fails={function}))


def test_a_refusal_of_page_files_is_no_empty_list():
    with pytest.raises(OSError, match="EnumPageFilesW failed"):
        page_files(kernel32(fails={"EnumPageFilesW"}))


def test_only_windows_has_an_answer():
    commits, files = commit(), page_files()
    if sys.platform == "win32":
        assert 0 < commits.charge_bytes <= commits.limit_bytes
        assert 0 < commits.room_bytes <= commits.limit_bytes
        assert 0 <= files.free_bytes <= files.total_bytes
    else:
        assert (commits, files) == (None, None)
