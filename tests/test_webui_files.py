"""Commands that are run in the extension's folder find files by the names of the WebUI's lists."""

from pathlib import Path

import pytest

from lib_lora_guard.commands import arguments, webui_files
from lib_lora_guard.commands.webui_files import LORAS, MODELS, find, webui_models


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A WebUI in a folder with a blank, with the package as an extension, and files in folders of the lists."""
    root = tmp_path / "My WebUI"
    for name in ("models/Stable-diffusion/flux.safetensors", "models/Lora/my styles/Detail Tweaker.safetensors", "models/Lora/xl.safetensors",
                 "extensions/guard/lib_lora_guard/cli.py", "models/VAE/ae.safetensors"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    monkeypatch.setattr(arguments.webui_files, "PACKAGE", root / "extensions/guard/lib_lora_guard")
    monkeypatch.chdir(root / "extensions/guard")
    return root / "models"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("xl", "xl.safetensors"),
        ("XL.safetensors", "xl.safetensors"),
        ("detail tweaker", "my styles/Detail Tweaker.safetensors"),
        ("my styles/detail tweaker.safetensors", "my styles/Detail Tweaker.safetensors"),
        ("other/detail tweaker.safetensors", None),
        ("flux", None),
        ("../Lora/xl", None),
        ("", None),
    ],
)
def test_a_name_of_the_list_is_found_in_any_folder_of_it(models, name, file):
    assert find(Path(name), LORAS, models) == (None if file is None else models / "Lora" / file)
    assert find(Path(name), LORAS, None) is None


def test_only_a_webui_is_looked_into(models, tmp_path):
    assert webui_models(models.parent / "extensions/guard/lib_lora_guard") == models
    assert webui_models(tmp_path / "a/guard/lib_lora_guard") is None
    assert find(models / "Lora/none", LORAS, models) is None
    assert find(Path("flux"), MODELS, models) == models / "Stable-diffusion/flux.safetensors"


def test_what_is_typed_is_a_path_first_then_a_name(models):
    assert arguments.model("flux") == models / "Stable-diffusion/flux.safetensors"
    assert arguments.any_file("flux") == models / "Stable-diffusion/flux.safetensors"
    assert arguments.model("flux.safetensors [be9881f4]") == models / "Stable-diffusion/flux.safetensors"
    assert arguments.part("ae") == models / "VAE/ae.safetensors"
    assert arguments.lora("xl:0.8") == (models / "Lora/xl.safetensors", 0.8)
    assert arguments.lora('"../../models/Lora/xl.safetensors":-1') == (Path("../../models/Lora/xl.safetensors"), -1.0)
    with pytest.raises(ValueError, match=r"expected a strength such as 0\.8 after xl\.safetensors, found '0,8'"):
        arguments.lora("xl:0,8")
    Path("xl").touch()
    assert arguments.lora("xl") == (Path("xl"), 1.0)
    assert arguments.lora("none.safetensors") == (Path("none.safetensors"), 1.0)


def test_folders_without_end_are_left(models, monkeypatch):
    monkeypatch.setattr(webui_files, "MOST_FOLDERS", 1)
    assert find(Path("detail tweaker"), LORAS, models) is None
    assert find(Path("xl"), LORAS, models) == models / "Lora/xl.safetensors"


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (["plan", "a b.safetensors", ":0.8", "--json"], ["plan", "a b.safetensors:0.8", "--json"]),
        (["plan", "a", ":-1", "b", ":.5"], ["plan", "a:-1", "b:.5"]),
        ([":0.8", "--vram", "12", "--json", ":1"], [":0.8", "--vram", "12", "--json", ":1"]),
        (["plan", "a", ":x"], ["plan", "a", ":x"]),
    ],
)
def test_a_strength_that_powershell_split_off_is_put_back(words, whole):
    assert arguments.joined(words) == whole
