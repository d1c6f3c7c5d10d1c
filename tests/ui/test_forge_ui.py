"""How Forge is told of the face: with its callbacks played by hand."""

import sys
import time
import types

import pytest
import torch

pytest.importorskip("fastapi", reason="needs fastapi (in the extra `test`)")
from support.face_server import Served
from support.standalone import Standalone
from ui.test_settings_section import HOST

from lib_lora_guard.hosts.webui import ui as forge_ui
from lib_lora_guard.hosts.webui.work import work_of_host
from lib_lora_guard.memory import HostMemory, take_snapshot
from lib_lora_guard.memory.allocator import AllocatorState, OptionState, Standing
from lib_lora_guard.memory.allocator_text import AllocatorWish
from lib_lora_guard.memory.nvml import GpuProcess, GpuProcesses
from lib_lora_guard.memory.paced_nvml import PacedNvml
from lib_lora_guard.messages import Message
from lib_lora_guard.planning.last_plan import LastPlan
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.reporting.status import as_json
from lib_lora_guard.runtime import status as forge_status
from lib_lora_guard.runtime.status import Work
from lib_lora_guard.settings import PREFIX, LoraMode, Settings
from lib_lora_guard.ui.route import PATH


class Callbacks:
    """Forge's modules.script_callbacks."""

    def __init__(self):
        self.tabs, self.started, self.pasted, self.before_ui = [], [], [], []

    def on_ui_tabs(self, callback):
        self.tabs.append(callback)

    def on_app_started(self, callback):
        self.started.append(callback)

    def on_infotext_pasted(self, callback):
        self.pasted.append(callback)

    def on_before_ui(self, callback):
        self.before_ui.append(callback)

    def remove_callbacks_for_function(self, callback):
        for known in (self.tabs, self.started, self.pasted, self.before_ui):
            known[:] = [c for c in known if c != callback]


class Options:
    """Forge's shared.opts."""

    def __init__(self):
        self.data, self.labels, self.localization = {}, {}, "None"

    def add_option(self, name, info):
        self.labels[name] = info
        self.data.setdefault(name, info.default)


class InForce:
    """What forge_options keeps."""

    def __init__(self, **values):
        self.settings, self.allocator, self.applied = Settings(**values), None, 0

    def mode(self):
        return self.settings.mode

    def apply(self):
        self.applied += 1


@pytest.fixture
def forge(monkeypatch):
    names = ("Radio", "Number", "Slider")
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(**{name: type(name, (), {}) for name in names}))

    def options_section(section, options):
        for info in options.values():
            info.section = section
        return options

    shared = types.SimpleNamespace(
        **vars(HOST), opts=Options(), options_section=options_section, cmd_opts=types.SimpleNamespace(api_auth=None)
    )
    modules = types.SimpleNamespace(script_callbacks=Callbacks(), shared=shared)
    monkeypatch.setitem(sys.modules, "modules", modules)
    return modules


def app():
    from fastapi import FastAPI

    return FastAPI()


def addresses(app):
    return [route.path for route in app.routes if route.path == PATH]


def test_settings_are_there_at_once_tab_and_address_when_asked_for(forge):
    options = InForce()
    forge_ui.register(options)
    labels = forge.shared.opts.labels
    assert labels[PREFIX + "mode"].section == ("lora_guard", "LoRA Guard", "sd")
    assert labels[PREFIX + "mode"].infotext == "LoRA Guard mode"
    labels[PREFIX + "mode"].onchange()
    assert options.applied == 1
    assert len(forge.script_callbacks.tabs) == len(forge.script_callbacks.started) == 1
    for demo in (object(), None):
        started = app()
        forge.script_callbacks.started[0](demo, started)
        assert addresses(started) == [PATH]


def test_a_second_execution_without_cleared_callbacks_adds_no_second_tab(forge):
    forge_ui.register(InForce())
    forge_ui.register(InForce())
    assert len(forge.script_callbacks.tabs) == len(forge.script_callbacks.before_ui) == 1
    (pasted,), fields = forge.script_callbacks.pasted, {"LoRA Guard": "fp16 LoRA, 120 bypass"}
    pasted("", fields)
    assert fields["LoRA Guard mode"] == "fp16 LoRA"
    started = app()
    for callback in forge.script_callbacks.started:
        callback(None, started)
    assert addresses(started) == [PATH]


def test_reload_ui_clears_the_callbacks_and_the_language_of_the_settings_follows(forge):
    forge_ui.register(InForce())
    assert forge.shared.opts.labels[PREFIX + "enable"].label == "Use LoRA Guard"
    forge.script_callbacks.tabs.clear()
    forge.shared.opts.data[PREFIX + "language"] = "zh"
    forge_ui.register(InForce())
    assert forge.shared.opts.labels[PREFIX + "enable"].label == "启用 LoRA Guard"
    forge.shared.opts.data[PREFIX + "language"] = "auto"
    forge.shared.opts.localization = "zh_CN"
    forge_ui.register(InForce())
    assert forge.shared.opts.labels[PREFIX + "enable"].label == "启用 LoRA Guard"


def test_an_api_with_a_password_and_no_web_ui_gets_no_address(forge):
    forge.shared.cmd_opts.api_auth = "me:secret"
    forge_ui.register(InForce())
    for demo, expected in ((None, []), (object(), [PATH])):
        started = app()
        forge.script_callbacks.started[0](demo, started)
        assert addresses(started) == expected


def test_where_the_guard_is_not_at_work_there_are_no_settings_and_the_tab_says_so(forge):
    forge_ui.register(None)
    assert forge.shared.opts.labels == {}
    started = app()
    forge.script_callbacks.started[0](None, started)
    with Served(started) as server:
        status = server.get(PATH)[2]["status"]
    assert status["headline"] == {"level": "bad", "text": "LoRA Guard is not in place here; the console says why."}
    assert status["enabled"] is False


def takeover(*reports, plan=None, **left_out):
    return types.SimpleNamespace(
        reports=lambda: reports,
        left_out=lambda: left_out,
        lora_sheets=lambda: {},
        device=lambda: torch.device("cpu"),
        last_plan=lambda: plan,
        snapshot=lambda nvml: take_snapshot(torch.device("cpu"), nvml),
    )


def state(**reasons):
    options = {name: OptionState(Standing.OFF, reason) for name, reason in reasons.items()}
    return AllocatorState(AllocatorWish(), "", **options, notes=(Message("allocator.new_memory"),))


def test_the_status_names_models_mode_memory_and_allocator():
    options = InForce(mode=LoraMode.MERGE)
    off = Message("allocator.off")
    options.allocator = state(
        expandable_segments=Message("allocator.proven"), max_split_size_mb=off, garbage_collection_threshold=off
    )
    models = [ApplyReport(name, [LoraReport("a", 1.0, used=1)], 0, 0, 1.0) for name in ("T5", "KModel")]
    told = as_json(forge_status.collect(takeover(*models, xl="made for SDXL"), options))
    assert [(lora["name"], lora["refused"]) for lora in told["loras"]] == [("a", None), ("xl", "made for SDXL")]
    assert [problem["text"] for problem in told["problems"]] == ["xl was left out: made for SDXL"]
    assert [model["class"] for model in told["models"]] == ["KModel", "T5"]
    assert told["mode"].startswith("Merge: LoRAs go into the weights")
    assert (told["enabled"], told["headline"]["level"]) == (True, "good")
    assert told["allocator"][:2] == [
        "Expandable segments: on, proven by an allocation",
        "Largest block that may be split, in MB: off",
    ]
    assert told["allocator"][3].startswith("applies to memory taken from now on")
    vram, ram = told["memory"]
    assert vram["total_mb"] is None
    assert vram["missing"].startswith("images are made on cpu; only CUDA and ROCm cards tell")
    assert 0 < ram["free_mb"] <= ram["total_mb"]
    assert ram["free_mb"] + sum(part["mb"] for part in ram["used"]) == pytest.approx(ram["total_mb"], abs=0.2)
    assert (ram["source"], told["step"], told["programs"]) == ("as told by: operating system", None, None)


def test_the_last_plan_is_what_a_step_takes():
    plan = LastPlan("KModel", 300 << 20, 200 << 20, 10 << 20, 50 << 20)
    told = as_json(forge_status.collect(takeover(plan=plan), InForce()))["step"]
    assert (told["model"], told["mb"], told["copied_mb"]) == ("image model", 260.0, 100.0)
    assert as_json(forge_status.collect(None, InForce()))["step"] is None


def test_the_numbers_are_those_of_the_takeovers_snapshot(monkeypatch):
    """One probe for all; NVML is asked with it and for the other programs."""
    asked = []

    class Library(PacedNvml):
        def memory(self, device):
            asked.append(device)
            return super().memory(device)

        def other_processes(self, device):
            asked.append(device)
            return GpuProcesses((GpuProcess(7, "game", 900 << 20),))

    told = as_json(forge_status.collect(takeover(), InForce(), forge_status.Machine(Library())))
    assert asked == [torch.device("cpu")] * 2
    assert told["programs"] == {
        "mb": 900.0,
        "largest": [
            {
                "name": "game",
                "about": None,
                "mb": 900.0,
                "source": "NVIDIA's management library (NVML)",
                "missing": None,
            }
        ],
        "more": False,
    }


def test_looking_is_not_what_starts_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("mem_get_info", "current_device", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("this starts CUDA"))
    there = takeover()
    there.device = torch.cuda.current_device
    for found in (there, None):
        vram = as_json(forge_status.collect(found, InForce()))["memory"][0]
        assert vram["missing"] == "CUDA has not been started yet, and asking would start it"


def test_a_machine_that_cannot_be_read_takes_nothing_else_away():
    there = takeover()

    def fails(nvml):
        raise RuntimeError("CUDA error: unspecified launch failure\nsecond line")

    there.snapshot = fails
    told = as_json(forge_status.collect(there, InForce()))
    missing = "memory could not be read (CUDA error: unspecified launch failure)"
    assert [figure["missing"] for figure in told["memory"]] == [missing] * 2
    assert told["enabled"] is True


def test_a_look_takes_less_than_a_millisecond():
    """Without NVML. The least of many: others work on this machine too."""
    machine, there, times = forge_status.Machine(), takeover(), []
    host = HostMemory()
    there.snapshot = lambda nvml: take_snapshot(torch.device("cpu"), nvml, host)
    for _ in range(60):
        start = time.perf_counter()
        machine.look(there)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.001


def test_a_reason_shared_by_all_allocator_options_is_said_once():
    same = Message("allocator.no_cuda", {"device": "cpu"})
    lines = forge_status.allocator_lines(
        state(expandable_segments=same, max_split_size_mb=same, garbage_collection_threshold=same)
    )
    assert lines[0].startswith("not available here: images are made on cpu")
    assert len(lines) == 2


def test_a_mode_that_comes_from_forges_own_dropdown_is_said_so():
    options = InForce()
    options.mode = lambda: LoraMode.FP16
    mode = forge_status.collect(takeover(), options).mode
    assert str(mode).startswith("fp16 LoRA, as chosen under “Diffusion in Low Bits”: LoRAs stay beside the weights")


def test_switched_off_by_the_user():
    told = as_json(forge_status.collect(None, InForce(enable=False)))
    assert told["mode"] == "switched off; Forge's own LoRA patcher is at work"
    assert (told["enabled"], told["headline"]["level"], told["models"]) == (False, "warning", [])
    assert told["headline"]["text"].startswith("LoRA Guard is switched off; Forge's own LoRA patcher is at work.")


def test_the_standalone_page_serves_its_files():
    import urllib.request

    with Served(Standalone().app) as server:
        for path, part in (
            ("/", "lora_guard_panel"),
            ("/style.css", ".lg-log"),
            ("/javascript/lora_guard.js", "fetch"),
        ):
            with urllib.request.urlopen(server.url + path, timeout=10) as answer:
                assert part in answer.read().decode()


def test_the_host_is_asked_for_its_steps_and_its_checkpoint(forge):
    assert work_of_host() == Work()
    forge.shared.state = types.SimpleNamespace(sampling_step=6, sampling_steps=30)
    forge.sd_models = types.SimpleNamespace(model_data=types.SimpleNamespace(sd_model=object()))
    assert work_of_host() == Work(None, (6, 30)), "no checkpoint is loaded yet"
    info = types.SimpleNamespace(name_for_extra="flux1-dev")
    forge.sd_models.model_data.sd_model = types.SimpleNamespace(sd_checkpoint_info=info)
    forge.shared.state.sampling_steps = 0
    assert work_of_host() == Work("flux1-dev", None)
