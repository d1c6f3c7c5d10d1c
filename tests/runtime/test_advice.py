"""The advice when memory ended, which never hides why."""

import logging
import types

import pytest
import torch
from safetensors.torch import save_file

from lib_lora_guard.errors import LayerError, MemoryShortError
from lib_lora_guard.hosts.webui.checkpoint_reading import CheckpointReading
from lib_lora_guard.hosts.webui.images import Images
from lib_lora_guard.memory.nvml import GpuProcess, GpuProcesses
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.runtime import advice as forge_advice
from lib_lora_guard.runtime.advice import Advice
from lib_lora_guard.runtime.precautions import Precautions
from lib_lora_guard.runtime.preflight import Preflight

MB, GB = 1 << 20, 1 << 30
CARD = torch.device("cuda", 0)


class Nvml:
    def __init__(self, *processes):
        self.processes = tuple(GpuProcess(number, name, size) for number, (name, size) in enumerate(processes))

    def other_processes(self, device):
        assert device == CARD
        return GpuProcesses(self.processes)

    def close(self):
        pass


def report(model, **loras):
    found = [LoraReport(f"{name}.safetensors", 1.0, bytes=size) for name, size in loras.items()]
    return ApplyReport(model=model, loras=found, device="cuda", device_bytes=0, ram_bytes=0, milliseconds=0.0)


def model():
    """One matrix of 4 GB in bf16."""
    found = torch.nn.Module()
    found.weight = torch.nn.Parameter(torch.empty(1 << 16, 1 << 15, dtype=torch.bfloat16, device="meta"), False)
    return found


def advice(reports=(), nvml=None, total=12 * GB):
    memory = types.SimpleNamespace(get_total_memory=lambda device: total)
    return Advice(memory, lambda: reports, lambda: nvml or Nvml())


def step(width, height):
    return width * height * 4096


def picture(advise, size=(1024, 1024), needs=step, device=CARD):
    return [str(line) for line in advise.for_image(model(), device, needs, size)]


def test_everything_with_numbers():
    reports = (report("KModel", style=600 * MB, face=100 * MB), report("JointTextEncoder", style=140 * MB))
    found = picture(advice(reports, Nvml(("chrome.exe", 300 * MB), ("game.exe", 900 * MB)), total=8 * GB))
    assert found == [
        "a picture of 768x768 needs 1.8 GB less",
        "leaving out style.safetensors saves 0.7 GB",
        "the model in another format, of your 8.0 GB: GGUF Q8_0 needs 6.1 GB, NF4 needs 5.1 GB",
        "closing other programs, which hold 1200 MB of VRAM: chrome.exe, game.exe",
    ]


def test_nothing_to_gain_is_nothing_said():
    reports = (report("KModel", style=10 * MB),)
    assert picture(advice(reports, Nvml(("desktop", 255 * MB)), total=GB), size=(512, 512)) == []
    assert picture(advice(total=8 * GB), size=(512, 512), device=torch.device("cpu")) == []


def test_programs_whose_memory_windows_hides_are_named_there_alone(monkeypatch):
    nvml = Nvml(("game.exe", None), ("game.exe", None))
    monkeypatch.setattr(forge_advice.platform, "system", lambda: "Windows")
    assert picture(advice(nvml=nvml, total=GB), size=(512, 512)) == [
        "closing other programs that use the card: game.exe"
    ]
    monkeypatch.setattr(forge_advice.platform, "system", lambda: "Linux")
    assert picture(advice(nvml=nvml, total=GB), size=(512, 512)) == []


class Processing:
    """Of a request for a picture."""

    width = height = 1024
    batch_size = 2

    def __init__(self):
        self.asked = []
        unet = types.SimpleNamespace(model=model(), load_device=CARD, memory_required=self.required)
        self.sd_model = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet))

    def required(self, shape):
        self.asked.append(shape)
        return shape[0] * shape[2] * shape[3] * 100_000


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "error",
    [
        LayerError("no memory left for the LoRA of this layer"),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_image_that_ended_for_memory_says_what_helps_and_the_error_goes_on(error, lines):
    def fails(p):
        raise error

    p = Processing()
    with pytest.raises(type(error)) as raised:
        Images(advice(total=8 * GB)).process_images_inner(fails, p)
    assert raised.value is error
    assert p.asked[0] == [4, 4, 128, 128]
    assert len(lines()) == 1
    assert lines()[0].startswith(
        "memory ended. What would help: a picture of 768x768 needs 2.7 GB less; the model in another format"
    )


def test_the_second_pass_is_advised_by_its_own_size(lines):
    p = Processing()
    p.is_hr_pass, p.hr_upscale_to_x, p.hr_upscale_to_y = True, 2048, 2048

    def fails(p):
        raise MemoryError

    with pytest.raises(MemoryError):
        Images(advice()).process_images_inner(fails, p)
    assert p.asked[0] == [4, 4, 256, 256]
    assert "a picture of 1536x1536" in lines()[0]


def test_other_errors_and_other_hosts_say_nothing(lines):
    def fails(p):
        raise ValueError("prompt")

    with pytest.raises(ValueError, match="prompt"):
        Images(advice()).process_images_inner(fails, Processing())

    def ends(p):
        raise MemoryError("first")

    with pytest.raises(MemoryError, match="first"):
        Images(advice()).process_images_inner(ends, object())
    assert lines() == []
    assert Images(advice()).process_images_inner(lambda p, more: (p, more), 1, more=2) == (1, 2)


def test_a_file_that_ram_cannot_take_is_refused_with_the_formats_that_fit(tmp_path):
    path, other = tmp_path / "flux.safetensors", tmp_path / "vae.safetensors"
    save_file({"a.weight": torch.zeros(1024, 1024, dtype=torch.float16), "b": torch.zeros(8)}, str(path))
    save_file({"v": torch.zeros(16)}, str(other))
    room = 1024 * 1024 - 1

    class Ram:
        alive_ram_bytes = room

        def fast_ram_bytes(self, floor_bytes):
            return room

    preflight = Preflight(Ram, lambda: 0, lambda finding: None, Precautions(lambda model: ()))
    reading = CheckpointReading(preflight, advice().for_files)
    with pytest.raises(MemoryShortError) as refused:
        reading.before_reading(lambda *files: None, str(path), [str(other)])
    needed = (path.stat().st_size + other.stat().st_size) / MB
    assert str(refused.value).startswith(
        f"LG-R08: reading flux.safetensors, vae.safetensors needs {needed:.0f} MB of RAM"
    )
    # fp8 and Q8_0 are too large by a few KB.
    helps = "What would help: the model in another format, of your 0.0 GB: GGUF Q6_K needs 0.0 GB, NF4 needs 0.0 GB"
    assert str(refused.value).endswith(f"or use a smaller model file. {helps}")
    assert refused.value.__cause__ is None


def test_files_that_cannot_be_read_or_are_small_already_are_no_advice(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"PK" + bytes(100))
    packed = tmp_path / "nf4.safetensors"
    save_file({"a.weight": torch.zeros(512, 1, dtype=torch.uint8)}, str(packed))
    assert advice().for_files([broken], GB) == []
    assert advice().for_files([packed], GB) == []
    assert advice().for_files([], GB) == []
