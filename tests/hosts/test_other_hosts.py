"""Programs that the guard does not fit: one line that says what to do, nothing replaced, the start goes on.

The trees are a few lines each, with the names that the programs really have at the places that the probes look at.
"""

import argparse
import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lib_lora_guard.errors import HostError
from lib_lora_guard.hosts.forge import api as forge_probe
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.hosts.recognise import Program, explain, recognise
from lib_lora_guard.messages import Message
from lib_lora_guard.messages.catalogue import LANGUAGES
from lib_lora_guard.version import __version__

ROOT = Path(__file__).parent.parent.parent
HOST_PACKAGES = ("backend", "comfy", "ldm_patched", "modules", "modules_forge", "networks")

WEBUI = {
    "modules/scripts.py": "AlwaysVisible = object()\nclass Script:\n    def show(self, is_img2img): return None\n",
    "modules/processing.py": "class StableDiffusionProcessing:\n    def get_conds_with_caching(self): return 1\n",
    "modules/shared.py": "class cmd_opts: pass\nclass opts: data = {}\n",
}
COMFY_PATCHER = (
    "class ModelPatcher:\n"
    "    def add_patches(self, patches, strength_patch=1.0): return list(patches)\n"
    "    def patch_model(self, device_to=None): return self\n"
)
OLD_LOADER = (
    "class LoraLoader:\n"
    "    def __init__(self, model): self.patches = {}\n"
    "    def add_patches(self, patches, strength_patch=1.0): self.patches.update(patches)\n"
    "    def refresh(self, target_device=None, offload_device=None): return None\n"
)
MERGE = "def merge_lora_to_weight(patches, weight, key='k', computation_dtype=None): return weight\n"
KEYS = (
    "def model_lora_keys_unet(model, key_map={}): return key_map\n"
    "def model_lora_keys_clip(model, key_map={}): return key_map\n"
)
MEMORY = "current_loaded_models = []\nclass LoadedModel: pass\ndef load_models_gpu(models, memory_required=0): pass\n"
USES_MERGE = "from backend.patcher.lora import merge_lora_to_weight\ndef get_weight_and_bias(layer): return None\n"
NO_USE = "def get_weight_and_bias(layer): return None\n"


def version(text):
    return {"modules_forge/forge_version.py": f'version = "{text}"\n'}


LDM_PATCHED = {
    **WEBUI,
    "ldm_patched/modules/model_patcher.py": COMFY_PATCHER,
    "ldm_patched/modules/lora.py": "def load_lora(lora, to_load): return {}\n" + KEYS,
    "modules_forge/forge_loader.py": "def load_model_for_a1111(timer, checkpoint_info=None): return None\n",
}
BACKEND = {**WEBUI, **version("2.0.1v1.10.1"), "backend/memory_management.py": MEMORY}

# Tree, the program it is taken for, the probe that fails, what the line advises.
PROGRAMS = {
    "A1111": (
        {**WEBUI, "modules/sd_hijack.py": "class StableDiffusionModelHijack:\n    def hijack(self, m): return m\n"},
        Program.A1111, "cannot be imported: No module named 'backend'", "it can be disabled in this program",
    ),
    "Forge before August 2024": (
        {**LDM_PATCHED, **version("0.0.17v1.8.0rc")},
        Program.OLD_FORGE, "cannot be imported: No module named 'backend'", "update Forge (git pull)",
    ),
    "Forge Classic": (
        {**LDM_PATCHED, **version("classic")},
        Program.CLASSIC, "cannot be imported: No module named 'backend'", "it can be disabled in this program",
    ),
    "reForge": (
        {**LDM_PATCHED, **version("1.6.0-v1.10.1RC"), "extensions-builtin/reForge-cfg/a.py": ""},
        Program.REFORGE, "cannot be imported: No module named 'backend'", "branch newmain_newforge",
    ),
    "reForge with an early version number": (
        {**LDM_PATCHED, **version("0.0.18v1.10.0"), "extensions-builtin/mahiro_reforge/a.py": ""},
        Program.REFORGE, "cannot be imported: No module named 'backend'", "branch newmain_newforge",
    ),
    "Forge of 21 August 2024": (
        {
            **BACKEND,
            "backend/patcher/lora.py": "extra_weight_calculators = {}\n" + OLD_LOADER + MERGE + KEYS,
            "backend/patcher/base.py": "class ModelPatcher: pass\n",
            "backend/operations.py": USES_MERGE,
        },
        Program.FORGE, "backend.patcher.lora.LoraLoader.refresh has no parameter lora_patches", "update the program (git pull)",
    ),
    "Neo with ComfyUI's patcher": (
        {
            **BACKEND, **version("neo"),
            "modules_forge/packages/comfy/lora.py": KEYS,
            "backend/patcher/lora.py": MERGE + KEYS,
            "backend/patcher/base.py": COMFY_PATCHER,
            "backend/operations.py": NO_USE,
        },
        Program.NEO, "backend.patcher.lora.LoraLoader.refresh is missing", "a Forge Neo that still has Forge's LoRA patcher",
    ),
    "Neo without a LoRA module": (
        {
            **BACKEND, **version("neo"),
            "backend/patcher/base.py": COMFY_PATCHER,
            "backend/operations.py": NO_USE,
        },
        Program.NEO, "backend.patcher.lora cannot be imported: No module named 'backend.patcher.lora'",
        "a Forge Neo that still has Forge's LoRA patcher",
    ),
    "Forge with a broken package": (
        {**BACKEND, "backend/__init__.py": "raise ImportError('DLL load failed:\\n  planted')\n"},
        Program.FORGE, "cannot be imported: DLL load failed: planted", "once it starts without this error",
    ),
    "nothing known": (
        WEBUI, Program.UNKNOWN, "cannot be imported: No module named 'backend'", "LoRA Guard works in Forge",
    ),
}  # fmt: skip


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Makes a tree importable and takes everything out again; the guard's logger starts without a handler, as in a program."""

    def forget():
        for name in [n for n in sys.modules if n.split(".")[0] in HOST_PACKAGES]:
            del sys.modules[name]

    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path

    forget()
    monkeypatch.setattr(sys, "argv", ["launch.py", "--port", "7860"])
    yield make
    forge.uninstall()
    forget()


def run(path):
    """As a WebUI runs a file of an extension."""
    spec = importlib.util.spec_from_file_location(path.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_all(root):
    """What the program has loaded before extensions come; parts that cannot be imported are not loaded then either."""
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if name.split(".")[0] in HOST_PACKAGES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def contents():
    """Every attribute of every module and class of the program, by identity."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in HOST_PACKAGES and isinstance(module, ModuleType):
            for key, value in vars(module).items():
                if not key.startswith("__"):
                    found[name, key] = value
                    if isinstance(value, type):
                        found.update({(name, key, k): v for k, v in vars(value).items() if not k.startswith("__")})
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_replaced_one_line_is_said_and_the_start_goes_on(host, capsys, name):
    files, program, probe, advice = PROGRAMS[name]
    root = host(files)
    assert recognise([str(root)]) is program
    load_all(root)
    before = contents()
    assert len(before) >= 3
    parser = argparse.ArgumentParser()
    parser.add_argument("--port")
    run(ROOT / "preload.py").preload(parser)
    for _ in range(2):  # "Reload UI" runs them again
        run(ROOT / "scripts" / "lora_guard.py")
    assert parser.parse_args(["--port", "7860"]).lora_guard_off is False
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 1
    assert error == ""
    assert lines[0].startswith(
        f"[LoRA Guard] warning: {__version__} does not fit this program, so nothing is changed: "
    )
    assert probe in lines[0]
    assert advice in lines[0]
    after = contents()
    assert {key: id(value) for key, value in before.items()} == {key: id(after[key]) for key in before}
    assert not any(hasattr(value, "lora_guard_hook") for value in after.values())
    assert forge.installed() is None


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_sentence_names_the_probe_the_program_and_what_to_do(host, name):
    files, program, probe, advice = PROGRAMS[name]
    host(files)
    with pytest.raises(HostError) as error:
        forge_probe.probe()
    sentence = explain(error.value)
    assert probe in sentence
    assert advice in sentence
    assert f"This seems to be {Message(f'other_hosts.{program.value}')}: " in sentence
    for language in LANGUAGES:
        text = sentence.text(language)
        assert "\n" not in text
        assert "{" not in text
        assert probe in text
    assert sentence.text("zh") != sentence


def test_an_error_of_another_kind_while_the_host_is_imported_is_one_line_too(host, capsys):
    root = host({**BACKEND, "backend/__init__.py": "raise RuntimeError('no driver:\\nplanted')\n"})
    run(ROOT / "preload.py").preload(argparse.ArgumentParser())
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be imported: no driver: planted. This seems to be Forge" in line
    assert forge.installed() is None
    assert recognise([str(root)]) is Program.FORGE


def test_a_broken_neo_is_told_that_it_is_broken(tmp_path):
    for name, text in {**version("neo"), "backend/a.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    error = HostError("backend.operations cannot be imported: No module named 'comfy_kitchen'")
    error.__cause__ = ModuleNotFoundError("No module named 'comfy_kitchen'", name="comfy_kitchen")
    assert "once it starts without this error, so does LoRA Guard" in explain(error, [str(tmp_path)])
    error.__cause__ = ModuleNotFoundError("No module named 'backend.patcher.lora'", name="backend.patcher.lora")
    assert "Forge Neo that still has" in explain(error, [str(tmp_path)])


def test_an_error_of_many_lines_becomes_one(tmp_path):
    (tmp_path / "backend").mkdir()
    error = HostError("backend.operations cannot be imported: A module\n\n  compiled for NumPy 1\x1b[0m cannot run")
    assert explain(error, [str(tmp_path)]).startswith(
        "backend.operations cannot be imported: A module compiled for NumPy 1?[0m cannot run. This seems to be Forge"
    )


def test_what_the_catalogue_says_already_is_not_guessed_at(tmp_path):
    error = HostError.of("host.second_copy")
    assert (
        explain(error, [str(tmp_path)])
        == "another copy of LoRA Guard is installed already; keep one folder in extensions/"
    )


def test_comfyui_and_an_unreadable_version_are_recognised_by_their_folders(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "nodes.py").write_text("", encoding="utf-8")
    assert recognise([str(tmp_path)]) is Program.COMFYUI
    (tmp_path / "backend").mkdir()
    (tmp_path / "modules_forge").mkdir()
    (tmp_path / "modules_forge" / "forge_version.py").write_bytes(b"\xff\xfe version \x00")
    assert recognise(["/nowhere at all", str(tmp_path)]) is Program.FORGE
    assert recognise([]) is Program.UNKNOWN
