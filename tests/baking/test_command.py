"""`lora-guard bake`: what is refused before anything is written, what is said, and how much RAM it takes."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import warm
from support.measure import same_bits

from baking.checkpoints import MODELS, TARGETS, flux, merged, write_lora
from lib_lora_guard import baking, cli
from lib_lora_guard.baking.unfinished import unfinished
from lib_lora_guard.commands import bake as command
from lib_lora_guard.files import open_header
from lib_lora_guard.messages.catalogue import baking as sentences
from lib_lora_guard.version import __version__


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Flux in bf16, two LoRAs for it (one faint), one for SD 1.5."""
    folder = tmp_path_factory.mktemp("files")
    tensors = flux()
    stored = {name: t.bfloat16() for name, t in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"modelspec.title": "名", "modelspec.hash_sha256": "0x12"})
    write_lora(folder / "style.safetensors", tensors, TARGETS["flux"])
    write_lora(folder / "faint.safetensors", tensors, TARGETS["flux"][2:3], ("lora",), size=0.003)
    write_lora(folder / "other.safetensors", MODELS["sd15"](), TARGETS["sd15"][:6])
    return folder


def bake(*words):
    return cli.main(["bake", *map(str, words)])


def error(capsys):
    """The one line on stderr."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err[:-1]


def test_bake_writes_the_tensors_it_reports(files, tmp_path, capsys):
    out = tmp_path / "baked.safetensors"
    assert bake(files / "model.safetensors", f"{files / 'style.safetensors'}:0.8", "-o", out) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "style.safetensors, strength 0.8: 7 modules used, 0 keys skipped, 0 lost" in text
    assert "LoRAs baked into 7 tensors (bf16 100 %), 77 copied bit for bit, 0 converted" in text
    assert "cosine with the exact change 1.0000; 1 is all of it" in text
    assert "RAM peak" in text
    stored = {name: t.float() for name, t in load_file(files / "model.safetensors").items()}
    wanted = merged(stored, [(files / "style.safetensors", 0.8)], TARGETS["flux"])
    baked = load_file(out)
    assert all(same_bits(baked[name], (wanted.get(name, stored[name])).bfloat16()) for name in stored)


def test_bake_speaks_chinese(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    out = tmp_path / "baked.safetensors"
    assert bake(files / "model.safetensors", files / "style.safetensors", "-o", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "style.safetensors，强度 1：使用 7 个模块，跳过 0 个键，无法应用 0 个键"
    assert lines[1].endswith("；7 个张量合并了 LoRA（bf16 100 %），77 个原样复制，0 个转换了精度")
    assert bake(files / "model.safetensors", files / "style.safetensors", "-o", out) == 1
    assert error(capsys) == "lora-guard: baked.safetensors：文件已存在；请另取名称，或加 --force 替换它"


def test_the_metadata_names_the_baked_loras(files, tmp_path):
    style, faint = files / "style.safetensors", files / "faint.safetensors"
    assert bake(files / "model.safetensors", f"{style}:-0.5", faint, "-o", tmp_path / "one.safetensors", "--json") == 0
    assert bake(tmp_path / "one.safetensors", f"{faint}:2", "-o", tmp_path / "two.safetensors", "--json") == 0
    said = [(style, -0.5), (faint, 1.0), (faint, 2.0)]
    entries = [
        {"file": path.name, "strength": strength, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path, strength in said
    ]
    for name, count in (("one", 2), ("two", 3)):
        metadata = dict(open_header(tmp_path / f"{name}.safetensors").metadata)
        assert json.loads(metadata.pop("lora_guard.baked")) == entries[:count]
        # The hash of the old tensors is no longer true.
        assert metadata == {"format": "pt", "modelspec.title": "名", "lora_guard.version": __version__}


def test_json_has_stable_names_with_units(files, tmp_path, capsys):
    out = tmp_path / "baked.safetensors"
    assert (
        bake(files / "model.safetensors", files / "faint.safetensors", "-o", out, "--dtype", "fp8_e4m3fn", "--json")
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "schema", "version", "file", "file_bytes", "tensors_baked", "tensors_copied", "tensors_converted",
        "dtypes_of_baked_values", "values_beyond_range", "cosine", "cosine_by_dtype", "loras", "advice", "seconds",
        "ram_peak_bytes", "largest_weight_fp32_bytes", "lora_bytes",
    ]  # fmt: skip
    assert (found["schema"], found["file"], found["tensors_baked"]) == ("lora-guard/bake/1", "baked.safetensors", 2)
    assert found["file_bytes"] == out.stat().st_size
    assert found["dtypes_of_baked_values"] == {"fp8_e4m3fn": 1024, "bf16": 64}
    assert found["largest_weight_fp32_bytes"] == 4 * 16 * 4096
    (lora,) = found["loras"]
    assert lora == {"file": "faint.safetensors", "strength": 1.0, "modules_used": 2, "skipped": [], "lost": []}


def test_fp8_that_cannot_hold_the_lora_says_so_with_a_number(files, tmp_path, capsys):
    out = tmp_path / "baked.safetensors"
    assert (
        bake(files / "model.safetensors", files / "faint.safetensors", "-o", out, "--dtype", "fp8_e4m3fn", "--json")
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["cosine_by_dtype"]["fp8_e4m3fn"] < 0.5
    assert found["advice"] == [sentences.TEXTS["bake.too_coarse_fp8"][0]]
    assert (
        bake(files / "model.safetensors", files / "faint.safetensors", "-o", out, "--dtype", "fp8_e4m3fn", "--force")
        == 0
    )
    text = " ".join(capsys.readouterr().out.split())
    assert f"fp8_e4m3fn {found['cosine_by_dtype']['fp8_e4m3fn']:.4f}" in text
    assert "bake with --dtype bf16, or keep the LoRA in a file of its own" in text
    assert (
        bake(
            files / "model.safetensors", files / "faint.safetensors", "-o", out, "--dtype", "fp32", "--force", "--json"
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["advice"] == []
    assert found["cosine"] > 0.99999


def test_bake_refuses_before_it_writes(files, tmp_path, capsys):
    model, style, other = (files / f"{name}.safetensors" for name in ("model", "style", "other"))
    bits = {path: path.read_bytes() for path in (model, style)}
    for output in (model, style, tmp_path / ".." / tmp_path.name / "link.safetensors"):
        if output.name == "link.safetensors":
            output.hardlink_to(style)
        assert bake(model, style, "-o", output, "--force") == 1
        assert error(capsys) == (
            f"lora-guard: {output.name}: is one of the files that are read; give the new file another name"
        )
    (tmp_path / "link.safetensors").unlink()
    assert all(path.read_bytes() == content for path, content in bits.items())
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    assert bake(model, style, "-o", there) == 1
    assert error(capsys) == (
        "lora-guard: there.safetensors: is there already; give another name, or --force to replace it"
    )
    assert bake(model, other, "-o", there, "--force") == 1
    assert error(capsys).startswith("lora-guard: other.safetensors: made for SD 1.x, this is Flux")
    assert there.read_bytes() == b"mine"
    assert bake(model, style, "-o", there, "--force") == 0
    capsys.readouterr()
    assert load_file(there).keys() == load_file(model).keys()
    for output, said in (
        (tmp_path / "a.gguf", "a.gguf: expected a name that ends in .safetensors, by which programs know what to read"),
        (tmp_path / "no" / "a.safetensors", "no: no such folder; make it first, or choose another place"),
    ):
        assert bake(model, style, "-o", output) == 1
        assert error(capsys).endswith(said)
    assert bake(style, style, "-o", tmp_path / "a.safetensors") == 1
    assert "give the checkpoint first, then the LoRAs" in error(capsys)
    assert bake(model, files / "missing.safetensors", "-o", tmp_path / "a.safetensors") == 1
    assert "missing.safetensors: no such file" in error(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.safetensors"]


def test_an_interrupted_bake_leaves_no_file(files, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(baking.effect.Effect, "add", interrupted)
    assert bake(files / "model.safetensors", files / "style.safetensors", "-o", tmp_path / "a.safetensors") == 130
    assert error(capsys) == "lora-guard: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_changes_meanwhile_is_noticed(files, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model.safetensors"
    model.write_bytes((files / "model.safetensors").read_bytes())
    read = command.metadata_for

    def rewritten(header, loras):
        model.write_bytes(model.read_bytes() + b"x")
        return read(header, loras)

    monkeypatch.setattr(command, "metadata_for", rewritten)
    assert bake(model, files / "style.safetensors", "-o", tmp_path / "a.safetensors") == 1
    assert "bytes as when its header was read" in error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_recorded_hash_is_of_the_bytes_that_were_baked(files, tmp_path, capsys, monkeypatch):
    """The LoRA is replaced after it was read, as a trainer does that saves again: all is read anew."""
    lora, out = tmp_path / "style.safetensors", tmp_path / "a.safetensors"
    first, second = (files / f"{name}.safetensors" for name in ("faint", "style"))
    lora.write_bytes(first.read_bytes())
    read, times = command.read_lora_file, []

    def replaced(path, room):
        file = read(path, room=room)
        if not times:
            lora.write_bytes(second.read_bytes())
        times.append(1)
        return file

    monkeypatch.setattr(command, "read_lora_file", replaced)
    assert bake(files / "model.safetensors", lora, "-o", out) == 0
    assert len(times) == 2
    (said,) = json.loads(open_header(out).metadata["lora_guard.baked"])
    assert said["sha256"] == hashlib.sha256(second.read_bytes()).hexdigest()
    assert bake(files / "model.safetensors", second, "-o", tmp_path / "b.safetensors") == 0
    baked, wanted = load_file(out), load_file(tmp_path / "b.safetensors")
    assert all(same_bits(baked[name], wanted[name]) for name in wanted)


def test_a_lora_that_goes_before_its_hash_is_known_is_said(files, tmp_path, capsys, monkeypatch):
    lora = tmp_path / "style.safetensors"
    lora.write_bytes((files / "style.safetensors").read_bytes())
    read = command.read_lora_file

    def gone(path, room):
        file = read(path, room=room)
        lora.unlink(missing_ok=True)
        return file

    monkeypatch.setattr(command, "read_lora_file", gone)
    assert bake(files / "model.safetensors", lora, "-o", tmp_path / "a.safetensors") == 1
    assert error(capsys).startswith(f"lora-guard: {lora}: no such file")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_while_it_bakes_is_replaced_with_force_alone(files, tmp_path, capsys, monkeypatch):
    out, add = tmp_path / "a.safetensors", baking.effect.Effect.add

    def appears(*arguments):
        out.write_bytes(b"mine")
        return add(*arguments)

    monkeypatch.setattr(baking.effect.Effect, "add", appears)
    words = files / "model.safetensors", files / "style.safetensors", "-o", out
    assert bake(*words) == 1
    assert "a.safetensors: another program has made a file of this name meanwhile, and it stays" in error(capsys)
    assert out.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [out]
    assert bake(*words, "--force") == 0
    assert load_file(out).keys() == load_file(files / "model.safetensors").keys()


def test_what_a_killed_bake_has_left_goes_and_is_said(files, tmp_path, capsys):
    left = unfinished(tmp_path / "old.safetensors")
    dead = left.with_name(left.name.replace(f".{os.getpid()}-", ".999999999-"))
    for path in (left, dead):
        path.write_bytes(bytes(3 << 20))
    out = tmp_path / "a.safetensors"
    assert bake(files / "model.safetensors", files / "style.safetensors", "-o", out, "--json") == 0
    shown = capsys.readouterr()
    assert "removed what bakes that were killed have left here: 1 files, 3.0 MB" in shown.err
    assert json.loads(shown.out)["file"] == "a.safetensors"
    assert sorted(tmp_path.iterdir()) == sorted([out, left])


def test_many_skipped_keys_are_counted(files, tmp_path, capsys):
    tensors = load_file(files / "style.safetensors")
    tensors |= {f"lora_te1_text_model_encoder_layers_{n}_mlp_fc1.diff": torch.ones(2) for n in range(13)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert bake(files / "model.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "out.safetensors") == 0
    text = capsys.readouterr().out
    assert text.count("skipped: lora_te1_text_model") == 10
    assert "and 3 more; --json lists them all" in text


def test_the_choices_of_the_command_line_are_those_of_the_package():
    assert tuple(baking.DTYPES) == cli._BAKE_DTYPES


PEAK = """
import json, sys, torch
from pathlib import Path
from lib_lora_guard import cli
torch.set_num_threads(1)  # two of them wait for one another on a busy machine
cli.main(["bake", sys.argv[1], sys.argv[2], "-o", sys.argv[3], "--force"])  # what imports and first calls take
cli.main(["bake", *sys.argv[4:6], "-o", sys.argv[6], "--json"])
"""


def test_ram_peak_is_that_of_a_few_weights(files, tmp_path):
    """150 MB of bf16, the largest weight 12.6 MB in fp32; in a process of its own."""
    hidden = 512
    shapes = {}
    for n in range(18):
        shapes[f"double_blocks.{n}.img_attn.qkv.weight"] = (3 * hidden, hidden)
        shapes[f"double_blocks.{n}.img_mlp.0.weight"] = (4 * hidden, hidden)
        shapes[f"double_blocks.{n}.img_mlp.2.weight"] = (hidden, 4 * hidden)
    for n in range(8):
        shapes[f"single_blocks.{n}.linear1.weight"] = (7 * hidden, hidden)
        shapes[f"single_blocks.{n}.linear2.weight"] = (hidden, 5 * hidden)
    shapes["txt_in.weight"] = (hidden, 4096)
    shapes["vector_in.in_layer.weight"] = (6144, hidden)
    tensors = {name: torch.full(shape, 0.01 * (n % 7 + 1)).bfloat16() for n, (name, shape) in enumerate(shapes.items())}
    save_file(tensors, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    lora = {}
    for name, shape in shapes.items():
        if "blocks" in name:
            module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            lora |= {
                f"{module}.lora_up.weight": torch.ones(shape[0], 4),
                f"{module}.lora_down.weight": torch.ones(4, shape[1]),
            }
    save_file(lora, tmp_path / "a.safetensors")
    words = [files / "model.safetensors", files / "style.safetensors", tmp_path / "first.safetensors"]
    words += [tmp_path / "model.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors"]
    done = warm.run(PEAK, *words, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert size > 150e6
    assert found["file_bytes"] > size
    assert found["tensors_baked"] == 70
    # Measured 54 to 65 MB: a weight as stored, in fp32 twice and rounded, and what the allocator keeps of those before.
    assert found["ram_peak_bytes"] < 8 * found["largest_weight_fp32_bytes"] + found["lora_bytes"]
    assert found["ram_peak_bytes"] < 0.7 * size
    baked = load_file(tmp_path / "out.safetensors")
    name = "single_blocks.7.linear1.weight"
    assert same_bits(baked[name], (tensors[name].float() + 4).bfloat16())
