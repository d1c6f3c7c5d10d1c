"""The lines on a picture's LoRAs in its infotext."""

import sys
import types

import pytest

from lib_lora_guard.hosts.forge.takeover import ForgeTakeover
from lib_lora_guard.planning.mode import Choice, Mode
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.runtime import installed
from lib_lora_guard.runtime.image_words import ImageWords
from lib_lora_guard.runtime.live_settings import LiveSettings
from lib_lora_guard.settings import LoraMode


@pytest.fixture
def script(monkeypatch):
    """The module, in a WebUI that has no more than it needs."""
    modules, scripts = types.ModuleType("modules"), types.ModuleType("modules.scripts")
    scripts.Script, scripts.AlwaysVisible = object, object()
    modules.scripts = scripts
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.scripts", scripts)
    monkeypatch.delitem(sys.modules, "lib_lora_guard.hosts.webui.script", raising=False)
    import lib_lora_guard.hosts.webui.script as module

    yield module
    monkeypatch.delitem(sys.modules, "lib_lora_guard.hosts.webui.script", raising=False)


def report(*loras):
    return ApplyReport("KModel", list(loras), 0, 0, 1.0)


def applied(label, bypass, merge=0):
    lora = LoraReport(label, 1.0)
    for _ in range(bypass):
        lora.count(Choice(Mode.BYPASS, "low rank"))
    for _ in range(merge):
        lora.count(Choice(Mode.MERGE, "small parameter"))
    return lora


def image(objects):
    return types.SimpleNamespace(
        sd_model=types.SimpleNamespace(forge_objects_after_applying_lora=objects), extra_generation_params={}
    )


def test_mode_ways_and_what_is_missing(script, monkeypatch):
    unet, text = object(), object()
    reports = {
        id(unet): report(applied("a.safetensors", 300, 4), LoraReport("bad.safetensors", 1.0, refused="broken")),
        id(text): report(applied("a.safetensors", 72)),
    }
    takeover = object.__new__(ForgeTakeover)
    takeover.settings = LiveSettings({"lora_guard_mode": LoraMode.FP16.value})
    takeover.stacks = types.SimpleNamespace(
        report=lambda loader: reports.get(id(loader)),
        is_reported=lambda patcher: patcher.encodes_this_prompt,
        tell_of_slow_layers=lambda: None,
    )
    takeover.files = types.SimpleNamespace(left_out={"other.safetensors": "why"}, missing={"gone": "why"})
    takeover.web = types.SimpleNamespace(schedules=types.SimpleNamespace(left_out={}))
    takeover.words = ImageWords()
    monkeypatch.setattr(installed, "installed", lambda: takeover)
    clip = types.SimpleNamespace(patcher=types.SimpleNamespace(lora_loader=text, encodes_this_prompt=True))
    p = image(types.SimpleNamespace(unet=types.SimpleNamespace(lora_loader=unet), clip=clip))
    guard_script = script.LoraGuardScript()
    guard_script.postprocess_batch(p)
    assert p.extra_generation_params == {
        "LoRA Guard mode": "fp16 LoRA",
        "LoRA Guard": "fp16 LoRA, 372 bypass, 4 merge, without bad.safetensors, gone, other.safetensors",
    }
    clip.patcher.encodes_this_prompt = False
    guard_script.postprocess_batch(p)
    assert p.extra_generation_params["LoRA Guard"].startswith("fp16 LoRA, 300 bypass, 4 merge"), "of another image"
    reports.clear()
    takeover.files.left_out, takeover.files.missing = {}, {}
    guard_script.postprocess_batch(p)
    assert p.extra_generation_params == {}, "the next image of the batch has no LoRA"
    takeover.settings.options = {"lora_guard_mode": LoraMode.OWN.value}
    p.extra_network_data = {"lora": ["a tag"]}
    guard_script.postprocess_batch(p)
    assert p.extra_generation_params == {"LoRA Guard mode": "Forge's own"}, "the host has applied it"
    takeover.settings.options = {}
    reports[id(unet)] = report(applied("a.safetensors", 300))
    guard_script.postprocess_batch(p)
    assert p.extra_generation_params == {"LoRA Guard": "Automatic, 300 bypass"}, "the usual mode is no field"
    assert guard_script.show(False) is script.scripts.AlwaysVisible
    monkeypatch.setattr(installed, "installed", lambda: None)
    p = image(None)
    guard_script.postprocess_batch(p)
    assert p.extra_generation_params == {}, "switched off it says nothing"


def test_a_picture_without_loras_says_nothing(script):
    assert script.summary("Automatic", [report()], {}) == ""
    assert script.summary("Automatic", [], {"gone.safetensors": "why"}) == "Automatic, without gone.safetensors"
