"""NVML for those who ask often: at most once a second, opened late, one at a time, and what is missing stays said."""

import threading

import torch
from support.fake_nvml import Card, library
from support.machine_speed import CpuTime

from lib_lora_guard.memory import Nvml, take_snapshot
from lib_lora_guard.memory.cuda_card import Card as CudaCard
from lib_lora_guard.memory.paced_nvml import BETWEEN_SECONDS, PacedNvml

CUDA = torch.device("cuda", 0)
MB = 1 << 20


class Scene:
    def __init__(self, **how):
        self.card, self.calls, self.opened, self.now = Card(free=4000, compute=[(1, 700)]), [], 0, 100.0
        self.how = how
        self.nvml = PacedNvml(self._open, lambda: self.now)

    def _open(self):
        self.opened += 1
        found = library(self.card, calls=self.calls, **self.how)
        return Nvml(found, card_of=lambda device: CudaCard(uuid="one"), pids_agree=True)

    def free_mb(self):
        return self.nvml.memory(CUDA).free.bytes / MB


def test_nvml_is_opened_by_the_first_question():
    scene = Scene()
    assert scene.opened == 0
    assert scene.free_mb() == 4000
    assert scene.opened == 1


def test_an_answer_is_kept_for_a_second():
    scene = Scene()
    scene.free_mb()
    scene.card.free, before = 1000 * MB, len(scene.calls)
    scene.now += BETWEEN_SECONDS - 0.01
    assert (scene.free_mb(), len(scene.calls)) == (4000, before)
    scene.now += 0.01
    assert scene.free_mb() == 1000
    assert len(scene.calls) > before
    assert scene.opened == 1


def test_memory_and_processes_are_kept_apart():
    scene = Scene()
    scene.free_mb()
    assert [process.bytes for process in scene.nvml.other_processes(CUDA).processes] == [700 * MB]
    scene.card.lists["Compute"] = []
    assert scene.nvml.other_processes(CUDA).processes != ()
    scene.now += BETWEEN_SECONDS
    assert scene.nvml.other_processes(CUDA).processes == ()


def test_a_missing_driver_is_reported_and_asked_for_once():
    scene = Scene(fails={"nvmlInit_v2": 9})
    for _ in range(3):
        assert scene.nvml.memory(CUDA).free.missing == "NVIDIA's driver is not loaded"
        assert scene.nvml.missing == "NVIDIA's driver is not loaded"
    assert scene.calls == ["nvmlInit_v2"]


def test_a_snapshot_takes_it_as_any_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9000 * MB, 12288 * MB))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})
    scene = Scene()
    assert take_snapshot(CUDA, scene.nvml).usable_vram_bytes == 4000 * MB


def test_several_threads_ask_once():
    scene, answers = Scene(), []
    threads = [threading.Thread(target=lambda: answers.append(scene.free_mb())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (answers, scene.opened) == ([4000.0] * 8, 1)
    assert scene.calls.count("nvmlDeviceGetMemoryInfo_v2") == 1


def test_a_closed_nvml_session_is_not_asked_again():
    scene = Scene()
    scene.free_mb()
    scene.nvml.close()
    assert scene.nvml.memory(CUDA).free.missing == "NVML is no longer asked"
    PacedNvml().close()


def test_a_kept_answer_costs_microseconds():
    scene = Scene()
    scene.free_mb()
    with CpuTime(0.1):
        for _ in range(1000):
            scene.nvml.memory(CUDA)
