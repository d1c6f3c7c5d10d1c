"""Commands for which headers are enough never load torch, and say what they said when torch read the headers.

One process runs them all. What it prints is compared with the same commands where the LoRA's tensors lie on torch's meta
device.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.fake_models import flux_linears, flux_shapes, stored, write_gguf, write_lora, write_nf4, write_safetensors

from lib_lora_guard import cli
from lib_lora_guard.adapters import files as lora_files
from lib_lora_guard.checkpoints import lora_header
from lib_lora_guard.files import read_tensors
from lib_lora_guard.memory.torch_build import torch_build

ROOT = Path(cli.__file__).parent.parent
COMMANDS = ("plan", "inspect", "explain", "bake", "simulate", "demo", "doctor")
SMALL = flux_shapes(hidden=256, double=2, single=2)
LORAS = ("lora", "mixed", "damaged")
MODELS = ("fp8.safetensors", "nf4.safetensors", "q4.gguf")

RUN = """
import contextlib, io, json, sys
from lib_lora_guard import cli

said = []
for words in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    loaded = sorted({"torch", "rich", "psutil", "safetensors", "numpy"} & set(sys.modules))
    said.append((code, out.getvalue(), err.getvalue(), loaded))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    write_safetensors(folder / "fp8.safetensors", stored(SMALL, "F8_E4M3"))
    write_nf4(folder / "nf4.safetensors", SMALL)
    write_gguf(folder / "q4.gguf", SMALL, "Q4_K")
    write_lora(folder / "lora.safetensors", flux_linears(SMALL), metadata={"ss_base_model_version": "flux1"})
    a, b, c, d = (f"lora_unet_double_blocks_{n}_img_mlp_{m}" for n in (0, 1) for m in (0, 2))
    tensors = {
        f"{a}.lora_up.weight": ("F16", (1024, 4)), f"{a}.lora_down.weight": ("F16", (4, 256)), f"{a}.dora_scale": ("F16", (1024, 1)),
        f"{b}.hada_w1_a": ("BF16", (256, 4)), f"{b}.hada_w1_b": ("BF16", (4, 1024)), f"{b}.hada_w2_a": ("BF16", (256, 4)),
        f"{b}.hada_w2_b": ("BF16", (4, 1024)), f"{b}.alpha": ("BF16", ()), "optimizer.step": ("F32", (2,)),
        f"{c}.lokr_w1": ("F32", (4, 4)), f"{c}.lokr_w2_a": ("F32", (256, 2)), f"{c}.lokr_w2_b": ("F32", (2, 64)),
        f"{d}.oft_blocks": ("F32", (64, 4, 4)), "lora_te1_text_model_encoder_layers_0_mlp_fc1.diff": ("F32", (3072, 768)),
    }  # fmt: skip
    write_safetensors(folder / "mixed.safetensors", tensors, values={f"{b}.alpha": b"\x00\x40"})
    write_safetensors(folder / "damaged.safetensors", {f"{a}.lora_up.weight": ("F32", ()), f"{a}.lora_down.weight": ("F32", (0, 8))})  # fmt: skip
    return folder


def commands(folder):
    """`(words, other modules that it may load)`."""
    yield ["--help"], set()
    yield from (([command, "--help"], set()) for command in COMMANDS)
    yield ["simulate", "--json"], set()
    for lora in LORAS:
        file = str(folder / f"{lora}.safetensors")
        yield ["inspect", file, "--json"], set()
        for model in MODELS:
            path = str(folder / model)
            yield ["inspect", file, "--model", path, "--json"], set()
            yield ["plan", path, file, "--vram", "12", "--ram", "16", "--json"], set()
    yield ["explain", str(folder / "q4.gguf"), "--json"], set()
    for lora in LORAS:
        file = str(folder / f"{lora}.safetensors")
        yield ["inspect", file], {"rich"}
        yield ["plan", str(folder / MODELS[0]), file, "--vram", "12", "--ram", "16"], {"rich"}
    yield ["inspect", str(folder / "none.safetensors")], {"rich"}
    if not torch_build().may_have_card():
        yield ["doctor", "--data", str(folder / "data")], {"rich", "psutil"}


@pytest.fixture(scope="module")
def said(folder):
    """What one process says to each command, and which libraries it has loaded by then."""
    asked = [words for words, _ in commands(folder)]
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=ROOT, input=json.dumps(asked), capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "120", "LANGUAGE": "en", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    return dict(zip(map(tuple, asked), json.loads(done.stdout), strict=True))


def test_no_command_loads_more_than_it_needs(said, folder):
    for words, may in commands(folder):
        loaded = set(said[tuple(words)][3])
        assert loaded <= may, f"{words} had {loaded - may}"


def test_they_say_what_is_said_of_tensors_on_the_meta_device(said, folder, monkeypatch):
    def on_meta(header):
        wanted = [name for name, entry in header.tensors.items() if lora_files._is_number(name, entry.shape)]
        tensors = {
            name: torch.empty(entry.shape, dtype=read_dtype(entry), device="meta")
            for name, entry in header.tensors.items()
        }
        return lora_files._parsed(header, {**tensors, **read_tensors(header, wanted)}, as_trained=False)

    monkeypatch.setattr(lora_header, "lora_of_header", on_meta)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LANGUAGE", "en")
    for words, (code, out, err, _) in said.items():
        if words[0] in ("inspect", "plan") and "--help" not in words:
            assert run(words) == (code, out, err), words


def read_dtype(entry):
    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[entry.format]


def run(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    return code, out.getvalue(), err.getvalue()


def test_doctor_says_the_same_with_and_without_torch(said, folder, monkeypatch):
    words = ("doctor", "--data", str(folder / "data"))
    if words not in said:
        pytest.skip("torch may find a card here, so it is asked")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LANGUAGE", "en")
    without, has = said[words][1].splitlines(), run(words)[1].splitlines()
    # What is measured changes from call to call; everything else is the same line.
    assert [line.partition(":")[0] for line in without] == [line.partition(":")[0] for line in has]
    assert without[:2] == has[:2]
    assert [line for line in without if "not known" in line] == [line for line in has if "not known" in line]


def test_as_a_program(folder):
    """Exit code, one line on stderr, and a '?' for a letter that the console lacks."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    (folder / "größe.safetensors").write_bytes((folder / "lora.safetensors").read_bytes())
    started = [sys.executable, "-m", "lib_lora_guard", "inspect"]
    good, bad = (
        subprocess.run([*started, str(folder / name)], cwd=ROOT, capture_output=True, env=environment)
        for name in ("größe.safetensors", "none.safetensors")
    )
    assert (good.returncode, good.stderr) == (0, b"")
    assert good.stdout.startswith(b"gr??e.safetensors: LoRA for Flux")
    assert (bad.returncode, bad.stdout) == (1, b"")
    assert bad.stderr.count(b"\n") == 1
    assert bad.stderr.endswith(
        b"none.safetensors: no such file; check its name and folder, or refresh the list" + os.linesep.encode()
    )
