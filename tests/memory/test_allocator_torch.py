"""The allocator's functions in torch: which one is called, what a probe proves, and a cap that stays."""

import pytest
import torch
from memory.allocator_double import CUDA

from lib_lora_guard.memory import allocator_torch
from lib_lora_guard.memory.allocator_machine import look


@pytest.fixture
def memory(monkeypatch):
    """A card whose allocator serves probes from the segments given, one per stream."""
    served, known = [], []

    class Probe:
        def __init__(self, address):
            self.data_ptr = lambda: address

    def empty(*_, **__):
        segment = served.pop(0)
        known.append(segment)
        return Probe(segment["address"] + 512)

    class Nothing:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Stream", Nothing)
    monkeypatch.setattr(torch.cuda, "stream", Nothing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": list(known)})
    return served, known


def segment(address, expandable):
    return {"address": address, "total_size": 2 << 20, "is_expandable": expandable}


def test_only_fresh_memory_proves_anything(memory):
    served, known = memory
    probe = allocator_torch.TorchAllocator().takes_expandable
    served[:] = [segment(0, True)]
    assert probe(CUDA) is True
    served[:] = [segment(4 << 20, False)]
    assert probe(CUDA) is False
    old = segment(8 << 20, False)
    known.append(old)
    served[:] = [old, segment(12 << 20, True)]
    assert probe(CUDA) is True
    served[:] = [old] * 4
    assert probe(CUDA) is None


def test_cudas_own_setter_goes_first(monkeypatch):
    told = []
    for name in allocator_torch._SETTERS:
        monkeypatch.delattr(torch._C, name, raising=False)
    for name in reversed(allocator_torch._SETTERS):
        monkeypatch.setattr(torch._C, name, lambda text, name=name: told.append((name, text)), raising=False)
        allocator_torch.TorchAllocator().write("a:1")
    assert told[-1] == ("_cuda_cudaCachingAllocator_set_allocator_settings", "a:1")
    for name in allocator_torch._SETTERS:
        monkeypatch.delattr(torch._C, name)
    assert look(torch.device("cpu")).can_set is False
    with pytest.raises(RuntimeError, match="no function for allocator settings"):
        allocator_torch.TorchAllocator().write("a:1")


@pytest.mark.parametrize(("fraction", "set_to"), [(1.0, [0.99]), (0.99, []), (0.5, []), (None, [0.99])])
def test_a_lower_cap_stays(monkeypatch, fraction, set_to):
    caps = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: caps.append(part))
    if fraction is None:
        monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction", raising=False)
    else:
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction, raising=False)
    allocator_torch.TorchAllocator().cap_near_whole_card(CUDA)
    assert caps == set_to
