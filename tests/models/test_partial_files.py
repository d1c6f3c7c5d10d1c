"""Files for a part of a model: a few blocks, attentions alone, text encoders alone. What may fit is never refused."""

import json
import struct

import pytest
from support.fake_models import stored, write_safetensors
from support.original_layouts import bfl
from support.stream_layouts import bfl2, hunyuan_video, in_diffusers, matrices, qwen

from lib_lora_guard import cli

MODELS = {
    "Flux": lambda: matrices(bfl(3072, 19, 38)),
    "Chroma": lambda: matrices(bfl(3072, 19, 38, chroma=True)),
    "Flux 2, 4B": lambda: matrices(bfl2(3072, 5, 20)),
    "Flux 2, 9B": lambda: matrices(bfl2(4096, 8, 24, text=12288)),
    "Flux 2, dev": lambda: matrices(bfl2(6144, 8, 48, text=15360, guidance=True)),
    "Qwen-Image": lambda: matrices(qwen(3072, 60)),
    "Hunyuan Video": lambda: matrices(hunyuan_video()),
}
ENCODERS = {
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768),
    "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": (768,),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, layers in MODELS.items():
        shapes = {f"model.diffusion_model.{module}.weight": shape for module, shape in layers().items()}
        write_safetensors(folder / f"{name}.safetensors", stored({**shapes, **ENCODERS}, "BF16"))
    return folder


def lora(path, modules, metadata=None, rank=4):
    """A kohya file for `{name as written: (rows, columns)}`, of names with or without dots."""
    tensors, values = {}, {}
    for name, (rows, columns) in modules.items():
        tensors |= {
            f"{name}.lora_up.weight": ("BF16", (rows, rank)),
            f"{name}.lora_down.weight": ("BF16", (rank, columns)),
            f"{name}.alpha": ("F32", ()),
        }
        values[f"{name}.alpha"] = struct.pack("<f", 4.0)
    write_safetensors(path, tensors, metadata, values)
    return path


def inspect(model, file, capsys):
    assert cli.main(["inspect", str(file), "--model", str(model), "--json"]) in (0, 1)
    return json.loads(capsys.readouterr().out)


def part_of(model, words, blocks=None):
    """The modules of a model whose names hold one of `words`, in the blocks asked for."""
    found = {}
    for name, shape in MODELS[model]().items():
        number = name.split(".")[1] if "_blocks." in name else None
        if any(word in name for word in words) and (blocks is None or (number and int(number) in blocks)):
            found[name] = shape
    assert found
    return found


def as_diffusers(modules):
    return {n: s for name, shape in modules.items() for n, s in in_diffusers(name, *shape).items()}


W, H = 3072, 4 * 3072
ATTENTION = dict.fromkeys(("to_q", "to_k", "to_v"), (W, W))
PARTS = {
    # N3
    "double blocks' attention of Klein 4B": ("Flux 2, 4B", part_of("Flux 2, 4B", ["attn"])),
    "one block of it": ("Flux 2, 4B", part_of("Flux 2, 4B", ["attn"], {2})),
    "one layer of it": ("Flux 2, 4B", {"double_blocks.0.img_attn.qkv": (3 * W, W)}),
    "linear2 of Klein 4B": ("Flux 2, 4B", part_of("Flux 2, 4B", ["linear2"])),
    "linear1 of Klein 4B": ("Flux 2, 4B", part_of("Flux 2, 4B", ["linear1"])),
    "MLPs of Klein 4B": ("Flux 2, 4B", part_of("Flux 2, 4B", ["mlp.2"])),
    "attention of Klein 9B": ("Flux 2, 9B", part_of("Flux 2, 9B", ["attn"])),
    "linear2 of Klein 9B": ("Flux 2, 9B", part_of("Flux 2, 9B", ["linear2"], {3})),
    "attention of dev": ("Flux 2, dev", part_of("Flux 2, dev", ["attn"], {0, 1})),
    "linear2 of dev": ("Flux 2, dev", part_of("Flux 2, dev", ["linear2"])),
    "MLPs of dev": ("Flux 2, dev", part_of("Flux 2, dev", ["mlp.2"])),
    "Klein 4B as diffusers": ("Flux 2, 4B", as_diffusers(part_of("Flux 2, 4B", ["attn"]))),
    "Klein 4B as diffusers, single": ("Flux 2, 4B", as_diffusers(part_of("Flux 2, 4B", ["linear2"]))),
    "Klein 4B as diffusers, MLPs": ("Flux 2, 4B", as_diffusers(part_of("Flux 2, 4B", ["mlp.0"]))),
    "Klein 9B as diffusers": ("Flux 2, 9B", as_diffusers(part_of("Flux 2, 9B", ["attn"]))),
    "dev as diffusers": ("Flux 2, dev", as_diffusers(part_of("Flux 2, dev", ["attn"]))),
    # N4
    "attention of one block of Qwen-Image": ("Qwen-Image", part_of("Qwen-Image", ["attn.to_q"], {0})),
    "attention of blocks 0 to 9": ("Qwen-Image", part_of("Qwen-Image", ["attn.to_", "attn.add"], set(range(10)))),
    "attention of blocks 0 to 19": ("Qwen-Image", part_of("Qwen-Image", ["attn.to_", "attn.add"], set(range(20)))),
    "attention of block 19": ("Qwen-Image", part_of("Qwen-Image", ["attn."], {19})),
    "attention of block 30": ("Qwen-Image", part_of("Qwen-Image", ["attn."], {30})),
    "to_out of all blocks": ("Qwen-Image", part_of("Qwen-Image", ["to_out"])),
    "to_add_out of all blocks": ("Qwen-Image", part_of("Qwen-Image", ["to_add_out"])),
    "modulations of Qwen-Image": ("Qwen-Image", part_of("Qwen-Image", ["_mod"], {7})),
    # as before
    "attention of Flux": ("Flux", part_of("Flux", ["attn"], {3, 4})),
    "the last blocks of Flux": ("Flux", part_of("Flux", ["linear2"], {36, 37})),
    "modulations of Flux": ("Flux", part_of("Flux", ["mod.lin"], {0})),
    "attention of Chroma": ("Chroma", part_of("Chroma", ["attn"], {3, 4})),
    "attention of Hunyuan Video": ("Hunyuan Video", part_of("Hunyuan Video", ["attn_"], {0, 19})),
    "the last block of Hunyuan Video": ("Hunyuan Video", part_of("Hunyuan Video", ["linear2"], {39})),
    "one block of Hunyuan Video": ("Hunyuan Video", part_of("Hunyuan Video", ["attn_qkv", "linear1"], {5})),
}  # fmt: skip
SPELLED = {
    "kohya": lambda name: "lora_unet_" + name.replace(".", "_"),
    "peft": lambda name: "transformer." + name,
    "bare": lambda name: name,
}


@pytest.mark.parametrize("spelling", SPELLED)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_never_refused_on_its_own_model(part, spelling, models, tmp_path, capsys):
    model, modules = PARTS[part]
    file = lora(tmp_path / "part.safetensors", {SPELLED[spelling](n): s for n, s in modules.items()})
    found = inspect(models / f"{model}.safetensors", file, capsys)
    assert (found["fit"]["refused"], found["fit"]["keys_skipped"]) == (None, 0)
    assert found["fit"]["modules_used"] == len(modules)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("linear2 of Klein 4B", "Flux"),
        ("MLPs of Klein 4B", "Flux"),
        ("linear2 of Klein 9B", "Flux"),
        ("attention of Klein 9B", "Qwen-Image"),
        ("dev as diffusers", "Qwen-Image"),
        ("Klein 4B as diffusers, MLPs", "Qwen-Image"),
        ("attention of block 30", "Flux"),
        ("attention of block 19", "Flux"),
        ("modulations of Qwen-Image", "Flux"),
        ("modulations of Flux", "Qwen-Image"),
        ("modulations of Flux", "Flux 2, 4B"),
        ("the last blocks of Flux", "Flux 2, dev"),
        ("the last block of Hunyuan Video", "Flux"),
    ],
)
def test_what_cannot_fit_is_refused_by_its_name(part, other, models, tmp_path, capsys):
    model, modules = PARTS[part]
    file = lora(tmp_path / "part.safetensors", {"diffusion_model." + n: s for n, s in modules.items()})
    refused = inspect(models / f"{other}.safetensors", file, capsys)["fit"]["refused"]
    assert refused is not None
    if part != "attention of block 19":  # Qwen-Image or Hunyuan Video
        assert refused.startswith(f"made for {model.partition(',')[0]}, this is {other.partition(',')[0]}")


QWEN_PART = {f"transformer_blocks.{n}.attn.{x}": (W, W) for n in range(10) for x in ATTENTION}


@pytest.mark.parametrize(
    ("metadata", "made_for"),
    [
        ({"ss_base_model_version": "qwen_image"}, "Qwen-Image"),
        ({"modelspec.architecture": "Qwen-Image/lora"}, "Qwen-Image"),
        ({"ss_network_module": "networks.lora_qwen_image"}, "Qwen-Image"),
        ({"ss_base_model_version": "flux1"}, "Flux"),
        ({"ss_base_model_version": "flux_2_klein_4b"}, "Flux"),  # it has five blocks: the names have the say
        ({"modelspec.architecture": "hunyuan-video/lora"}, "Hunyuan Video"),
        ({}, "Flux"),
    ],
)
def test_metadata_decides_between_those_that_are_left(metadata, made_for, models, tmp_path, capsys):
    file = lora(tmp_path / "part.safetensors", QWEN_PART, metadata or None)
    found = inspect(models / "Qwen-Image.safetensors", file, capsys)
    assert found["made_for"] == made_for
    own = not metadata or made_for == "Qwen-Image" or "klein" in str(metadata)
    assert (found["fit"]["refused"] is None) == own


T5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
CLIP = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
FLUX_METADATA = {
    "ss_network_module": "networks.lora_flux",
    "ss_base_model_version": "flux1",
    "modelspec.architecture": "flux-1-dev/lora",
}


@pytest.mark.parametrize("modules", [{T5: (4096, 4096)}, {CLIP: (768, 768), T5: (4096, 4096)}], ids=["t5", "both"])
@pytest.mark.parametrize(("metadata", "made_for"), [(FLUX_METADATA, "Flux"), (None, None)])
def test_text_encoders_alone_as_kohya_names_them_for_flux(modules, metadata, made_for, models, tmp_path, capsys):
    file = lora(tmp_path / "text.safetensors", modules, metadata)
    found = inspect(models / "Flux.safetensors", file, capsys)
    assert (found["made_for"], found["fit"]["refused"]) == (made_for, None)
    assert found["fit"]["modules_used"] == len(modules)


def test_text_encoders_of_sd3_stay_with_sd3(models, tmp_path, capsys):
    file = lora(tmp_path / "text.safetensors", {T5: (4096, 4096)}, {"ss_base_model_version": "sd3"})
    assert inspect(models / "Flux.safetensors", file, capsys)["fit"]["refused"].startswith("made for SD 3")


def test_clip_alone_without_a_number_is_not_taken_for_sd1(models, tmp_path, capsys):
    file = lora(tmp_path / "text.safetensors", {CLIP.replace("te1", "te"): (768, 768)})
    found = inspect(models / "Flux.safetensors", file, capsys)
    assert (found["made_for"], found["fit"]["refused"], found["fit"]["modules_used"]) == (None, None, 1)
    file = lora(
        tmp_path / "sd1.safetensors", {CLIP.replace("te1", "te"): (768, 768)}, {"ss_base_model_version": "sd_v1"}
    )
    assert inspect(models / "Flux.safetensors", file, capsys)["fit"]["refused"].startswith("made for SD 1.x")
