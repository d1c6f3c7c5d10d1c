"""The allocator options that a machine and its torch can have."""

import pytest
import torch
from memory.allocator_double import ACTIVE, CUDA, LINUX, MISSING, ON, WINDOWS, FakeTorch, standings, tell

from lib_lora_guard.memory.allocator import apply
from lib_lora_guard.memory.allocator_machine import Machine, availability, look
from lib_lora_guard.memory.allocator_text import COLLECT, EXPANDABLE, OPTIONS, SPLIT, AllocatorWish


@pytest.mark.parametrize("device", ["CPU", "MPS", "DirectML", "XPU"])
def test_without_cuda_there_is_nothing(device):
    state = tell(None, AllocatorWish(True, 64, 0.8), machine=Machine(device, (2, 12), backend="", can_set=False))
    assert standings(state) == [MISSING] * 3
    assert str(state.expandable_segments.reason).startswith(f"not available here: images are made on {device}")
    assert state.text == ""


@pytest.mark.parametrize(
    ("machine", "key"),
    [
        (Machine("cuda", (2, 12), backend="cudaMallocAsync"), "allocator.backend"),
        (WINDOWS, "allocator.windows"),
        (Machine("cuda", (2, 13), system="Windows"), "allocator.windows"),
        (Machine("cuda", (2, 12), wsl=True), "allocator.wsl"),
        (Machine("cuda", (2, 12), tegra=True), "allocator.tegra"),
        (Machine("cuda", (2, 12), rocm=True), "allocator.rocm"),
        (Machine("cuda", (2, 12), rocm=True, system="Windows"), "allocator.rocm"),
    ],
)
def test_why_there_are_no_expandable_segments(machine, key):
    found = availability(machine)
    assert found[EXPANDABLE].key == key
    assert (found[SPLIT] is None and found[COLLECT] is None) == (machine.backend == "native")
    fake = FakeTorch()
    state = tell(fake, AllocatorWish(True, 64, 0.8), machine=machine)
    assert state.expandable_segments.reason.key == key
    if machine.backend == "native":
        assert standings(state) == [MISSING, ACTIVE, ACTIVE]
        assert fake.writes == ["max_split_size_mb:64,garbage_collection_threshold:0.8,expandable_segments:False"]
    else:
        assert standings(state) == [MISSING] * 3
        assert fake.writes == []
    assert fake.probes == 0


def test_linux_and_new_windows_may_try():
    assert availability(LINUX) == availability(Machine("cuda", (2, 14), system="Windows")) == dict.fromkeys(OPTIONS)


def test_this_machine_says_what_it_is():
    machine = look(torch.device("cpu"))
    assert (machine.device, machine.backend) == ("CPU", "")
    assert machine.torch_version == tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert look(torch.device("mps")).device == "MPS"
    assert look(torch.device("privateuseone")).device == "DirectML"
    if not torch.cuda.is_available():
        assert look(CUDA).device == "CPU"
        state = apply(ON, {}, CUDA)
        assert standings(state) == [MISSING] * 3
        assert "made on CPU" in str(state.expandable_segments.reason)
