"""The command line with files of true size and no data: what `plan` and `inspect` say, and how they refuse."""

import errno
import io
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.fake_models import (
    flux_linears,
    flux_shapes,
    sdxl_checkpoint,
    sdxl_shapes,
    stored,
    write_gguf,
    write_lora,
    write_nf4,
    write_safetensors,
)
from support.fake_nvml import Card, library
from support.machine_speed import CpuTime

from lib_lora_guard import cli, memory
from lib_lora_guard.commands import arguments, page, plan_machine
from lib_lora_guard.memory import Nvml

GB = 1 << 30
SHAPES = flux_shapes()
LINEARS = flux_linears(SHAPES)
XL = {name: shape for name, shape in sdxl_shapes().items() if ".attn" in name and len(shape) == 2}
XL_CONVOLUTIONS = {name: shape for name, shape in sdxl_shapes().items() if name.endswith("in_layers.2.weight")}
SMALL = flux_shapes(hidden=256, double=2, single=2)
BIG_FILES = pytest.mark.skipif(os.name == "nt", reason="NTFS does not keep a truncated file sparse by itself")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small Flux files in several formats, SDXL, and LoRAs; the full-size ones are written by their own tests."""
    folder = tmp_path_factory.mktemp("models")
    write_safetensors(folder / "fp8.safetensors", stored(SMALL, "F8_E4M3"))
    write_nf4(folder / "nf4.safetensors", SMALL)
    write_gguf(folder / "q4.gguf", SMALL, "Q4_K")
    write_gguf(folder / "iq4.gguf", SMALL, "IQ4_XS")
    scaled = stored(SMALL, "F8_E4M3")
    for name in flux_linears(SMALL):
        scaled[name.removesuffix("weight") + "scale_weight"] = ("F32", (1,))
    scaled["scaled_fp8"] = ("F8_E4M3", (2,))
    write_safetensors(folder / "scaled.safetensors", scaled)
    write_lora(folder / "small.safetensors", flux_linears(SMALL))
    write_lora(folder / "style.safetensors", LINEARS)
    words = {
        "ss_tag_frequency": json.dumps({"10_cat": {"cat": 9, "sitting": 3}}),
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    write_lora(folder / "xl.safetensors", XL, rank=8, alpha=4.0, form="F16", metadata=words)
    return folder


def plan(*words, vram="12GB", ram="16GB"):
    return cli.main(["plan", *map(str, words), "--vram", vram, "--ram", ram])


def document(capsys, *words, **sizes):
    assert plan(*words, "--json", **sizes) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys):
    """The one line on stderr."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.isprintable() or err[:-1].isprintable()
    return err[:-1]


@BIG_FILES
def test_flux_dev_of_true_size_answers_within_a_second(files, tmp_path, capsys):
    model = tmp_path / "flux1-dev-bf16.safetensors"
    whole = write_safetensors(model, stored(SHAPES, "BF16"))
    assert whole == 23802816640
    cli.main(["plan", str(model), str(files / "style.safetensors"), "--vram", "24", "--ram", "32"])  # imports
    capsys.readouterr()
    with CpuTime(5):  # 0.3 s on two free cores; the limit is for shared ones
        found = document(capsys, model, f"{files / 'style.safetensors'}:0.8", vram="24GB", ram="32GB")
    assert found["model"]["part_bytes"]["denoiser"] == whole
    (lora,) = found["loras"]
    factors = 2 * 16 * sum(rows + columns for rows, columns in LINEARS.values())
    assert lora["modules"] == lora["modules_used"] == 304
    assert lora["strength"] == 0.8
    assert (lora["keys_skipped"], lora["keys_lost"], lora["made_for"]) == (0, 0, "Flux")
    assert lora["modes"] == {"bypass": {"weights": 304, "bytes": factors, "reasons": ["low rank"]}}
    assert lora["tensor_bytes"] == factors
    assert (lora["kinds"], lora["ranks"], lora["dtypes"]) == ({"lora": 304}, {"16": 304}, {"bf16": 608})
    guard, merge, on_the_fly = found["predicted"]
    assert (guard["model_swapped_bytes"], guard["ram_backup_bytes"]) == (0, 0)
    assert merge["ram_backup_bytes"] == sum(2 * math.prod(shape) for shape in LINEARS.values())
    assert on_the_fly["apply_seconds"] == merge["apply_seconds"]


def test_the_json_document_has_stable_names_with_units(files, capsys):
    found = document(capsys, files / "fp8.safetensors", files / "small.safetensors")
    assert list(found) == [
        "schema", "version", "model", "machine", "picture", "mode", "loras", "predicted", "advice", "fits", "answer", "beside",
        "notes",
    ]  # fmt: skip
    assert found["schema"] == "lora-guard/plan/1"
    assert found["machine"]["vram_bytes"] == 12 * GB
    assert found["machine"]["assumed_rates"]["gpu"] == "RTX 3060"
    assert [p["way"] for p in found["predicted"]] == ["LoRA Guard", "Forge Automatic", "Forge fp16 LoRA"]
    assert list(found["predicted"][0]) == [
        "way", "fits", "problem", "lora_effect", "vram_peak_bytes", "vram_missing_bytes", "model_on_gpu_bytes",
        "model_swapped_bytes", "lora_on_gpu_bytes", "ram_peak_bytes", "ram_missing_bytes", "ram_backup_bytes",
        "apply_seconds", "change_strength_seconds", "extra_step_seconds",
    ]  # fmt: skip
    assert found["picture"] == {
        "width": 1024, "height": 1024, "batch": 1, "forward_batch": 1, "image_tokens": 4096, "text_tokens": 512,
    }  # fmt: skip


TEXT_AND_VAE = {
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
    "vae.decoder.conv_in.weight": (512, 16, 3, 3),
}


ASSUMED = {"clip_l": ("CLIP-L", 307), "t5": ("T5 fp8", 4919), "vae": ("VAE", 160)}
"""The name, and the MB that the replay's own arithmetic gives it."""


@pytest.mark.parametrize(
    ("more", "missing"),
    [
        ([], ["text_encoders", "vae"]),
        (["text_encoders"], ["vae"]),
        (["vae"], ["text_encoders"]),
        (["text_encoders", "vae"], []),
        (["text_encoders.clip_l", "vae"], ["t5"]),
        (["text_encoders.t5xxl", "vae"], ["clip_l"]),
    ],
)
def test_parts_that_lie_in_other_files_are_counted_and_said_to_be_assumed(
    files, tmp_path, capsys, monkeypatch, more, missing
):
    monkeypatch.setenv("COLUMNS", "300")
    parts = {name: shape for name, shape in TEXT_AND_VAE.items() if name.startswith(tuple(more))} if more else {}
    model = {f"model.diffusion_model.{name}": shape for name, shape in SMALL.items()} | parts
    write_safetensors(tmp_path / "model.safetensors", stored(model, "F8_E4M3"))
    found = document(capsys, tmp_path / "model.safetensors", files / "small.safetensors")
    kinds = [kind for part in missing for kind in (["clip_l", "t5"] if part == "text_encoders" else [part])]
    wanted = [ASSUMED[kind] for kind in kinds]
    assert found["model"]["not_in_file"] == [
        part if part in ("text_encoders", "vae") else "text_encoders" for part in missing
    ]
    assert [(one["name"], round(one["bytes"] / 2**20), one["is_assumed"]) for one in found["beside"]] == [
        (name, size, True) for name, size in wanted
    ]
    assert (found["model"]["not_counted"], found["fits"]) == ([], True)
    assert [one["fits"] for one in found["predicted"]] == [True] * 3
    sizes = sum(one["bytes"] for one in found["beside"]) + sum(
        size for part, size in found["model"]["part_bytes"].items() if part != "denoiser"
    )
    # Beside the process and the LoRA.
    assert 0 <= found["predicted"][0]["ram_peak_bytes"] - int(2.4 * GB) - sizes < 20 << 20
    assert plan(tmp_path / "model.safetensors", files / "small.safetensors") == 0
    text = capsys.readouterr().out
    assert text.startswith("Fits: needs ")
    assert text.splitlines()[1:2] == (
        [
            f"Counted beside the model file: {', '.join(f'{name} {size / 1024:.1f} GB (assumed)' for name, size in wanted)}. What "
            "is assumed is what most people load; --with FILE... counts your own files."
        ]
        if wanted
        else [""]
    )


T5_SHAPES = {
    "shared.weight": (1000, 4096),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
}


@pytest.mark.parametrize(
    ("name", "shapes", "kinds", "size"),
    [
        ("t5.safetensors", T5_SHAPES, [["t5"]], 1000 * 4096 * 4 + 4096 * 4096 * 2),
        ("ae.safetensors", {"decoder.conv_in.weight": (512, 16, 3, 3), "encoder.conv_out.weight": (32, 512, 3, 3)}, [[]], 442368),
        ("clip.safetensors", {"text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768), "text_model.final_layer_norm.weight": (768,)}, [["clip_l"]], 768 * 769 * 2),
    ],
)  # fmt: skip
def test_files_of_other_parts_are_counted_instead_of_what_is_assumed(
    files, tmp_path, capsys, name, shapes, kinds, size
):
    write_safetensors(tmp_path / name, stored(shapes, "F16", "F16"))
    words = (files / "fp8.safetensors", files / "small.safetensors", "--with", tmp_path / name)
    found = document(capsys, *words)
    given = [one for one in found["beside"] if not one["is_assumed"]]
    assert [(one["name"], one["kinds"], one["bytes"]) for one in given] == [(name, kinds[0], size)]
    assert len(found["beside"]) == 3
    assert plan(*words, files / "small.safetensors") == 1
    assert error(capsys) == (
        "lora-guard: small.safetensors: expected a model, found a LoRA; give the checkpoint first, then the LoRAs"
    )


@BIG_FILES
def test_a_vae_in_the_file_counts_as_it_is_loaded(files, tmp_path, capsys):
    """Hosts take it in 16 bit."""
    peaks = set()
    for form in ("F32", "F16"):
        tensors = {f"model.diffusion_model.{name}": one for name, one in stored(SMALL, "F8_E4M3").items()}
        tensors["vae.decoder.conv_in.weight"] = (form, (4096, 4096, 3, 3))
        write_safetensors(tmp_path / "model.safetensors", tensors)
        found = document(capsys, tmp_path / "model.safetensors", files / "small.safetensors")
        peaks.add(found["predicted"][0]["ram_peak_bytes"])
    assert len(peaks) == 1


def test_nothing_is_said_to_fit_while_the_size_of_a_part_is_not_known(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    shapes = {f"transformer_blocks.{n}.attn1.to_{x}.weight": (1152, 1152) for n in range(2) for x in "qkv"}
    write_safetensors(tmp_path / "pixart.safetensors", stored(shapes, "BF16"))
    write_lora(tmp_path / "lora.safetensors", shapes, prefix="lora_transformer_")
    words = (tmp_path / "pixart.safetensors", tmp_path / "lora.safetensors")
    found = document(capsys, *words)
    assert (found["model"]["not_counted"], found["fits"]) == (["text_encoders", "vae"], None)
    assert [one["fits"] for one in found["predicted"]] == [None] * 3
    assert plan(*words) == 0
    text = capsys.readouterr().out
    assert text.startswith("Open: ")
    assert (
        "without text encoder and VAE, whose size is not known; give the file with --with FILE" in text.splitlines()[0]
    )
    assert "fits: " not in text
    row = next(line for line in text.splitlines() if line.strip().startswith("fits "))
    assert row.split() == ["fits", *["open"] * 3]
    assert plan(*words, ram="4MB") == 0
    assert capsys.readouterr().out.startswith(
        "Does not fit, even without text encoder and VAE: needs 2.4 GB of RAM and 2 GB"
    )


@BIG_FILES
def test_the_example_of_the_readme_does_not_fit_and_names_the_file_that_would(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    model = tmp_path / "flux1-dev-fp8.safetensors"
    write_safetensors(model, stored(SHAPES, "F8_E4M3"))
    words = (model, f"{files / 'style.safetensors'}:0.8", "--gpu", "RTX 3060")
    found = document(capsys, *words)
    assert found["fits"] is False
    replayed = 17761.05  # MB, row 1 of docs/replay.md: the same card, model and text encoders
    assert found["predicted"][0]["ram_peak_bytes"] / 2**20 == pytest.approx(replayed, rel=0.001)
    assert plan(*words) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "Does not fit: needs 17.3 GB of RAM and 2 GB for the system, 16.0 GB there; flux1-dev-Q4_K_S.gguf (about 6.7 GB to "
        "download) would"
    )
    assert plan(*words, ram="32GB") == 0
    assert capsys.readouterr().out.startswith(
        "Fits, but slowly: 0.9 GB of the model lie in RAM and are copied to the card"
    )
    whole = {f"model.diffusion_model.{name}": shape for name, shape in SHAPES.items()} | t5_shapes()
    write_safetensors(model, stored(whole, "F8_E4M3"))
    in_the_file = document(capsys, *words)
    assert [one["name"] for one in in_the_file["beside"]] == ["CLIP-L", "VAE"]
    assert in_the_file["predicted"][0]["ram_peak_bytes"] / 2**20 == pytest.approx(replayed, rel=0.001)


def t5_shapes():
    """T5-XXL's encoder without its norms, which a checkpoint may hold too."""
    t5 = "text_encoders.t5xxl.transformer"
    block = {f"0.SelfAttention.{name}": (4096, 4096) for name in "qkvo"}
    block |= {"1.DenseReluDense.wi_0": (10240, 4096), "1.DenseReluDense.wi_1": (10240, 4096)}
    block |= {"1.DenseReluDense.wo": (4096, 10240)}
    blocks = {f"{t5}.encoder.block.{n}.layer.{name}.weight": shape for n in range(24) for name, shape in block.items()}
    return {f"{t5}.shared.weight": (32128, 4096), **blocks}


FUSED = "diffusion_model.double_blocks.0.img_attn.qkv"


@pytest.mark.parametrize(
    "wrong",
    [
        {f"{FUSED}.diff": ("F32", (700, 256))},
        {f"{FUSED}.lora_B.weight": ("F32", (700, 4)), f"{FUSED}.lora_A.weight": ("F32", (4, 256))},
        {f"{FUSED}.lokr_w1": ("F32", (7, 2)), f"{FUSED}.lokr_w2": ("F32", (100, 128))},
    ],
    ids=["diff", "lora", "lokr"],
)
def test_a_fused_tensor_of_a_wrong_size_names_its_file_and_costs_no_other_lora(tmp_path, capsys, wrong):
    """On a model whose q, k and v are apart: there the tensor is cut before it is compared."""
    blocks = ("transformer_blocks.0", "transformer_blocks.1")
    shapes = {f"{block}.attn.to_{part}.weight": (256, 256) for block in blocks for part in ("q", "k", "v", "out.0")}
    shapes |= {"single_transformer_blocks.0.proj_out.weight": (256, 1280), "x_embedder.weight": (256, 64)}
    write_safetensors(tmp_path / "model.safetensors", stored(shapes, "BF16"))
    write_safetensors(tmp_path / "bad.safetensors", wrong)
    good = "transformer.transformer_blocks.0.attn.to_q"
    factors = {f"{good}.lora_B.weight": ("F32", (256, 4)), f"{good}.lora_A.weight": ("F32", (4, 256))}
    write_safetensors(tmp_path / "good.safetensors", factors)
    loras = document(capsys, *(tmp_path / f"{name}.safetensors" for name in ("model", "bad", "good")))["loras"]
    assert [(lora["file"], lora["is_usable"]) for lora in loras] == [
        ("bad.safetensors", False),
        ("good.safetensors", True),
    ]
    assert "qkv" in loras[0]["refused"]
    assert plan(tmp_path / "model.safetensors", tmp_path / "bad.safetensors") == 1
    assert error(capsys).startswith("lora-guard: bad.safetensors: ")
    assert cli.main(["inspect", str(tmp_path / "bad.safetensors"), "--model", str(tmp_path / "model.safetensors")]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("Does not fit model.safetensors: ")
    assert "bad.safetensors: LoRA for" in shown.out
    assert "does NOT fit" in shown.out
    assert shown.err.startswith("lora-guard: bad.safetensors: ")


def test_what_does_not_fit_without_the_missing_parts_does_not_fit(files, capsys):
    found = document(capsys, files / "fp8.safetensors", files / "small.safetensors", vram="1MB", ram="1MB")
    assert [one["fits"] for one in found["predicted"]] == [False] * 3


@pytest.mark.parametrize(
    ("model", "formats", "effects"),
    [
        ("fp8.safetensors", "fp8_e4m3fn", ["whole", "mostly lost", "whole"]),
        ("scaled.safetensors", "fp8_e4m3fn", ["whole", "mostly lost", "whole"]),
        ("nf4.safetensors", "nf4", ["whole", "mostly lost", "whole"]),
        ("q4.gguf", "Q4_K", ["whole", "none", "whole"]),
        ("iq4.gguf", "IQ4_XS", ["none", "none", "none"]),
    ],
)
def test_formats_of_models(files, capsys, model, formats, effects):
    found = document(capsys, files / model, files / "small.safetensors")
    assert found["model"]["architecture"] == "Flux"
    # GGUF keeps matrices in F32 whose rows are no whole blocks: here img_in's.
    others = {"F32": 64 * 256} if model.endswith("gguf") else {}
    values = sum(math.prod(s) for s in SMALL.values() if len(s) == 2) - sum(others.values())
    assert found["model"]["formats"] == {formats: values, **others}
    assert found["loras"][0]["modules_used"] == len(flux_linears(SMALL)) == 26
    assert list(found["loras"][0]["modes"]) == ["bypass"]
    assert [p["lora_effect"] for p in found["predicted"]] == effects
    assert found["model"]["is_scaled_fp8"] is (model == "scaled.safetensors")


def test_bytes_of_nf4_count_its_scales(files, capsys):
    found = document(capsys, files / "nf4.safetensors", files / "small.safetensors")
    matrices = [math.prod(shape) for shape in SMALL.values() if len(shape) == 2]
    expected = sum(n // 2 + n // 64 * 4 + 16 * 4 for n in matrices)
    expected += sum(2 * math.prod(shape) for shape in SMALL.values() if len(shape) == 1)
    assert found["model"]["denoiser_memory_bytes"] == expected


def test_bytes_of_gguf_are_those_once_baked(files, capsys):
    model = document(capsys, files / "q4.gguf", files / "small.safetensors")["model"]
    values, others = model["formats"]["Q4_K"], sum(math.prod(s) for s in SMALL.values() if len(s) == 1) + 64 * 256
    assert model["part_bytes"]["denoiser"] == values * 144 // 256 + 4 * others
    assert model["denoiser_memory_bytes"] == values * 160 // 256 + 4 * others
    for name, says in (
        ("q4.gguf", f", {values * 16 / 256 / 2**20:.1f} MB larger once Forge has loaded it"),
        ("iq4.gguf", ""),
    ):
        plan(files / name, files / "small.safetensors")
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "stored as" in line]
        assert line.endswith(" %" + says)


def test_sdxl_with_text_encoder_and_convolutions(files, tmp_path, capsys):
    model, lora = tmp_path / "sdxl.safetensors", tmp_path / "locon.safetensors"
    if os.name == "nt":
        pytest.skip("NTFS does not keep a truncated file sparse by itself")
    write_safetensors(model, stored(sdxl_checkpoint(), "F16", "F16"))
    write_lora(lora, {**XL, **XL_CONVOLUTIONS}, rank=4, form="F16")
    found = document(capsys, model, lora, files / "xl.safetensors", vram="8GB")
    parts = found["model"]["part_bytes"]
    assert found["model"]["architecture"] == "SDXL"
    # The published U-Net has 2.567e9 parameters.
    assert parts["denoiser"] == pytest.approx(2 * 2.567e9, rel=0.01)
    assert parts["text_encoders"] > GB
    assert parts["vae"] == 2 * 512 * 4 * 9
    first, second = found["loras"]
    assert first["modes"]["bypass"]["weights"] == first["modules_used"] == len(XL) + len(XL_CONVOLUTIONS)
    assert first["modes"]["bypass"]["bytes"] == first["tensor_bytes"]
    assert second["modes"]["bypass"]["weights"] == 560
    assert found["picture"]["forward_batch"] == 2
    # In 16 bit Forge's "fp16 LoRA" is a merge as well.
    assert found["predicted"][2] == {**found["predicted"][1], "way": "Forge fp16 LoRA"}


def test_a_lora_for_another_architecture_is_named_in_its_row(files, capsys):
    words = (files / "fp8.safetensors", files / "small.safetensors", files / "xl.safetensors")
    good, bad = document(capsys, *words)["loras"]
    assert good["is_usable"]
    assert not bad["is_usable"]
    assert bad["refused"] == "made for SDXL, this is Flux; use a LoRA for Flux, or load a SDXL model"
    assert (bad["modules_used"], bad["modes"]) == (0, {})


def test_where_no_lora_can_be_used_the_exit_code_says_so(files, capsys):
    assert plan(files / "fp8.safetensors", files / "xl.safetensors") == 1
    shown = capsys.readouterr()
    assert "CANNOT BE USED: made for SDXL, this is Flux" in shown.out
    assert "Predicted for" not in shown.out
    assert (
        shown.err
        == "lora-guard: xl.safetensors: made for SDXL, this is Flux; use a LoRA for Flux, or load a SDXL model\n"
    )


def test_a_lora_of_another_size_cannot_be_used(files, capsys):
    # Flux names, other widths.
    assert plan(files / "fp8.safetensors", files / "style.safetensors", "--json") == 1
    refused = json.loads(capsys.readouterr().out)["loras"][0]["refused"]
    assert refused.startswith(
        "made for another model: double_blocks.0.img_mod.lin.weight: up @ down gives [18432, 3072]"
    )


@pytest.mark.parametrize(("mode", "expected"), [("auto", "bypass"), ("bypass", "bypass"), ("on_the_fly", "on_the_fly")])
def test_the_wish_is_followed(files, capsys, mode, expected):
    found = document(capsys, files / "fp8.safetensors", files / "small.safetensors", "--mode", mode)
    assert list(found["loras"][0]["modes"]) == [expected]
    assert found["mode"] == mode


def test_merging_into_low_bits_is_refused(files, capsys):
    assert plan(files / "nf4.safetensors", files / "small.safetensors", "--mode", "merge") == 1
    assert error(capsys).startswith(
        "lora-guard: nf4.safetensors: model.diffusion_model.double_blocks.0.img_mod.lin.weight: stored as nf4; merging would"
    )


def test_the_page_says_what_is_predicted_and_assumed(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        plan(
            files / "fp8.safetensors", f"{files / 'small.safetensors'}:0.5", "--gpu", "4090", "--resolution", "768x512"
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "small.safetensors, strength 0.5: made for Flux" in text
    assert "26 modules used, 0 keys skipped, 0 lost" in text
    assert "bypass on 26 weights (low rank)" in text
    assert "Predicted for RTX 4090, 12.0 GB VRAM free, 16.0 GB RAM; 768x512, batch 1" in text
    assert "Assumed for RTX 4090: memory 1008 GB/s, 16-bit matrices 165 TFLOPS of which 50 % are reached" in text
    assert text.startswith("Fits: needs ")
    assert "text encoders and VAE not or not all in this file" in text


def test_the_tables_fit_a_console_of_80_columns(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert plan(files / "q4.gguf", files / "small.safetensors") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


HOSTILE = "[red]x[/red]\x1b[31m\u202eevil\n"


def test_hostile_names_are_neutralised(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    model, lora = tmp_path / "[bold]m[i].safetensors", tmp_path / "[blink]l[i].safetensors"
    write_safetensors(model, stored({**SMALL, f"{HOSTILE}.weight": (4, 4)}, "F8_E4M3"))
    extra = {**flux_linears(SMALL), f"{HOSTILE}.weight": (8, 8), "[link=x]nowhere.weight": (4, 4)}
    metadata = {"ss_base_model_version": HOSTILE, "modelspec.title": "[red]t[/red]", "ss_network_module": "\x9b2J"}
    write_lora(lora, extra, metadata=metadata)
    for words in (["inspect", str(lora), "--model", str(model)], ["inspect", str(lora)]):
        cli.main(words)
    plan(model, lora)
    cli.main(["plan", str(model), str(lora), "--vram", "1", "--ram", "1", "--json"])
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert "[bold]m[i].safetensors" in shown.out
    assert "[blink]l[i].safetensors" in shown.out
    assert "[red]x[/red]?[31m??evil?" not in shown.out  # the line break and the escape are single '?'
    assert "[red]x[/red]?[31m?evil?" in shown.out
    assert "[red]t[/red]" in shown.out


GARBAGE = {
    "empty.safetensors": b"",
    "noise.safetensors": bytes(range(256)),
    "page.safetensors": b"<!DOCTYPE html>",
    "cut.safetensors": (10**6).to_bytes(8, "little") + b'{"a"',
    "lora.pt": b"PK\x03\x04abc",
    "old.ckpt": b"\x80\x02}q\x00.",
    "bad.gguf": b"GGUF\x03\x00\x00\x00\xff",
    "shape.safetensors": (59).to_bytes(8, "little")
    + b'{"x.weight":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'[:59],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused_in_one_line(files, tmp_path, capsys, name):
    path = tmp_path / name
    path.write_bytes(GARBAGE[name])
    for words in ([path, files / "small.safetensors"], [files / "fp8.safetensors", path]):
        assert plan(*words) == 1
        line = error(capsys)
        assert line.startswith(f"lora-guard: {name}: ")
        assert "; " in line
    assert cli.main(["inspect", str(path)]) == 1
    line = error(capsys)
    assert "expected " in line
    if path.suffix in (".pt", ".ckpt"):
        assert "convert it to safetensors" in line


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.hada_w1_a": (8, 4), "x.hada_w1_b": (), "x.hada_w2_a": (8, 4), "x.hada_w2_b": (4, 8), "x.alpha": ()},
        {"x.lora_up.weight": (8, 4), "x.lora_down.weight": (0, 8), "x.alpha": ()},
        {"x.a1.weight": (4,), "x.a2.weight": (), "x.b1.weight": (), "x.b2.weight": (4, 4), "x.bm.weight": (3, 3)},
        {"x.lokr_w1": (), "x.lokr_w2_a": (), "x.lokr_w2_b": (), "x.alpha": ()},
    ],
)
def test_factors_that_do_not_go_together_are_one_line(files, tmp_path, capsys, tensors):
    path = tmp_path / "odd.safetensors"
    module = "lora_unet_double_blocks_0_img_mlp_0"
    write_safetensors(path, {module + name[1:]: ("F32", shape) for name, shape in tensors.items()})
    assert plan(files / "fp8.safetensors", path) == 1
    assert error(capsys).startswith("lora-guard: odd.safetensors: ")
    assert cli.main(["inspect", str(path)]) in (0, 1)


def test_files_in_the_wrong_place_are_named(files, tmp_path, capsys):
    assert plan(files / "small.safetensors", files / "small.safetensors") == 1
    assert error(capsys) == (
        "lora-guard: small.safetensors: expected a model, found a LoRA; give the checkpoint first, then the LoRAs"
    )
    assert plan(files / "fp8.safetensors", files / "fp8.safetensors") == 1
    assert "no LoRA keys found" in error(capsys)
    assert plan(files / "fp8.safetensors", tmp_path / "none.safetensors") == 1
    assert error(capsys).endswith("none.safetensors: no such file; check its name and folder, or refresh the list")
    assert cli.main(["inspect", str(files / "q4.gguf")]) == 1
    assert (
        error(capsys)
        == "lora-guard: q4.gguf: expected a LoRA in safetensors format, found a gguf model; choose a LoRA, or load this file as the model"
    )


def test_a_damaged_bitsandbytes_state_is_refused(tmp_path, files, capsys):
    path = tmp_path / "nf4.safetensors"
    tensors = {
        "x.weight": ("U8", (32, 1)),
        "x.weight.absmax": ("F32", (1,)),
        "x.weight.quant_state.bitsandbytes__nf4": ("U8", (4,)),
    }
    write_safetensors(path, tensors, values={"x.weight.quant_state.bitsandbytes__nf4": b"nope"})
    assert plan(path, files / "small.safetensors") == 1
    assert "expected JSON" in error(capsys)
    write_safetensors(path, {"x.weight": ("U8", (32, 2))})
    assert plan(path, files / "small.safetensors") == 1
    assert "found uint8 without a bitsandbytes state" in error(capsys)


def test_debug_shows_the_traceback_before_and_after_the_command(files, tmp_path):
    missing = str(tmp_path / "none.safetensors")
    for words in (["--debug", "inspect", missing], ["inspect", missing, "--debug"]):
        with pytest.raises(ValueError, match="no such file"):
            cli.main(words)


def test_a_lora_that_changes_nothing_is_named(files, capsys):
    assert plan(files / "fp8.safetensors", f"{files / 'small.safetensors'}:0", files / "xl.safetensors") == 0
    text = capsys.readouterr().out
    assert text.startswith("Cannot be used on this model: xl.safetensors (why: below); Fits: ")
    assert "small.safetensors, strength 0: made for Flux, " in text
    assert text.count("strength 0: it changes nothing in the picture") == 1


def test_a_model_alone_is_planned(files, capsys):
    assert plan(files / "fp8.safetensors") == 0
    text = capsys.readouterr().out
    assert text.startswith("Fits: needs ")
    assert "- LoRA Guard fits: 0.1 GB of VRAM and 7.7 GB of RAM at the peak.\n" in text
    assert "time to apply" not in text
    assert "backup" not in text
    found = document(capsys, files / "fp8.safetensors")
    assert (found["fits"], found["loras"], len(found["predicted"])) == (True, [], 3)


WORDS = re.compile(
    r"LoRA|DoRA|Guard|Forge|Automatic|GPU|RTX|GB|MB|Flux|SDXL|VAE|CLIP-L|CPU|PCIe|TFLOPS|Weights|NF4|GGUF|gguf|U-Net|transformer|safetensors|lora|"
    r"alpha|--with|Q4\w*|f?F?p?16|F32|BF16|bf16|fp8\w*|ss_\w+|sdxl_\S+"
)
"""Names that Chinese users know by their Latin letters."""


def test_pages_in_chinese_are_chinese(files, capsys, monkeypatch):
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    model, lora, xl = (str(files / name) for name in ("fp8.safetensors", "small.safetensors", "xl.safetensors"))
    assert plan(model, lora, xl, "--batch", "2", "--mode", "bypass") == 0
    assert plan(files / "q4.gguf", lora, vram="1MB", ram="1MB") == 0
    assert cli.main(["inspect", lora, "--model", model]) == 0
    assert cli.main(["inspect", xl, "--model", model]) == 1
    out, err = capsys.readouterr()
    words = re.findall(
        r"(?<![\w.-])-{0,2}[A-Za-z][\w-]*(?![\w-]*\.(?:safetensors|gguf))", out.replace(".safetensors", "")
    )
    assert {word for word in words if len(word) > 2 and not WORDS.fullmatch(word)} <= {"small", "cat", "sitting"}
    assert (
        err
        == "lora-guard: xl.safetensors：此 LoRA 用于 SDXL，当前模型是 Flux；请使用适用于 Flux 的 LoRA，或加载 SDXL 模型\n"
    )
    with pytest.raises(SystemExit, match="2"):
        plan(model, lora, vram="12000")
    err = capsys.readouterr().err
    assert "错误：参数 --vram：应为大小，例如 12GB 或 8192MB，实际为 '12000'：请写成 12000MB（11.7 GB）；" in err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect"])
    assert "错误：缺少以下参数：LORA；用法见 " in capsys.readouterr().err


def test_a_console_without_chinese_letters_is_spoken_to_in_english(monkeypatch):
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    for encoding, language in (("utf-8", "zh"), ("gbk", "zh"), ("cp1252", "en"), ("ascii", "en"), ("none", "en")):
        monkeypatch.setattr(page.sys, "stdout", SimpleNamespace(encoding=encoding))
        assert page.users_language() == language


def test_inspect_says_what_the_file_is(files, capsys):
    assert cli.main(["inspect", str(files / "xl.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "lora-guard/inspect/1"
    assert (found["made_for"], found["container"]) == ("SDXL", "safetensors")
    assert (found["modules"], found["kinds"], found["parts"]) == (560, {"lora": 560}, {"U-Net": 560})
    assert (found["ranks"], found["alphas"], found["scales"]) == ({"8": 560}, {"4": 560}, {"0.5": 560})
    assert (found["dtypes"], found["dora_modules"], found["unknown_keys"]) == ({"fp16": 1120}, 0, 0)
    assert found["tensor_bytes"] == 2 * 8 * sum(sum(shape) for shape in XL.values())
    assert found["file_bytes"] == (files / "xl.safetensors").stat().st_size
    assert found["metadata"] == {"ss_base_model_version": "sdxl_base_v1-0"}
    assert found["trained_words"] == ["cat", "sitting"]
    assert found["fit"] is None


def test_inspect_with_a_model_says_what_fits(files, tmp_path, capsys):
    lora = tmp_path / "more.safetensors"
    text = {"te1_text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)}
    write_lora(tmp_path / "text.safetensors", text, prefix="lora_")
    tensors = flux_linears(SMALL) | {"double_blocks.9.img_mlp.0.weight": (1024, 256)}
    write_lora(lora, tensors)
    assert cli.main(["inspect", str(lora), "--model", str(files / "fp8.safetensors"), "--json"]) == 0
    fit = json.loads(capsys.readouterr().out)["fit"]
    assert fit["is_usable"]
    assert (fit["modules_used"], fit["keys_skipped"], fit["keys_lost"]) == (26, 1, 0)
    assert fit["first_skipped"] == ["lora_unet_double_blocks_9_img_mlp_0.lora_up.weight"]
    words = ["inspect", str(tmp_path / "text.safetensors"), "--model", str(files / "fp8.safetensors"), "--json"]
    assert cli.main(words) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == f"Does not fit fp8.safetensors: {found['fit']['refused']}"
    assert found["parts"] == {"CLIP-L": 1}
    assert (
        found["fit"]["refused"]
        == "it changes text encoders alone and this file has none; give a checkpoint that has them"
    )


def test_dora_loha_and_unknown_keys_are_counted(tmp_path, capsys):
    path = tmp_path / "mixed.safetensors"
    a, b = "lora_unet_double_blocks_0_img_mlp_0", "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        f"{a}.lora_up.weight": ("F16", (64, 4)), f"{a}.lora_down.weight": ("F16", (4, 16)), f"{a}.dora_scale": ("F16", (64, 1)),
        f"{b}.hada_w1_a": ("BF16", (64, 4)), f"{b}.hada_w1_b": ("BF16", (4, 16)), f"{b}.hada_w2_a": ("BF16", (64, 4)),
        f"{b}.hada_w2_b": ("BF16", (4, 16)), "optimizer.step": ("F32", (2,)),
    }  # fmt: skip
    write_safetensors(path, tensors)
    assert cli.main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kinds"], found["dora_modules"]) == ({"lora": 1, "loha": 1}, 1)
    assert (found["unknown_keys"], found["first_unknown"]) == (1, ["optimizer.step"])
    assert (found["dtypes"], found["scales"]) == ({"bf16": 4, "fp16": 3, "fp32": 1}, {})
    assert found["parts"] == {"transformer": 1, "CLIP-L": 1}
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "DoRA on 1" in text
    assert "1 keys, first: optimizer.step" in text


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
        (r"C:\loras\x.safetensors:0.8", r"C:\loras\x.safetensors", 0.8),
        (r"C:\x.safetensors:.5", r"C:\x.safetensors", 0.5),
        ("C:/x.safetensors:2", "C:/x.safetensors", 2.0),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("a.safetensors:", "a.safetensors:", 1.0),
        (":0.8", ":0.8", 1.0),
        ("a.safetensors:nan", "a.safetensors:nan", 1.0),
    ],
)
def test_lora_and_strength(text, path, strength):
    assert arguments.lora(text) == (Path(path), strength)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * GB),
        ("12 GiB", 12 * GB),
        ("8192MB", 8 * GB),
        ("12", 12 * GB),
        ("1.5g", 3 * GB // 2),
        ("512 mib", GB // 2),
    ],
)
def test_sizes(text, size):
    assert arguments.size(text) == size


@pytest.mark.parametrize(
    "words",
    [
        ["--vram", "many"], ["--vram", "0"], ["--vram", "-4GB"], ["--ram", "12TB"], ["--resolution", "1024"],
        ["--ram", "12000"], ["--resolution", "1x1"], ["--batch", "0"], ["--batch", "1000"], ["--gpu", "9999"], ["--gpu", ""], ["--gpu", "?!"],
        ["--mode", "fast"],
    ],
)  # fmt: skip
def test_wrong_usage_is_code_2_and_says_what_was_expected(capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "m.safetensors", "l.safetensors", "--vram", "12", "--ram", "16", *words])
    assert stop.value.code == 2
    assert error(capsys).startswith("lora-guard plan: error: argument")
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "m.safetensors", "l.safetensors:1e999", "--vram", "12", "--ram", "16"])
    assert stop.value.code == 2


def test_a_fused_factor_of_another_size_is_said_with_its_file_and_stops_no_other(tmp_path, capsys):
    """On a model that has q, k and v apart, where the file's rows are cut."""
    torch, save_file = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").save_file
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj")
    shapes = {f"transformer_blocks.0.{name}.weight": (3072, 3072) for name in names}
    shapes["single_transformer_blocks.0.proj_mlp.weight"] = (12288, 3072)
    model = {name: torch.zeros(shape, dtype=torch.bfloat16).to(torch.float8_e4m3fn) for name, shape in shapes.items()}
    save_file(model, tmp_path / "model.safetensors")
    for name, rows in (("good", 9216), ("bad", 9000)):
        fused = "double_blocks.0.img_attn.qkv"
        factors = {f"{fused}.lora_down.weight": torch.ones(4, 3072), f"{fused}.lora_up.weight": torch.ones(rows, 4)}
        save_file(factors, tmp_path / f"{name}.safetensors")
    found = document(capsys, tmp_path / "model.safetensors", *(tmp_path / f"{n}.safetensors" for n in ("good", "bad")))
    assert [lora["refused"] is None for lora in found["loras"]] == [True, False]
    assert "qkv" in found["loras"][1]["refused"]
    bad, model_file = str(tmp_path / "bad.safetensors"), str(tmp_path / "model.safetensors")
    assert cli.main(["inspect", bad, "--model", model_file]) == 1
    assert "does NOT fit: " in capsys.readouterr().out
    assert plan(model_file, bad) == 1
    assert error(capsys).startswith("lora-guard: bad.safetensors: ")


def test_the_machine_is_read_where_it_is_not_given(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    card = ("NVIDIA GeForce RTX 4070 SUPER", 11 * GB)
    monkeypatch.setattr(plan_machine, "this_card", lambda: card)
    monkeypatch.setattr(plan_machine, "_ram_bytes", lambda: 32 * GB)
    words = ["plan", str(files / "fp8.safetensors"), str(files / "small.safetensors")]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "11.0 GB free" in text.splitlines()[0]
    assert (
        "Read from this machine: 11.0 GB of VRAM that Forge will find free, 32.0 GB of RAM, NVIDIA GeForce RTX 4070 SUPER\n"
        "NVIDIA GeForce RTX 4070 SUPER is not among the known cards: counted as RTX 4070, the nearest of them." in text
    )
    assert "they are those of RTX 4070.\n" in text
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["machine"]["vram_bytes"], found["machine"]["ram_bytes"]) == (11 * GB, 32 * GB)
    assert found["machine"]["assumed_rates"]["gpu"] == "RTX 4070"
    card = ("", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert (stop.value.code, "no NVIDIA card answers here" in error(capsys)) == (2, True)


@pytest.mark.parametrize(
    ("card", "counted", "english", "chinese"),
    [
        ("RTX 9999", "RTX 5090", "counted as RTX 5090, the nearest of them. ", "按最接近的 RTX 5090 计算。"),
        ("Radeon RX 7900 XTX", "RTX 3060", "counted as RTX 3060, a usual card for 12.0 GB of VRAM. ", "按 RTX 3060 计算，"),
    ],
)  # fmt: skip
def test_a_card_that_is_not_known_is_counted_as_another_and_said(
    files, capsys, monkeypatch, card, counted, english, chinese
):
    monkeypatch.setenv("COLUMNS", "300")
    words = [files / "fp8.safetensors", files / "small.safetensors", "--gpu", card]
    found = document(capsys, *words)
    assert found["machine"]["assumed_rates"]["gpu"] == counted
    known = document(capsys, *words[:-1], counted)
    assert {**found, "notes": []} == known
    for language, said in (("en", english), ("zh", chinese)):
        monkeypatch.setattr(cli, "users_language", lambda language=language: language)
        assert plan(*words) == 0
        text = capsys.readouterr().out
        assert card in text
        assert said in text


def test_a_card_says_what_forge_will_find_free(monkeypatch):
    """A host that runs now holds VRAM that its next start finds free."""
    monkeypatch.setattr(memory, "Nvml", lambda: Nvml(library(Card(total=12288, free=4000))))
    assert plan_machine.this_card() == ("NVIDIA GeForce RTX 3060", int(12 * GB * 0.9))
    monkeypatch.setattr(memory, "Nvml", lambda: Nvml(library(Card(total=12288, free=12000))))
    assert plan_machine.this_card() == ("NVIDIA GeForce RTX 3060", 12000 << 20)


def test_folders_and_misspelt_names_are_told_apart(files, capsys):
    assert cli.main(["inspect", str(files)]) == 1
    assert error(capsys) == f"lora-guard: {files}: this is a folder; give a file in it, such as fp8.safetensors"
    assert cli.main(["inspect", str(files / "stlye.safetensors")]) == 1
    assert error(capsys).endswith("stlye.safetensors: no such file; is style.safetensors meant?")
    with pytest.raises(SystemExit) as stop:
        plan(files / "fp8.safetensors", f"{files / 'small.safetensors'}:abc")
    assert stop.value.code == 2
    assert "expected a strength such as 0.8 after small.safetensors, found 'abc'" in error(capsys)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "out.safetensors: the disk is full; free space on it, or choose another folder"),
        (errno.EACCES, "out.safetensors: may not be written (no); choose another folder, or close the program that"),
        (errno.EIO, "[Errno 5] no: 'out.safetensors'"),
    ],
)
def test_what_the_system_refuses_is_a_line_with_the_next_step(files, capsys, monkeypatch, number, says):
    def refused(*_):
        raise OSError(number, "no", "out.safetensors")

    monkeypatch.setattr(cli, "_inspect", refused)
    assert cli.main(["inspect", str(files / "small.safetensors")]) == 1
    assert error(capsys).startswith(f"lora-guard: {says}")


def test_a_reader_that_has_seen_enough_is_no_error(files, capsys, monkeypatch):
    def gone(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "_inspect", gone)
    monkeypatch.setattr(cli.sys, "stdout", io.StringIO())
    assert cli.main(["inspect", str(files / "small.safetensors")]) == 1
    cli.sys.stdout.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_name_that_no_file_can_have_is_a_line(command, capsys):
    name = "x" * 300 + ".safetensors"
    sizes = ["--vram", "12GB", "--ram", "16GB"] if command == "plan" else []
    assert cli.main([command, name, *([name] if command == "plan" else []), *sizes]) == 1
    assert error(capsys).endswith(".safetensors: no such file; check its name and folder, or refresh the list")
