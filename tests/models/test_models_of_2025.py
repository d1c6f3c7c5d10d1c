"""LoRA files for the models of 2025 and 2026 as their trainers write them, on small models in Forge Neo's layout."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.make import rand
from support.named_models import assert_changes, change_of, kohya, module_of, peft

from lib_lora_guard.cli import main

H, T = 16, 8
D = "diffusion_model."


def weights(**modules):
    return {f"{name.replace('__', '.')}.weight": shape for name, shape in modules.items()}


def lora_of(write, sizes, prefix=""):
    """One file for all modules, and the delta of each."""
    tensors, deltas = {}, {}
    for seed, (module, (rows, columns)) in enumerate(sizes.items()):
        made, deltas[module] = write(prefix + module, rows, columns, seed)
        tensors |= made
    return tensors, deltas


# ---- Z-Image and Lumina 2

Z_IMAGE = module_of(
    {
        f"{D}layers.0.attention.qkv.weight": (3 * H, H),
        f"{D}layers.0.attention.out.weight": (H, H),
        f"{D}layers.0.feed_forward.w1.weight": (2 * H, H),
        f"{D}layers.0.adaLN_modulation.0.weight": (4 * H, T),
        f"{D}x_embedder.weight": (H, 64),
        f"{D}x_pad_token": (1, H),
        f"{D}cap_pad_token": (1, H),
    }
)
SPLIT = {"to_q": (H, H), "to_k": (H, H), "to_v": (H, H), "to_out.0": (H, H)}


def z_expected(deltas, block):
    return {
        f"{D}layers.0.attention.qkv.weight": torch.cat([deltas[f"{block}to_{x}"] for x in "qkv"]),
        f"{D}layers.0.attention.out.weight": deltas[block + "to_out.0"],
    }


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "transformer.", "", "base_model.model.", "model.diffusion_model.", "pipe.dit."]
)
def test_z_image_with_separate_projections(prefix, tmp_path):
    block = "layers.0.attention."
    tensors, deltas = lora_of(peft, {block + name: size for name, size in SPLIT.items()}, prefix)
    assert_changes(change_of(Z_IMAGE, tensors, tmp_path)[0], z_expected(deltas, block))


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_"])
def test_z_image_in_flat_names(prefix, tmp_path):
    block = "layers_0_attention_"
    tensors, deltas = lora_of(kohya, {block + name.replace(".", "_"): size for name, size in SPLIT.items()}, prefix)
    deltas[block + "to_out.0"] = deltas[block + "to_out_0"]
    assert_changes(change_of(Z_IMAGE, tensors, tmp_path)[0], z_expected(deltas, block))


def test_z_image_with_dots_everywhere(tmp_path):
    """Anime-Z: `to.q.lora.down`, its alpha beside it."""
    tensors, deltas = {}, {}
    for seed, (name, (rows, columns)) in enumerate(SPLIT.items()):
        module = f"layers.0.attention.{name.replace('to_q', 'to.q').replace('to_k', 'to.k').replace('to_v', 'to.v')}"
        made, deltas[name] = kohya(module, rows, columns, seed)
        tensors |= {key.replace("lora_up", "lora.up").replace("lora_down", "lora.down"): t for key, t in made.items()}
    assert_changes(change_of(Z_IMAGE, tensors, tmp_path)[0], z_expected(deltas, ""))


def test_z_image_with_the_same_layers_under_fused_names_too(tmp_path):
    """Anime-Z repeats query, key and value as `qkv`, and `to_out.0` as `out`; each layer counts once."""
    block = "layers.0.attention."
    tensors, deltas = lora_of(peft, {block + name: size for name, size in SPLIT.items()})
    fused, _ = peft(block + "qkv", 3 * H, H, seed=9)
    again = {key.replace("to_out.0", "out"): value.clone() for key, value in tensors.items() if "to_out.0" in key}
    changes, _ = change_of(Z_IMAGE, fused | again | tensors, tmp_path)
    assert_changes(changes, z_expected(deltas, block))


def test_pad_tokens(tmp_path):
    tensors = {f"{D}x_pad_token.diff": rand(1, H, seed=1), f"{D}cap_pad_token.diff": rand(1, H, seed=2)}
    changes, _ = change_of(Z_IMAGE, tensors, tmp_path)
    assert_changes(changes, {key.removesuffix(".diff"): value.double() for key, value in tensors.items()})


def test_lumina_2_with_fewer_keys_than_queries(tmp_path):
    model = module_of(weights(layers__0__attention__qkv=(2 * H, H), layers__0__feed_forward__w2=(H, 2 * H)))
    sizes = {"attn.to_q": (H, H), "attn.to_k": (T, H), "attn.to_v": (T, H), "feed_forward.linear_2": (H, 2 * H)}
    tensors, deltas = lora_of(peft, {"layers.0." + name: size for name, size in sizes.items()}, "transformer.")
    expected = {
        "layers.0.attention.qkv.weight": torch.cat([deltas[f"layers.0.attn.to_{x}"] for x in "qkv"]),
        "layers.0.feed_forward.w2.weight": deltas["layers.0.feed_forward.linear_2"],
    }
    assert_changes(change_of(model, tensors, tmp_path)[0], expected)


# ---- Krea 2

KREA = {
    "transformer_blocks.0.attn.to_q": ("blocks.0.attn.wq", (H, H)),
    "transformer_blocks.0.attn.to_k": ("blocks.0.attn.wk", (T, H)),
    "transformer_blocks.0.attn.to_gate": ("blocks.0.attn.gate", (H, H)),
    "transformer_blocks.0.attn.to_out.0": ("blocks.0.attn.wo", (H, H)),
    "transformer_blocks.0.ff.down": ("blocks.0.mlp.down", (H, 2 * H)),
    "text_fusion.refiner_blocks.0.attn.to_q": ("txtfusion.refiner_blocks.0.attn.wq", (T, T)),
    "time_embed.linear_1": ("tmlp.0", (H, T)),
    "img_in": ("first", (H, 64)),
}


def test_krea_2_in_diffusers_names(tmp_path):
    model = module_of({f"{D}{own}.weight": size for own, size in KREA.values()})
    tensors, deltas = lora_of(peft, {name: size for name, (_, size) in KREA.items()}, "transformer.")
    expected = {f"{D}{KREA[name][0]}.weight": delta for name, delta in deltas.items()}
    assert_changes(change_of(model, tensors, tmp_path)[0], expected)


# ---- Anima, its text encoder and its adapter

QWEN3 = "qwen3_06b.model.layers.0."
ADAPTER = "llm_adapter.blocks.0.cross_attn.q_proj"
ANIMA = {
    f"{D}blocks.0.self_attn.q_proj.weight": (H, H),
    f"{D}blocks.0.cross_attn.k_proj.weight": (H, T),
    f"{QWEN3}self_attn.q_proj.weight": (2 * T, T),
    f"{QWEN3}mlp.gate_proj.weight": (3 * T, T),
    f"qwen3_06b.{ADAPTER}.weight": (T, T),
}


def test_anima_with_its_text_encoder(tmp_path):
    sizes = {
        "lora_unet_blocks_0_self_attn_q_proj": (H, H),
        "lora_te_layers_0_self_attn_q_proj": (2 * T, T),
        "lora_te_layers_0_mlp_gate_proj": (3 * T, T),
    }
    tensors, deltas = lora_of(kohya, sizes)
    changes, entry = change_of(module_of(ANIMA), tensors, tmp_path)
    owners = (f"{D}blocks.0.self_attn.q_proj", f"{QWEN3}self_attn.q_proj", f"{QWEN3}mlp.gate_proj")
    assert_changes(changes, {f"{own}.weight": deltas[name] for own, name in zip(owners, sizes, strict=True)})
    assert (entry.used, entry.skipped) == (3, [])


def test_anima_in_diffusers_names(tmp_path):
    names = {"transformer_blocks.0.attn1.to_q": (H, H), "transformer_blocks.0.attn2.to_k": (H, T)}
    tensors, deltas = lora_of(peft, names, "transformer.")
    own = dict(zip(names, list(ANIMA)[:2], strict=True))
    assert_changes(change_of(module_of(ANIMA), tensors, tmp_path)[0], {own[name]: d for name, d in deltas.items()})


@pytest.mark.parametrize("place", ["qwen3_06b.", D, "net.", ""])
@pytest.mark.parametrize(
    "written",
    [
        "lora_te_llm_adapter_blocks_0_cross_attn_q_proj",
        "lora_unet_llm_adapter_blocks_0_cross_attn_q_proj",
        "diffusion_model." + ADAPTER,
        "text_encoders.qwen3_06b." + ADAPTER,
        "text_conditioner.blocks.0.cross_attn.q_proj",
    ],
)
def test_the_adapter_wherever_it_lies(place, written, tmp_path):
    """The transformer has it in the file and in ComfyUI, the text encoder in Forge Neo; diffusers keeps it alone."""
    shapes = {key: shape for key, shape in ANIMA.items() if ADAPTER not in key} | {f"{place}{ADAPTER}.weight": (T, T)}
    if not place:
        shapes = {"blocks.0.cross_attn.q_proj.weight": (T, T), "blocks.0.self_attn.o_proj.weight": (T, T)}
    elif place == "net.":
        shapes = {key.replace(D, place): shape for key, shape in shapes.items()}
    model = module_of(shapes)
    tensors, delta = kohya(written, T, T, seed=1) if "_blocks_" in written else peft(written, T, T, seed=1)
    key = next(name for name, _ in model.named_parameters() if name.endswith("cross_attn.q_proj.weight"))
    assert_changes(change_of(model, tensors, tmp_path)[0], {key: delta})


# ---- Wan

WAN = module_of(
    {
        f"{D}blocks.0.self_attn.q.weight": (H, H),
        f"{D}blocks.0.cross_attn.k_img.weight": (H, H),
        f"{D}blocks.0.ffn.0.weight": (4 * H, H),
        f"{D}blocks.0.norm3.weight": (H,),
        f"{D}blocks.0.modulation": (1, 6, H),
        f"{D}head.modulation": (1, 2, H),
    }
)


def test_wan_in_diffusers_names(tmp_path):
    sizes = {"blocks.0.attn1.to_q": (H, H), "blocks.0.attn2.add_k_proj": (H, H), "blocks.0.ffn.net.0.proj": (4 * H, H)}
    tensors, deltas = lora_of(peft, sizes, "transformer.")
    owners = ("self_attn.q", "cross_attn.k_img", "ffn.0")
    expected = {f"{D}blocks.0.{own}.weight": d for own, d in zip(owners, deltas.values(), strict=True)}
    assert_changes(change_of(WAN, tensors, tmp_path)[0], expected)


@pytest.mark.parametrize(
    ("block", "top", "norm"),
    [
        ("diffusion_model.blocks.0.modulation", "diffusion_model.head.modulation", "diffusion_model.blocks.0.norm3"),
        ("transformer.blocks.0.scale_shift_table", "transformer.scale_shift_table", "transformer.blocks.0.norm2"),
    ],
    ids=["original", "diffusers"],
)
@pytest.mark.parametrize("mode", ["auto", "merge"])
def test_differences_of_parameters_outside_layers(block, top, norm, mode, tmp_path):
    """Extracted distillation LoRAs have them."""
    table, head, scale = rand(1, 6, H, seed=1), rand(1, 2, H, seed=2), rand(H, seed=3)
    tensors, delta = kohya("lora_unet__blocks_0_self_attn_q", H, H, seed=4)
    tensors |= {f"{block}.diff": table, f"{top}.diff": head, f"{norm}.diff": scale}
    expected = {
        f"{D}blocks.0.modulation": table.double(),
        f"{D}head.modulation": head.double(),
        f"{D}blocks.0.norm3.weight": scale.double(),
        f"{D}blocks.0.self_attn.q.weight": delta,
    }
    changes, entry = change_of(WAN, tensors, tmp_path, mode=mode)
    if mode == "auto":
        del expected[f"{D}blocks.0.self_attn.q.weight"]  # its layer adds it when it runs
    assert_changes(changes, expected)
    assert (entry.used, entry.skipped) == (4, [])


# ---- what is shown of a file


@pytest.mark.parametrize(
    ("sizes", "made_for", "encoder"),
    [
        ({"lora_unet_blocks_0_self_attn_q_proj": (2048, 2048), "lora_te_layers_0_self_attn_q_proj": (2048, 1024)},
         "Anima", "Qwen3"),
        ({"lora_unet_blocks_0_self_attn_q_proj": (2048, 2048), "lora_te_llm_adapter_blocks_0_mlp_0": (4096, 1024)},
         "Anima", "text adapter"),
        ({"lora_unet_layers_0_attention_qkv": (3840, 2304), "lora_te_layers_0_self_attn_q_proj": (2048, 2304)},
         "Lumina 2", "Gemma 2"),
        ({"lora_unet_blocks_0_self_attn_q": (5120, 5120), "lora_te_encoder_block_0_layer_0_SelfAttention_q": (4096, 4096)},
         "Wan", "UMT5"),
        ({"text_encoders.qwen25_7b.model.layers.0.mlp.up_proj": (18944, 3584),
          "diffusion_model.transformer_blocks.0.img_mod.1": (18432, 3072)}, "Qwen-Image", "Qwen2.5-VL"),
    ],
)  # fmt: skip
def test_inspect_names_the_text_encoder(sizes, made_for, encoder, tmp_path, capsys):
    tensors, _ = lora_of(kohya, sizes)
    save_file(tensors, tmp_path / "style.safetensors")
    assert main(["inspect", str(tmp_path / "style.safetensors"), "--json"]) == 0
    file = json.loads(capsys.readouterr().out)
    assert file["made_for"] == made_for
    assert file["parts"] == {"transformer": 1, encoder: 1}
