"""NVML is asked about the right card, and whatever it does not tell is missing with the reason."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from support.fake_nvml import HIDDEN, INSUFFICIENT_SIZE, LOST, MB, NO_PERMISSION, NOT_SUPPORTED, Card, library

from lib_lora_guard.errors import LoraGuardError
from lib_lora_guard.memory import cuda_card, nvml
from lib_lora_guard.memory.cuda_card import which_card
from lib_lora_guard.memory.nvml import GpuProcess, Memory, Memory2, Nvml, ProcessInfo

CUDA = torch.device("cuda", 0)
ME = os.getpid()
ONE = cuda_card.Card(uuid="one")


def session(*cards, card_of=lambda device: ONE, pids_agree=True, **how):
    return Nvml(library(*cards, **how), card_of=card_of, pids_agree=pids_agree)


def reasons(memory):
    return {reading.missing and reading.missing.key for reading in vars(memory).values()}


def test_layouts_are_those_of_nvml_h():
    assert [ctypes.sizeof(s) for s in (Memory, Memory2, ProcessInfo)] == [24, 40, 24]
    assert [getattr(Memory2, n).offset for n, _ in Memory2._fields_] == [0, 8, 16, 24, 32]
    assert [getattr(ProcessInfo, n).offset for n, _ in ProcessInfo._fields_] == [0, 8, 16, 20]


def test_memory_is_what_the_driver_says():
    memory = session(Card(compute=[(ME, 5000), (77, 2000)])).memory(CUDA)
    assert (memory.total.bytes, memory.free.bytes) == (12288 * MB, 4000 * MB)
    assert memory.held.bytes == (12288 - 300 - 4000) * MB
    assert memory.ours.bytes == 5000 * MB
    assert memory.free.source == "NVIDIA's management library (NVML)"


def test_a_driver_before_510_does_not_tell_its_own_share_apart():
    memory = session(Card(), lacks={"nvmlDeviceGetMemoryInfo_v2"}).memory(CUDA)
    assert (memory.free.bytes, memory.held.bytes) == (4000 * MB, 8288 * MB)


def test_a_driver_that_refuses_the_second_version_is_asked_in_the_first():
    memory = session(Card(), fails={"nvmlDeviceGetMemoryInfo_v2": 25}).memory(CUDA)
    assert memory.held.bytes == 8288 * MB


@pytest.mark.parametrize(
    ("card", "name"),
    [
        (ONE, "GPU-one"),
        (ONE, "MIG-one"),
        (cuda_card.Card(pci_bus_id="0000:65:00.0"), "0000:65:00.0"),
    ],
    ids=["a whole card", "a slice of one", "an older torch"],
)
def test_the_card_is_found_by_what_torch_knows_of_it(card, name):
    nvml_session = session(Card(names=("GPU-other",), free=1), Card(names=(name,), free=2), card_of=lambda device: card)
    assert nvml_session.memory(CUDA).free.bytes == 2 * MB


def test_the_driver_and_the_slot_are_named():
    found = session(Card())
    assert (found.driver(), found.slot(CUDA)) == ("driver 555.42.02", "PCIe 4 x16")


@pytest.mark.parametrize("name", ["nvmlSystemGetDriverVersion", "nvmlDeviceGetMaxPcieLinkWidth"])
@pytest.mark.parametrize("how", ["lacks", "fails"])
def test_a_version_or_a_slot_that_the_driver_does_not_tell_is_left_out(name, how):
    found = session(Card(), **{how: {name: NOT_SUPPORTED}})
    told = {"nvmlSystemGetDriverVersion": found.driver(), "nvmlDeviceGetMaxPcieLinkWidth": found.slot(CUDA)}
    assert told.pop(name) == ""
    assert all(told.values())
    found.close()
    assert (found.driver(), found.slot(CUDA)) == ("", "")


def test_a_card_is_looked_up_once():
    calls = []
    nvml_session = session(Card(), calls=calls)
    for _ in range(3):
        nvml_session.memory(CUDA)
    assert [calls.count(name) for name in ("nvmlInit_v2", "nvmlDeviceGetHandleByUUID")] == [1, 1]
    assert calls.count("nvmlDeviceGetMemoryInfo_v2") == 3


def test_every_device_is_its_own_card():
    cards = {0: cuda_card.Card(uuid="b"), 1: cuda_card.Card(uuid="a")}
    nvml_session = session(
        Card(names=("GPU-a",), free=1), Card(names=("GPU-b",), free=2), card_of=lambda d: cards[d.index]
    )
    free = [nvml_session.memory(torch.device("cuda", index)).free.bytes for index in (0, 1)]
    assert free == [2 * MB, 1 * MB]


def test_a_process_in_both_lists_counts_once_with_what_is_known():
    card = Card(compute=[(ME, 5000), (8, HIDDEN)], graphics=[(ME, 4900), (9, 100), (8, 70)])
    assert session(card).memory(CUDA).ours.bytes == 5000 * MB
    others = session(card).other_processes(CUDA)
    assert [(p.pid, p.bytes) for p in others.processes] == [(9, 100 * MB), (8, 70 * MB)]


def test_windows_hides_what_each_program_holds():
    card = Card(compute=[(ME, HIDDEN)], graphics=[(3, HIDDEN), (ME, HIDDEN)])
    memory = session(card).memory(CUDA)
    assert (memory.ours.bytes, memory.ours.missing.key) == (None, "readings.nvml_hidden")
    assert memory.free.bytes == 4000 * MB, "the other numbers are there"
    assert [(p.pid, p.bytes) for p in session(card).other_processes(CUDA).processes] == [(3, None)]


def test_more_than_the_card_has_is_no_number():
    assert session(Card(compute=[(ME, 12289)])).memory(CUDA).ours.missing.key == "readings.nvml_hidden"


def test_a_process_that_is_not_listed_holds_an_unknown_number():
    assert session(Card(compute=[(ME + 1, 5)])).memory(CUDA).ours.missing.key == "readings.nvml_not_listed"


def test_numbers_of_processes_outside_a_container_are_not_ours():
    nvml_session = session(Card(compute=[(ME, 5000)]), pids_agree=False)
    assert nvml_session.memory(CUDA).ours.missing.key == "readings.nvml_other_pids"
    assert nvml_session.other_processes(CUDA).missing.key == "readings.nvml_other_pids"


def test_many_processes_make_the_list_longer():
    card = Card(compute=[(ME + 1 + n, n) for n in range(200)])
    others = session(card).other_processes(CUDA).processes
    assert len(others) == 200
    assert (others[0].pid, others[0].bytes) == (ME + 200, 199 * MB)


def test_a_list_that_never_fits_is_missing():
    name = "nvmlDeviceGetComputeRunningProcesses_v3"
    nvml_session = session(Card(), fails={name: INSUFFICIENT_SIZE})
    assert nvml_session.other_processes(CUDA).missing == f"NVML refused to say ({name}: error 7)"


def test_an_older_driver_lists_processes_under_an_older_name():
    lacks = {f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in ("Compute", "Graphics")}
    assert session(Card(compute=[(ME, 7)]), lacks=lacks).memory(CUDA).ours.bytes == 7 * MB
    lacks |= {name[:-1] + "2" for name in lacks}
    memory = session(Card(compute=[(ME, 7)]), lacks=lacks).memory(CUDA)
    assert memory.free.bytes == 4000 * MB
    assert memory.ours.missing == (
        "the NVIDIA driver is too old: its NVML lacks nvmlDeviceGetComputeRunningProcesses_v2"
    )


def test_programs_have_their_names(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = session(Card(graphics=[(child.pid, 900)])).other_processes(CUDA)
        assert found == nvml.GpuProcesses((GpuProcess(child.pid, psutil.Process(child.pid).name(), 900 * MB),))
        assert "python" in found.processes[0].name.lower()
    finally:
        child.communicate(b"\n")
    ended = session(Card(graphics=[(child.pid, 900)])).other_processes(CUDA)
    assert ended.processes == (GpuProcess(child.pid, "", 900 * MB),)


@pytest.mark.parametrize(
    ("code", "key"),
    [(9, "nvml_no_driver"), (18, "nvml_driver_changed"), (17, "nvml_blocked"), (999, "nvml_refused")],
)
def test_a_library_that_does_not_start_says_why(code, key):
    calls = []
    nvml_session = session(Card(), fails={"nvmlInit_v2": code}, calls=calls)
    assert nvml_session.missing.key == f"readings.{key}"
    assert reasons(nvml_session.memory(CUDA)) == {f"readings.{key}"}
    assert nvml_session.other_processes(CUDA).missing is nvml_session.missing
    nvml_session.close()
    assert calls == ["nvmlInit_v2"]


@pytest.mark.parametrize(
    ("function", "code", "key"),
    [
        ("nvmlDeviceGetHandleByUUID", NO_PERMISSION, "nvml_no_permission"),
        ("nvmlDeviceGetMemoryInfo", LOST, "nvml_card_lost"),
        ("nvmlDeviceGetMemoryInfo", NOT_SUPPORTED, "nvml_not_supported"),
    ],
)
def test_a_question_that_fails_is_missing_with_the_reason(function, code, key):
    nvml_session = session(Card(), fails={function: code, "nvmlDeviceGetMemoryInfo_v2": code})
    assert reasons(nvml_session.memory(CUDA)) == {f"readings.{key}"}


def test_a_card_that_nvml_does_not_know_is_not_another_one():
    nvml_session = session(Card(names=("GPU-other",)))
    assert reasons(nvml_session.memory(CUDA)) == {"readings.nvml_not_found"}
    assert nvml_session.other_processes(CUDA).missing.key == "readings.nvml_not_found"


def test_after_the_end_nothing_is_asked():
    calls = []
    nvml_session = session(Card(), calls=calls)
    nvml_session.close()
    nvml_session.close()
    assert reasons(nvml_session.memory(CUDA)) == {"readings.nvml_closed"}
    assert calls == ["nvmlInit_v2", "nvmlShutdown"]


def test_without_the_library_everything_is_missing(monkeypatch):
    monkeypatch.setattr(nvml, "_load", lambda places: None)
    assert reasons(Nvml().memory(CUDA)) == {"readings.nvml_absent"}


def test_this_machine_has_an_answer_or_a_reason():
    """On a machine with an NVIDIA card, the real library; elsewhere the reason."""
    if torch.cuda.is_available():
        torch.cuda.init()
        held = torch.ones(64 * MB, dtype=torch.uint8, device=CUDA)
    nvml_session = Nvml()
    memory, others = nvml_session.memory(CUDA), nvml_session.other_processes(CUDA)
    nvml_session.close()
    if memory.free.missing is not None:
        assert not torch.cuda.is_available() or torch.version.hip
        assert memory.total.bytes is memory.held.bytes is memory.ours.bytes is None
        assert others.missing is not None
        return
    free, total = torch.cuda.mem_get_info(CUDA)
    assert 0 < memory.free.bytes <= memory.total.bytes
    # NVML counts what the driver sets aside, about 1 % of the card; torch's total is without it.
    assert total <= memory.total.bytes <= total * 1.05
    assert memory.held.bytes >= held.numel()
    if platform.system() == "Linux":
        # On Windows the two may differ by what other programs hold.
        assert abs(free - memory.free.bytes) < 256 * MB
    if memory.ours.bytes is not None:
        assert held.numel() <= memory.ours.bytes <= memory.held.bytes


def test_on_windows_only_full_paths_are_tried():
    places = nvml._library_paths("Windows", {"SystemRoot": r"D:\Win", "ProgramW6432": r"D:\Programs"})
    assert [place.replace("/", "\\") for place in places] == [
        r"D:\Win\System32\nvml.dll",
        r"D:\Programs\NVIDIA Corporation\NVSMI\nvml.dll",
    ]
    assert [place.replace("/", "\\") for place in nvml._library_paths("Windows", {})] == [
        r"C:\Windows\System32\nvml.dll"
    ]
    assert nvml._library_paths("Linux", {})[0] == "libnvidia-ml.so.1"
    assert nvml._library_paths("Darwin", {}) == []


def test_a_file_that_is_no_library_is_passed_over(tmp_path):
    broken = tmp_path / "libnvidia-ml.so.1"
    broken.write_bytes(b"nothing")
    assert nvml._load([str(tmp_path / "missing.so"), str(broken)]) is None


@pytest.fixture
def cuda(monkeypatch):
    """A torch with CUDA started on device 1 of two."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return monkeypatch


def driver(code=0):
    def pci_bus_id(text, length, index):
        text.value = b"0000:%02x:00.0" % (64 + index)
        assert length >= 13
        return code

    return SimpleNamespace(cuDeviceGetPCIBusId=pci_bus_id)


def test_torch_says_which_card_a_device_is(cuda):
    uuids = ["aaaa", "bbbb"]
    cuda.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    assert which_card(CUDA).uuid == "aaaa"
    assert which_card(torch.device("cuda")).uuid == "bbbb"


def test_before_torch_2_4_the_cuda_driver_says_it(cuda):
    cuda.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    assert which_card(torch.device("cuda"), driver()) == cuda_card.Card(pci_bus_id="0000:41:00.0")
    with pytest.raises(LoraGuardError, match=r"cannot be told \(cuDeviceGetPCIBusId: CUDA 101\)"):
        which_card(CUDA, driver(101))
    with pytest.raises(LoraGuardError, match="cannot be told"):
        which_card(CUDA, SimpleNamespace())


def test_a_device_that_is_not_there_is_no_card(cuda):
    def invalid(index):
        raise AssertionError("Invalid device id")

    cuda.setattr(torch.cuda, "get_device_properties", invalid)
    with pytest.raises(LoraGuardError, match="Invalid device id"):
        which_card(CUDA)


def test_asking_which_card_does_not_start_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: pytest.fail("this starts CUDA"))
    nvml_session = Nvml(library(Card()))
    assert reasons(nvml_session.memory(CUDA)) == {"readings.cuda_not_started"}
    assert reasons(nvml_session.memory(torch.device("cpu"))) == {"readings.not_cuda"}


def test_the_first_card_is_named_without_torch():
    assert session(Card(total=12288, free=4000)).first_card() == ("NVIDIA GeForce RTX 3060", 12288 * MB, 4000 * MB)
    assert session().first_card() is None
    assert session(Card(), lacks=["nvmlDeviceGetName"]).first_card() is None
    closed = session(Card())
    closed.close()
    assert closed.first_card() is None


def test_process_numbers_agree_only_outside_containers(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[4026531836]", raising=False)
    assert nvml._pids_agree()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[4026532201]", raising=False)
    assert not nvml._pids_agree()
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert nvml._pids_agree()
