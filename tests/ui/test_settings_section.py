"""The settings section: every setting is there, with values that the program takes, in both languages."""

import dataclasses
import importlib.util
import re
import sys
import types

import pytest

from lib_lora_guard.memory.shares import usual_kept_files_mb
from lib_lora_guard.settings import PREFIX, Language, LoraMode, Settings, read
from lib_lora_guard.ui import settings_section

HAS_GRADIO = importlib.util.find_spec("gradio") is not None


class OptionInfo:
    """As the host has it."""

    def __init__(self, default=None, label="", component=None, component_args=None, onchange=None):
        self.default, self.label, self.component, self.arguments = default, label, component, component_args
        self.onchange, self.comment = onchange, ""

    def html(self, html):
        self.comment += html
        return self

    def info(self, text):
        return self.html(f"<span>({text})</span>")


class OptionHTML(OptionInfo):
    def __init__(self, text):
        super().__init__(text)


HOST = types.SimpleNamespace(OptionInfo=OptionInfo, OptionHTML=OptionHTML)


@pytest.fixture(autouse=True)
def gradio(monkeypatch):
    """The real one where it is installed."""
    if not HAS_GRADIO:
        names = ("Radio", "Number", "Slider")
        monkeypatch.setitem(
            sys.modules, "gradio", types.SimpleNamespace(**{name: type(name, (), {}) for name in names})
        )


def made(language="en", on_change=lambda: None):
    return settings_section.options(HOST, language, on_change)


def settings_of(options):
    return {name: info for name, info in options.items() if not isinstance(info, OptionHTML)}


def test_every_setting_has_an_option_with_its_default():
    options = settings_of(made())
    assert set(options) == {PREFIX + field.name for field in dataclasses.fields(Settings)}
    values = {name: info.default for name, info in options.items()}
    assert read(values) == (Settings(kept_files_mb=usual_kept_files_mb()), [])
    # Forge compares the type of a changed value with the default's: an enum is not what a config file can hold.
    assert {type(value) for value in values.values()} <= {bool, int, float, str}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_value_that_can_be_chosen_is_taken(language):
    for name, info in settings_of(made(language)).items():
        for label, value in (info.arguments or {}).get("choices", []):
            assert label
            assert read({name: value})[1] == [], (name, value)
    slider = made()[PREFIX + "garbage_collection_threshold"]
    for value in (slider.arguments["minimum"], slider.arguments["maximum"]):
        assert read({PREFIX + "garbage_collection_threshold": value})[1] == []
    choices = dict.fromkeys(value for _, value in made()[PREFIX + "mode"].arguments["choices"])
    assert list(choices) == [mode.value for mode in LoraMode]
    assert [v for _, v in made()[PREFIX + "language"].arguments["choices"]] == [known.value for known in Language]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_option_has_a_label_and_an_explanation(language):
    for name, info in settings_of(made(language)).items():
        explanation = re.sub(r"<[^>]+>", "", info.comment)
        assert info.label, name
        assert len(explanation) > 10, name
        if language == "zh":
            assert any("\u4e00" <= c <= "\u9fff" for c in explanation), name
    modes = made(language)[PREFIX + "mode"].comment
    assert modes.count("<li>") == len(LoraMode)


def test_texts_are_escaped(monkeypatch):
    from lib_lora_guard.messages.catalogue import TEXTS

    monkeypatch.setitem(TEXTS, "settings.mode.merge.info", {"en": "<b>&"})
    monkeypatch.setitem(TEXTS, "settings.enable.info", {"en": "<i>&"})
    options = made()
    assert "&lt;b&gt;&amp;" in options[PREFIX + "mode"].comment
    assert "&lt;i&gt;&amp;" in options[PREFIX + "enable"].comment


def test_a_change_is_told():
    told = []
    for info in settings_of(made(on_change=lambda: told.append(1))).values():
        info.onchange()
    assert len(told) == len(dataclasses.fields(Settings))


@pytest.mark.skipif(not HAS_GRADIO, reason="needs gradio, which comes with Forge")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_gradio_takes_the_options(language):
    import gradio

    from lib_lora_guard.ui import tab

    with gradio.Blocks():
        for info in settings_of(made(language)).values():
            component = info.component or gradio.Checkbox
            made_component = component(label=info.label, value=info.default, **(info.arguments or {}))
            assert made_component.value == info.default
            # What the page sends for the default comes back as the default.
            sent = made_component.postprocess(info.default)
            assert made_component.preprocess(sent) == info.default
    ((blocks, title, element),) = tab.build()
    assert (title, element) == ("LoRA Guard", "lora_guard")
    assert [type(block).__name__ for block in blocks.blocks.values()].count("HTML") == 1
