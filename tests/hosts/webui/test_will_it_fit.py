"""The question "will it fit?": files by the names of the WebUI's lists, on its own machine, in words."""

import sys
from types import SimpleNamespace

import pytest
from support.fake_models import flux_linears, flux_shapes, stored, write_lora, write_safetensors

from lib_lora_guard.hosts.webui.will_it_fit import lists, will_it_fit
from lib_lora_guard.units import GB

SMALL = flux_shapes(hidden=256, double=2, single=2)


@pytest.fixture
def webui(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "flux.safetensors", stored(SMALL, "F8_E4M3"))
    write_lora(tmp_path / "small.safetensors", flux_linears(SMALL))
    (tmp_path / "broken.safetensors").write_text("<html>")
    models = {"flux": "flux.safetensors", "broken": "broken.safetensors"}
    loras = {"small": "small.safetensors", "wrong": "broken.safetensors"}

    def listed(names):
        return {name: SimpleNamespace(filename=str(tmp_path / file)) for name, file in names.items()}

    modules = SimpleNamespace(sd_models=SimpleNamespace(checkpoints_list=listed(models)))
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "networks", SimpleNamespace(available_networks=listed(loras)))


def guard(vram_gb=12, ram_gb=16, others_gb=1):
    def reading(gb):
        return SimpleNamespace(bytes=None if gb is None else gb * GB)

    found = {"vram_total": reading(vram_gb), "ram_total": reading(ram_gb), "vram_others": reading(others_gb)}
    return SimpleNamespace(snapshot=lambda: SimpleNamespace(**found))


def first(takeover, checkpoint, *loras, language="en"):
    told = will_it_fit(takeover, checkpoint, list(loras), language)
    return told["fits"], told["lines"][0]


def test_the_lists_are_those_of_the_webui(webui):
    assert lists() == {"checkpoints": ["broken", "flux"], "loras": ["small", "wrong"]}


def test_without_the_webuis_modules_the_lists_are_empty(monkeypatch):
    monkeypatch.setitem(sys.modules, "modules", SimpleNamespace())
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    assert lists() == {"checkpoints": [], "loras": []}


def test_the_answer_is_for_this_machine_without_what_others_hold(webui):
    fits, line = first(guard(), "flux", "small")
    assert fits is not False
    assert "11.0 GB" in line
    assert any("\u4e00" <= c <= "\u9fff" for c in first(guard(), "flux", "small", language="zh")[1])
    assert first(guard(ram_gb=3), "flux", "small")[0] is False
    fits, line = first(guard(), "flux")
    assert fits is not False
    assert "11.0 GB" in line
    assert first(guard(ram_gb=3), "flux")[0] is False


@pytest.mark.parametrize(
    ("takeover", "names", "said"),
    [
        (guard(), ("../../etc/passwd", "small"), "../../etc/passwd is in no list of the WebUI"),
        (guard(), ("flux", "/etc/passwd"), "/etc/passwd is in no list of the WebUI"),
        (guard(vram_gb=None), ("flux", "small"), "This machine's card or RAM cannot be read"),
        (None, ("flux", "small"), "LoRA Guard is not at work"),
        (guard(), ("flux", "wrong"), "Cannot be calculated: broken.safetensors: "),
        (guard(), ("broken", "small"), "Cannot be calculated: broken.safetensors: "),
    ],
)
def test_what_cannot_be_answered_is_said(webui, takeover, names, said):
    fits, line = first(takeover, *names)
    assert fits is None
    assert line.startswith(said)


def test_one_of_two_loras_that_the_model_cannot_use_is_said(webui, tmp_path):
    write_lora(tmp_path / "xl.safetensors", {"input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (640, 640)})
    sys.modules["networks"].available_networks["xl"] = SimpleNamespace(filename=str(tmp_path / "xl.safetensors"))
    lines = will_it_fit(guard(), "flux", ["small", "xl"], "en")["lines"]
    assert lines[1].startswith("xl.safetensors NOT applied (")
    assert len(will_it_fit(guard(), "flux", ["small"], "en")["lines"]) == len(lines) - 1
    assert "xl.safetensors" in will_it_fit(guard(), "flux", ["xl"], "en")["lines"][0]


def test_the_text_encoders_that_the_user_has_chosen_are_counted(webui, tmp_path):
    vae = {f"decoder.conv_{n}.weight": ("F16", (512, 512, 3, 3)) for n in range(4)}
    write_safetensors(tmp_path / "my_vae.safetensors", {**vae, "encoder.conv_in.weight": ("F16", (128, 3, 3, 3))})
    assumed = will_it_fit(guard(), "flux", ["small"], "en")["lines"][1]
    assert "VAE 0.2 GB (assumed)" in assumed
    chosen = [str(tmp_path / name) for name in ("my_vae.safetensors", "broken.safetensors", "gone.safetensors")]
    sys.modules["modules"].sd_models.model_data = SimpleNamespace(
        forge_loading_parameters={"additional_modules": chosen}
    )
    counted = will_it_fit(guard(), "flux", ["small"], "en")["lines"][1]
    assert "my_vae" in counted
    assert "VAE 0.2 GB (assumed)" not in counted
    assert "T5" in counted
