"""A Neo that lacks something that the guard needs is named, and left alone."""

import shutil
import sys
from pathlib import Path

import pytest

from lib_lora_guard.errors import HostError
from lib_lora_guard.hosts.neo import api

DOUBLE = Path(__file__).parents[2] / "neo_double"


@pytest.mark.parametrize(
    ("file", "old", "new", "probe"),
    [
        ("patcher/base.py", "def partially_unload(", "def shrink(", "ModelPatcher.partially_unload is missing"),
        ("patcher/base.py", "made.patches_uuid, made.parent = self.patches_uuid, self", "made.parent = self", "does not share the model and patches_uuid"),
        ("operations.py", "return weight, bias\n\n\ndef _cast", "return layer.weight, layer.bias\n\n\ndef _cast", "does not use weight_function"),
        ("operations.py", "class ForgeWeights:", "class Renamed:", "ForgeWeights"),
        ("memory_management.py", "def bake_gguf_model(", "def baked(", "bake_gguf_model is missing"),
    ],
)  # fmt: skip
def test_a_neo_that_lacks_something_is_named_and_left_alone(tmp_path, monkeypatch, file, old, new, probe):
    shutil.copytree(DOUBLE, tmp_path / "neo", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "neo" / "backend" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "neo"))
    before = {name for name in sys.modules if name.split(".")[0] == "backend"}
    assert not before
    try:
        with pytest.raises(HostError, match=probe):
            api.probe()
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "backend"]:
            del sys.modules[name]
