"""The lines on a picture's LoRAs in its infotext, and the accordion."""

import html
import json
import re
import sys
import types
import typing

import pytest

from lib_lora_guard.hosts.forge.takeover import ForgeTakeover
from lib_lora_guard.hosts.webui.accordion import state
from lib_lora_guard.hosts.webui.images import Images
from lib_lora_guard.hosts.webui.types import own_options
from lib_lora_guard.planning.mode import Mode
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
    modules.shared = types.SimpleNamespace(opts=types.SimpleNamespace(data={"localization": "zh_CN"}))
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
        lora.count(Mode.BYPASS, "low rank")
    for _ in range(merge):
        lora.count(Mode.MERGE, "small parameter")
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


@pytest.mark.parametrize(
    ("mode", "own", "used"),
    [
        ("", {}, {}),
        (None, {}, {}),
        ("Merge", {}, {"lora_guard_mode": "Merge"}),
        ("merge", {"sd_vae": "x"}, {"sd_vae": "x", "lora_guard_mode": "Merge"}),
        ("Merge", {"lora_guard_mode": "fp16 LoRA"}, {"lora_guard_mode": "fp16 LoRA"}),
        ("<b>", {}, {}),
        (7, {}, {}),
    ],
)
def test_the_accordions_mode_is_that_of_the_request_unless_it_has_its_own(script, caplog, mode, own, used):
    p = types.SimpleNamespace(override_settings=dict(own))
    script.LoraGuardScript().before_process(p, mode)
    assert own_options(p) == used
    assert p.override_settings == own, "none of the options that the WebUI may keep"
    said = [record.getMessage() for record in caplog.records]
    assert bool(said) is (mode in ("<b>", 7))
    assert all("There are Automatic, fp16 LoRA, Merge, Forge's own" in line for line in said)


@pytest.mark.parametrize("restores", [True, False])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("own", "kept"),
    [({}, "Automatic"), ({"lora_guard_mode": "Merge"}, "Merge")],
    ids=["accordion", "option over the API"],
)
def test_the_mode_of_the_accordion_is_that_of_its_images_alone(script, restores, fails, own, kept):
    """`override_settings_restore_afterwards` is a word of the API: what a client sends as an option may stay, the accordion's not."""
    options, modes = {"lora_guard_mode": "Automatic"}, []
    settings = LiveSettings(options)
    guard_script, images = script.LoraGuardScript(), Images(None, settings=settings)

    def draw(p):
        modes.append(settings.mode().value)
        if fails:
            raise RuntimeError("stopped")

    def process_images(p):
        """Of the WebUI."""
        guard_script.before_process(p, p.mode)
        before = {name: options[name] for name in p.override_settings}
        options.update(p.override_settings)
        try:
            images.process_images_inner(draw, p)
        except RuntimeError:
            assert fails
        finally:
            if p.override_settings_restore_afterwards:
                options.update(before)

    request = {"override_settings": own, "override_settings_restore_afterwards": restores}
    process_images(types.SimpleNamespace(mode="Merge", **request))
    process_images(types.SimpleNamespace(mode="", override_settings={}, override_settings_restore_afterwards=True))
    after = "Automatic" if restores else kept
    assert modes == ["Merge", after]
    assert options == {"lora_guard_mode": after}


class Component:
    """A component of gradio, and a block that holds others."""

    made: typing.ClassVar = []

    def __init__(self, *args, **how):
        self.args, self.how = args, how
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def click(self, call, **how):
        self.call = call


def test_the_accordion_is_closed_and_answers_when_it_is_opened(script, monkeypatch):
    names = ("Accordion", "Radio", "Button", "HTML")
    kinds = {name: type(name, (Component,), {"made": []}) for name in names}
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(**kinds))
    monkeypatch.setattr(installed, "installed", lambda: None)
    guard_script = script.LoraGuardScript()
    (mode,) = guard_script.ui(False)
    (accordion,), (button,), (text,) = (kinds[name].made for name in ("Accordion", "Button", "HTML"))
    assert accordion.how == {"open": False, "elem_id": "lora_guard_txt2img"}
    assert [value for _, value in mode.args[0]] == ["", *(known.value for known in LoraMode)]
    assert mode.args[0][0] == ("与设置相同", "")
    assert mode.do_not_save_to_config, "the usual mode has its place on the settings page"
    assert guard_script.infotext_fields == [(mode, "LoRA Guard mode")]
    assert guard_script.paste_field_names == ["LoRA Guard mode"]
    assert "<p>" not in text.args[0], "nothing is asked before it is opened"
    assert "data-off" in button.call()
    assert "已关闭" in button.call()


def test_what_the_opened_accordion_says_is_text(monkeypatch):
    hostile = "<img src=x onerror=alert(1)>.safetensors"
    loras = [applied("a.safetensors", 3), applied(hostile, 3), LoraReport("bad&.safetensors", 1.0, refused="<b>broken")]
    takeover = types.SimpleNamespace(
        reports=lambda: [report(*loras), report(*loras)], left_out=lambda: {"'gone\n": 'no "LoRA"'}
    )
    monkeypatch.setattr(installed, "installed", lambda: takeover)
    shown = state("en", LoraMode.MERGE)
    assert re.findall("<p>(.*?)</p>", shown) == [
        "Mode in Settings: Merge.",
        "Applied now: a.safetensors, &lt;img src=x onerror=alert(1)&gt;.safetensors.",
        "bad&amp;.safetensors was left out: &lt;b&gt;broken",
        "&#x27;gone? was left out: no &quot;LoRA&quot;",
    ]
    assert set(re.findall("<[^>]*?[ >]", shown)) == {"<div ", "<p>", "</p>", "</div>"}
    words = json.loads(html.unescape(re.search('data-words="(.*?)"', shown)[1]))
    assert words["left_out"] == "left out"
    takeover.reports = list
    assert "No LoRA is applied now." in state("en", LoraMode.MERGE)
