"""The axes of the X/Y/Z plot, on a copy of how the WebUI makes its cells."""

import sys
import types
from copy import copy

import pytest

from lib_lora_guard.hosts.webui import xyz_axes
from lib_lora_guard.hosts.webui.types import own_options
from lib_lora_guard.hosts.webui.xyz_axes import MODE, STRENGTH, restore_prompts, scale_batch
from lib_lora_guard.runtime import installed


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.cost, self.choices = confirm, cost, choices


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.setattr(installed, "_takeover", object())
    module = types.ModuleType("xyz_grid.py")
    module.AxisOption, module.axis_options = AxisOption, [AxisOption("Seed", int, None)]
    other = types.ModuleType("other.py")
    scripts = types.SimpleNamespace(scripts_data=[types.SimpleNamespace(module=one) for one in (other, module, module)])
    module.loaded = {"modules.scripts": scripts}
    return module


def labels(plot):
    return [option.label for option in plot.axis_options]


def axis(plot, label):
    xyz_axes.add(plot.loaded)
    return next(option for option in plot.axis_options if option.label == label)


def test_they_are_added_once_and_taken_out(plot):
    for _ in range(2):
        xyz_axes.add(plot.loaded)
        assert labels(plot) == ["Seed", MODE, STRENGTH]
    xyz_axes.remove(plot.loaded)
    assert labels(plot) == ["Seed"]
    xyz_axes.add({})


class Request:
    """Prompts as `process_images_inner` makes them from what was written."""

    batch_size, n_iter = 2, 2

    def __init__(self, prompt, **others):
        self.prompt, self.override_settings = prompt, {}
        vars(self).update(others)

    def process(self):
        self.all_prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt] * 4
        self.main_prompt, made = self.all_prompts[0], []
        for n in range(self.n_iter):
            self.prompts = self.all_prompts[2 * n : 2 * n + 2]
            scale_batch(self, n)
            made += self.prompts
            assert self.prompts == self.all_prompts[2 * n : 2 * n + 2], "the infotext's"
        infotext_of_grid = self.main_prompt
        restore_prompts(self)
        return made, infotext_of_grid


def test_each_cell_has_its_own_strengths_and_the_plot_those_that_were_written(plot):
    strength, p = axis(plot, STRENGTH), Request("a cat <lora:a:0.8><lora:b:-1>")
    for factor, scaled in (
        (0.5, "a cat <lora:a:0.4><lora:b:-0.5>"),
        (1.0, p.prompt),
        (0.0, "a cat <lora:a:0><lora:b:0>"),
    ):
        cell = copy(p)
        strength.apply(cell, factor, [])
        assert cell.process() == ([scaled] * 4, scaled)
        assert (cell.all_prompts, cell.main_prompt) == ([p.prompt] * 4, p.prompt)
        assert strength.format_value(p, strength, factor) == f"LoRA strength × {factor:g}"
    assert p.process() == ([p.prompt] * 4, p.prompt), "no axis"


def test_prompts_of_their_own_and_those_of_the_second_pass(plot):
    prompts = [f"<lora:a:{n}>" for n in (1, 2, 3, 4)]
    cell = Request(list(prompts), all_hr_prompts=["<lora:a:hr=1>"] * 4)
    written, seen = cell.prompt, []
    axis(plot, STRENGTH).apply(cell, 2.0, [])
    cell.prompts, cell.all_prompts, cell.main_prompt = prompts[:2], written, written[0]
    for n in (0, 1):
        cell.prompts = cell.all_prompts[2 * n : 2 * n + 2]
        scale_batch(cell, n)
        seen += cell.prompts
    assert seen == cell.all_prompts == ["<lora:a:2>", "<lora:a:4>", "<lora:a:6>", "<lora:a:8>"]
    assert cell.all_hr_prompts == ["<lora:a:2:hr=2>"] * 4
    assert written == prompts, "the list that the request was made with"


def test_the_mode_is_that_of_the_request_alone(plot):
    mode, cell = axis(plot, MODE), Request("")
    cell.override_settings["lora_guard_mode"] = "fp16 LoRA"
    for name in ("Automatic", "Merge"):
        one = copy(cell)
        mode.apply(one, name, ["Automatic", "Merge"])
        assert own_options(one) == {"lora_guard_mode": name}
    assert own_options(cell) == cell.override_settings == {"lora_guard_mode": "fp16 LoRA"}
    assert mode.choices() == ["Automatic", "fp16 LoRA", "Merge", "Forge's own"]
    mode.confirm(cell, mode.choices())
    with pytest.raises(RuntimeError, match="Unknown LoRA mode: merge; there are Automatic, fp16 LoRA"):
        mode.confirm(cell, ["Merge", "merge"])


def test_what_they_refuse_is_said_in_the_readers_language(plot, monkeypatch):
    shared = types.SimpleNamespace(opts=types.SimpleNamespace(data={"localization": "zh-Hans (Stable)"}))
    monkeypatch.setitem(sys.modules, "modules", types.SimpleNamespace(shared=shared))
    with pytest.raises(RuntimeError, match=r"^未知的 LoRA 模式：merge；可用的有：Automatic"):
        axis(plot, MODE).confirm(Request(""), ["merge"])
    with pytest.raises(RuntimeError, match=r"^LoRA 强度：200\.0 不是 -100 到 100 之间的数字$"):
        axis(plot, STRENGTH).confirm(None, [200.0])


def test_a_page_that_has_them_still_is_told_that_the_guard_is_off(plot, monkeypatch):
    axes = axis(plot, MODE), axis(plot, STRENGTH)
    axes[1].confirm(None, [0.0, -2.0, 100.0])
    with pytest.raises(RuntimeError, match="is no number from -100 to 100"):
        axes[1].confirm(None, [float("nan")])
    monkeypatch.setattr(installed, "_takeover", None)
    for one in axes:
        with pytest.raises(RuntimeError, match="LoRA Guard is switched off"):
            one.confirm(None, [])
