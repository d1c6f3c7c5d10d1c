import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_lora_guard import large_pages
from lib_lora_guard.files import open_header, read_tensors
from lib_lora_guard.runtime import ram_copies
from lib_lora_guard.units import MB

HAS_LARGE_PAGES = sys.platform.startswith("linux") and Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
with_large_pages = pytest.mark.skipif(not HAS_LARGE_PAGES, reason="this system has none")


def is_asked_for(tensor, offset=0):
    """Tells whether the kernel knows that large pages are wanted under a place in a tensor."""
    address, is_there = tensor.data_ptr() + offset, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= address < int(found[2], 16)
        elif is_there and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the memory is not in the list")


def new(size):
    return torch.empty(size, dtype=torch.uint8)


@with_large_pages
def test_large_pages_are_asked_for_under_all_whole_pages():
    memory = new(40 * MB)
    assert not is_asked_for(memory, 20 * MB)
    assert large_pages.ask(memory.data_ptr(), memory.numel())
    assert is_asked_for(memory, 20 * MB)
    assert is_asked_for(memory, 38 * MB)
    assert not is_asked_for(memory, 40 * MB - 1) or (memory.data_ptr() + 40 * MB) % large_pages.PAGE_BYTES == 0
    memory.fill_(7)
    assert memory.sum(dtype=torch.int64).item() == 7 * 40 * MB


def test_nothing_is_asked_for_small_memory_or_when_it_is_switched_off(monkeypatch):
    asked = []
    monkeypatch.setattr(large_pages, "_madvise", lambda: lambda *given: asked.append(given) or 0)
    memory = new(33 * MB)
    assert not large_pages.ask(memory.data_ptr(), 32 * MB - 1)
    assert large_pages.ask(memory.data_ptr(), 32 * MB)
    monkeypatch.setenv("LORA_GUARD_LARGE_PAGES", "0")
    assert not large_pages.ask(memory.data_ptr(), 32 * MB)
    assert len(asked) == 1


@pytest.mark.parametrize(("offset", "pages"), [(0, 16), (4096, 15), (2 * MB - 4096, 15)])
def test_only_whole_pages_are_named(monkeypatch, offset, pages):
    asked = []
    monkeypatch.setattr(large_pages, "_madvise", lambda: lambda *given: asked.append(given) or 0)
    large_pages.ask(64 * MB + offset, 32 * MB)
    ((start, size, _),) = asked
    assert start % (2 * MB) == 0
    assert size == pages * 2 * MB
    assert 64 * MB + offset <= start
    assert start + size <= 64 * MB + offset + 32 * MB


def test_a_refusal_or_another_system_changes_nothing(monkeypatch):
    memory = new(33 * MB)
    monkeypatch.setattr(large_pages, "_madvise", lambda: lambda *given: -1)
    assert not large_pages.ask(memory.data_ptr(), memory.numel())
    monkeypatch.undo()
    large_pages._madvise.cache_clear()
    monkeypatch.setattr(large_pages.sys, "platform", "win32")
    try:
        assert not large_pages.ask(memory.data_ptr(), memory.numel())
    finally:
        large_pages._madvise.cache_clear()


@with_large_pages
def test_the_memory_of_a_large_file_and_of_a_copy_has_them(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(10 * MB, dtype=torch.int32)}, path)
    (tensor,) = read_tensors(open_header(path)).values()
    assert is_asked_for(tensor, 20 * MB)
    assert torch.equal(tensor, torch.arange(10 * MB, dtype=torch.int32))
    assert is_asked_for(ram_copies._zeroed(40 * MB), 20 * MB)
