"""The measured numbers are never negative and never more than there is; the tightest of several limits counts."""

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

from lib_lora_guard.memory import Reading, give_back_cached_memory, is_out_of_memory, probe, take_snapshot
from lib_lora_guard.memory.control_groups import ControlGroups, Rooms
from lib_lora_guard.memory.probe import DISK_RESERVE_BYTES, BackupBudget, disk_spare_bytes, measure_budget

GB = 1 << 30
CPU = torch.device("cpu")
Ram = namedtuple("Ram", "available total")
Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def host(monkeypatch):
    """A host with 16 of 32 GB of RAM and 100 of 200 GB of disk free, in no control group."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Ram(16 * GB, 32 * GB))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(200 * GB, 100 * GB, 100 * GB))
    monkeypatch.setattr(probe, "_lies_in_ram", lambda folder: False)
    monkeypatch.setattr(ControlGroups, "rooms", lambda self, *_: Rooms(None, None))
    return monkeypatch


def test_a_budget_is_what_is_free_above_the_floors(host):
    assert measure_budget(CPU, 4 * GB) == BackupBudget(0, 12 * GB, 98 * GB)
    assert DISK_RESERVE_BYTES == 2 * GB


def test_a_budget_is_never_negative(host):
    host.setattr(shutil, "disk_usage", lambda folder: Disk(200 * GB, 199 * GB, 1 * GB))
    assert measure_budget(CPU, 20 * GB) == BackupBudget(0, 0, 0)


def test_available_ram_above_the_total_is_not_believed(host):
    host.setattr(psutil, "virtual_memory", lambda: Ram(100 * GB, 32 * GB))
    assert measure_budget(CPU, 0).ram_spare_bytes == 32 * GB


def test_a_control_group_that_leaves_less_than_the_machine_counts(host):
    host.setattr(ControlGroups, "rooms", lambda self, *_: Rooms(3 * GB, 9 * GB))
    assert measure_budget(CPU, GB).ram_spare_bytes == 2 * GB
    host.setattr(ControlGroups, "rooms", lambda self, *_: Rooms(1 << 62, 1 << 62))
    assert measure_budget(CPU, GB).ram_spare_bytes == 15 * GB


@pytest.mark.parametrize(
    ("free", "reserved", "active", "expected"),
    [(5, 4, 1, 8), (5, 1, 4, 5), (23, 20, 1, 24), (0, 0, 0, 0)],
    ids=["cache counts", "statistics that cross", "above the total", "none"],
)
def test_free_vram_is_the_drivers_and_what_torch_holds_unused(host, free, reserved, active, expected):
    host.setattr(torch.cuda, "is_available", lambda: True)
    host.setattr(torch.cuda, "mem_get_info", lambda device: (free * GB, 24 * GB))
    numbers = {"reserved_bytes": reserved, "active_bytes": active}
    statistics = {name: {"all": {"current": number * GB}} for name, number in numbers.items()}
    host.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: statistics)
    assert measure_budget(torch.device("cuda"), 0).vram_spare_bytes == expected * GB


def test_statistics_of_a_device_that_was_never_used_are_empty(host):
    host.setattr(torch.cuda, "is_available", lambda: True)
    host.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 24 * GB))
    host.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})
    assert measure_budget(torch.device("cuda"), 0).vram_spare_bytes == 5 * GB


def test_a_snapshot_that_is_there_is_taken_with_nvmls_number(host):
    """What Windows calls free and other programs hold is nobody's to spare."""
    taken = take_snapshot(CPU)
    seen = {
        "vram_total": 24,
        "vram_free": 20,
        "vram_free_nvml": 3,
        "vram_reserved": 5,
        "vram_active": 4,
        "ram_available": 9,
    }
    found = dataclasses.replace(taken, **{name: Reading(size * GB, "test") for name, size in seen.items()})
    assert measure_budget(CPU, GB, snapshot=found) == BackupBudget(4 * GB, 8 * GB, 98 * GB)
    assert measure_budget(CPU, 0).vram_spare_bytes == 0


def test_devices_that_share_the_ram_have_no_vram_to_spare(host):
    assert measure_budget(torch.device("mps"), 0).vram_spare_bytes == 0


def test_the_real_machine_gives_sane_numbers(tmp_path):
    budget = measure_budget(CPU, 0, tmp_path)
    assert 0 < budget.ram_spare_bytes <= psutil.virtual_memory().total
    assert 0 <= budget.disk_spare_bytes <= shutil.disk_usage(tmp_path).total


def test_a_folder_that_does_not_exist_yet_is_judged_by_the_one_above(host):
    seen = []
    host.setattr(shutil, "disk_usage", lambda folder: seen.append(folder) or Disk(9 * GB, 0, 9 * GB))
    here = Path(__file__).parent
    assert disk_spare_bytes(here / "no" / "such" / "folder") == 7 * GB
    assert seen == [here]


def test_a_folder_in_ram_spares_nothing(host):
    host.setattr(probe, "_lies_in_ram", lambda folder: True)
    assert disk_spare_bytes(Path(__file__).parent) == 0


def test_the_kind_of_disk_is_that_of_the_innermost_mount(tmp_path):
    (tmp_path / "ram" / "disk" / "deep").mkdir(parents=True)
    mounts = tmp_path / "mounts"
    place = tmp_path.resolve()
    lines = [
        "/dev/sda / ext4 rw 0 0",
        f"tmpfs {place / 'ram'} tmpfs rw 0 0",
        f"/dev/sdb {place / 'ram' / 'disk'} xfs rw 0 0",
        "short",
    ]
    mounts.write_text("\n".join(lines), encoding="utf-8")
    if " " in str(place):
        pytest.skip("this list writes spaces in another way")
    assert probe._lies_in_ram(tmp_path / "ram", mounts)
    assert not probe._lies_in_ram(tmp_path / "ram" / "disk" / "deep", mounts)
    assert not probe._lies_in_ram(tmp_path, mounts)
    assert not probe._lies_in_ram(tmp_path / "ram", tmp_path / "no list")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("planted"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
    ids=str,
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_torchs_own_cpu_allocator_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert is_out_of_memory(raised.value)
    give_back_cached_memory()
