"""Spellings of single modules that trainers write: which rows of which parameter they change, by their own formula."""

import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fake_models import write_safetensors
from support.make import rand
from support.named_models import assert_changes, change_of, kohya, module_of, peft

from lib_lora_guard import LoraGuard, cli
from lib_lora_guard.errors import LoraMismatchError

H = 8
BFL = {
    "double_blocks.0.img_attn.qkv.weight": (3 * H, H),
    "double_blocks.0.img_attn.qkv.bias": (3 * H,),
    "double_blocks.0.txt_attn.qkv.weight": (3 * H, H),
    "double_blocks.0.img_attn.proj.weight": (H, H),
    "double_blocks.0.img_attn.norm.query_norm.scale": (4,),
    "single_blocks.0.linear1.weight": (7 * H, H),
    "single_blocks.0.linear2.weight": (H, 5 * H),
    "img_in.weight": (H, 16),
    "img_in.bias": (H,),
}
DIFFUSERS = {
    **{f"transformer_blocks.0.attn.{name}.weight": (H, H) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"single_transformer_blocks.0.attn.{name}.weight": (H, H) for name in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.0.proj_mlp.weight": (4 * H, H),
    "single_transformer_blocks.0.proj_out.weight": (H, 5 * H),
    "x_embedder.weight": (H, 16),
}
MMDIT = {
    "joint_blocks.0.x_block.attn.qkv.weight": (3 * H, H),
    "joint_blocks.0.context_block.attn.qkv.weight": (3 * H, H),
    "joint_blocks.0.x_block.attn2.qkv.weight": (3 * H, H),
    "joint_blocks.0.x_block.attn.proj.weight": (H, H),
}


def below(parts, rows):
    """A delta of `rows` rows with `{first row: part}` in it."""
    whole = torch.zeros(rows, next(iter(parts.values())).shape[1], dtype=torch.float64)
    for first, part in parts.items():
        whole[first : first + len(part)] = part
    return whole


def file_of(modules, write=kohya):
    """One file for `{name: (rows, columns)}`, and the delta of each."""
    tensors, deltas = {}, {}
    for seed, (name, shape) in enumerate(modules.items()):
        made, deltas[name] = write(name, *shape, seed=seed + 1)
        tensors |= made
    return tensors, deltas


# ---- one layer in numbered parts, as OneTrainer's own format has it


ONETRAINER = {
    **{f"double_blocks.0.img_attn.qkv.{n}": (H, H) for n in range(3)},
    **{f"single_blocks.0.linear1.{n}": (H if n < 3 else 4 * H, H) for n in range(4)},
    "img_in.proj": (H, 16),
    "double_blocks.0.img_attn.proj": (H, H),
}


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "", "lora_unet_"])
def test_numbered_parts_on_the_original_layout(prefix, tmp_path):
    flat = prefix.endswith("_")
    tensors, deltas = file_of({prefix + (n.replace(".", "_") if flat else n): s for n, s in ONETRAINER.items()})
    d = list(deltas.values())
    changes, lora = change_of(module_of(BFL), tensors, tmp_path)
    assert_changes(
        changes,
        {
            "double_blocks.0.img_attn.qkv.weight": torch.cat(d[:3]),
            "single_blocks.0.linear1.weight": torch.cat(d[3:7]),
            "img_in.weight": d[7],
            "double_blocks.0.img_attn.proj.weight": d[8],
        },
    )
    assert (lora.skipped, lora.lost) == ([], [])


def test_numbered_parts_on_the_layout_of_diffusers(tmp_path):
    tensors, deltas = file_of({f"transformer.{name}": shape for name, shape in ONETRAINER.items()})
    block, single = "transformer_blocks.0.attn.", "single_transformer_blocks.0."
    names = [
        *(f"{block}to_{x}" for x in "qkv"), *(f"{single}attn.to_{x}" for x in "qkv"), f"{single}proj_mlp", "x_embedder",
        block + "to_out.0",
    ]  # fmt: skip
    changes, lora = change_of(module_of(DIFFUSERS), tensors, tmp_path)
    assert_changes(changes, {f"{name}.weight": delta for name, delta in zip(names, deltas.values(), strict=True)})
    assert lora.skipped == []


@pytest.mark.parametrize("layer", ["x_block.attn", "context_block.attn", "x_block.attn2"])
def test_numbered_parts_of_sd3(layer, tmp_path):
    name = f"joint_blocks.0.{layer}.qkv"
    tensors, deltas = file_of({f"transformer.{name}.{n}": (H, H) for n in (0, 2)})
    first, last = deltas.values()
    changes, _ = change_of(module_of(MMDIT), tensors, tmp_path)
    assert_changes(changes, {f"{name}.weight": below({0: first, 2 * H: last}, 3 * H)})


@pytest.mark.parametrize(
    "name", ["diffusion_model.single_blocks.0.linear1_qkv", "lora_unet_single_blocks_0_linear1_qkv"]
)
def test_the_attention_alone_of_a_fused_layer(name, tmp_path):
    tensors, delta = kohya(name, 3 * H, H, seed=1)
    changes, _ = change_of(module_of(BFL), tensors, tmp_path)
    assert_changes(changes, {"single_blocks.0.linear1.weight": below({0: delta}, 7 * H)})
    changes, _ = change_of(module_of(DIFFUSERS), tensors, tmp_path)
    own = [f"single_transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    assert_changes(changes, dict(zip(own, delta.chunk(3), strict=True)))


# ---- differences and replacements under a parameter's own name

UNET = {
    "input_blocks.0.0.weight": (H, 4, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.norm1.weight": (H,),
    "input_blocks.1.1.transformer_blocks.0.norm1.bias": (H,),
    "input_blocks.1.1.proj_in.weight": (H, H),
    "input_blocks.1.1.proj_in.bias": (H,),
}
NORM = "input_blocks.1.1.transformer_blocks.0.norm1"
FLAT_NORM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("module", [f"diffusion_model.{NORM}", NORM])
def test_a_difference_of_a_parameter_by_its_own_name(module, parameter, tmp_path):
    difference = rand(H, seed=1)
    changes, lora = change_of(module_of(UNET), {f"{module}.{parameter}.diff": difference}, tmp_path, strength=0.5)
    assert_changes(changes, {f"{NORM}.{parameter}": 0.5 * difference.double()})
    assert (lora.used, lora.skipped) == (1, [])


def test_a_difference_of_a_bias_in_a_flat_name(tmp_path):
    difference = rand(H, seed=1)
    changes, _ = change_of(module_of(UNET), {f"{FLAT_NORM}_bias.diff": difference}, tmp_path)
    assert_changes(changes, {f"{NORM}.bias": difference.double()})


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_replacement_of_a_parameter_by_its_own_name(parameter, tmp_path):
    model, value = module_of(UNET), rand(H, seed=1)
    before = model.get_parameter(f"{NORM}.{parameter}").double()
    changes, _ = change_of(model, {f"diffusion_model.{NORM}.{parameter}.set_weight": value}, tmp_path)
    assert_changes(changes, {f"{NORM}.{parameter}": value.double() - before})


def test_the_bias_of_a_fused_layer_by_its_own_name(tmp_path):
    difference = rand(3 * H, seed=1)
    name = "double_blocks.0.img_attn.qkv.bias"
    changes, _ = change_of(module_of(BFL), {f"diffusion_model.{name}.diff": difference}, tmp_path)
    assert_changes(changes, {name: difference.double()})
    part = rand(H, seed=2)
    changes, _ = change_of(module_of(BFL), {"transformer.transformer_blocks.0.attn.to_k.bias.diff": part}, tmp_path)
    assert_changes(changes, {name: torch.cat([torch.zeros(H), part, torch.zeros(H)]).double()})


def test_a_bias_that_the_model_lacks_is_skipped_and_the_weight_stays(tmp_path):
    tensors = {"double_blocks.0.img_attn.proj.bias.diff": rand(H, seed=1), **kohya("img_in", H, 16, seed=2)[0]}
    changes, lora = change_of(module_of(BFL), tensors, tmp_path)
    assert list(changes) == ["img_in.weight"]
    assert lora.skipped == ["double_blocks.0.img_attn.proj.bias.weight"]


def test_a_bias_under_two_names_counts_once(tmp_path):
    one, two = rand(H, seed=1), rand(H, seed=2)
    tensors = {"img_in.diff_b": one, "diffusion_model.img_in.bias.diff": two, **kohya("img_in", H, 16, seed=3)[0]}
    changes, lora = change_of(module_of(BFL), tensors, tmp_path)
    assert any(torch.allclose(changes["img_in.bias"], d.double(), atol=1e-6) for d in (one, two))
    assert len(lora.lost) == 1
    assert "says already" in lora.lost[0]


# ---- one layer under two names


def fused_and_split():
    fused, split = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_"
    tensors, delta = kohya(fused, 3 * H, H, seed=1)
    parts = {}
    for n, x in enumerate("qkv"):
        made, parts[x] = peft(split + x, H, H, seed=10 + n)
        tensors |= made
    return tensors, delta, parts


def test_a_layer_fused_and_split_in_one_file_counts_once(tmp_path):
    tensors, _, parts = fused_and_split()
    changes, lora = change_of(module_of(BFL), tensors, tmp_path)
    # diffusers takes its own names where a file has both (`_convert_kohya_flux_lora_to_diffusers`).
    assert_changes(changes, {"double_blocks.0.img_attn.qkv.weight": torch.cat(list(parts.values()))})
    assert len(lora.lost) == 1
    assert lora.lost[0].startswith("lora_unet_double_blocks_0_img_attn_qkv.weight: says what transformer.")
    changes, lora = change_of(module_of(DIFFUSERS), tensors, tmp_path)
    assert_changes(changes, {f"transformer_blocks.0.attn.to_{x}.weight": part for x, part in parts.items()})
    assert len(lora.lost) == 1


def test_it_counts_once_as_diffusers_converts_it(tmp_path):
    names = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    tensors, _, parts = fused_and_split()
    kept = names._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    assert sorted(kept) == sorted(name for name in tensors if name.startswith("transformer."))
    for x, part in parts.items():
        key = f"transformer.transformer_blocks.0.attn.to_{x}"
        assert torch.equal(kept[f"{key}.lora_B.weight"].double() @ kept[f"{key}.lora_A.weight"].double(), part)


@pytest.mark.parametrize(
    "prefix", ["lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"]
)
def test_parts_count_before_the_whole_under_any_prefix(prefix, tmp_path):
    """As diffusers decides it for Z-Image, where some files hold both."""
    tensors, _ = kohya(prefix, 3 * H, H, seed=1)
    parts = []
    for n in range(3):
        made, delta = kohya(f"{prefix}{'_' if '_img_' in prefix else '.'}{n}", H, H, seed=2 + n)
        tensors |= made
        parts.append(delta)
    changes, lora = change_of(module_of(BFL), tensors, tmp_path)
    assert_changes(changes, {"double_blocks.0.img_attn.qkv.weight": torch.cat(parts)})
    assert len(lora.lost) == 1
    changes, lora = change_of(module_of(DIFFUSERS), tensors, tmp_path)
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    assert_changes(changes, dict(zip(names, parts, strict=True)))
    assert len(lora.lost) == 1


def test_parts_that_do_not_overlap_are_all_taken(tmp_path):
    tensors, deltas = file_of(
        {
            "lora_unet_single_blocks_0_linear1_qkv": (3 * H, H),
            "lora_unet_single_transformer_blocks_0_proj_mlp": (4 * H, H),
        }
    )
    changes, lora = change_of(module_of(BFL), tensors, tmp_path)
    assert_changes(changes, {"single_blocks.0.linear1.weight": torch.cat(list(deltas.values()))})
    assert lora.lost == []


# ---- parameters that no layer owns


def test_differences_of_parameters_without_a_layer(tmp_path):
    shapes = {
        "blocks.0.self_attn.q.weight": (H, H),
        "blocks.0.modulation": (1, 6, H),
        "head.modulation": (1, 2, H),
        "x_pad_token": (1, H),
    }
    one, two, three = rand(1, 6, H, seed=1), rand(1, 2, H, seed=2), rand(1, H, seed=3)
    tensors = {
        "diffusion_model.blocks.0.modulation.diff": one,
        "diffusion_model.head.modulation.diff": two,
        "lora_unet_x_pad_token.diff": three,
    }
    changes, lora = change_of(module_of(shapes), tensors, tmp_path)
    expected = {"blocks.0.modulation": one, "head.modulation": two, "x_pad_token": three}
    assert_changes(changes, {name: value.double() for name, value in expected.items()})
    assert (lora.used, lora.skipped) == (3, [])


# ---- CLIP-G's text_projection

WIDE, PROJECTED = 12, 10
OPEN_CLIP = {
    "transformer.resblocks.0.attn.in_proj_weight": (3 * WIDE, WIDE),
    "transformer.resblocks.0.mlp.c_fc.weight": (4 * WIDE, WIDE),
    "ln_final.weight": (1280,),
    "text_projection": (WIDE, PROJECTED),
}


@pytest.mark.parametrize(
    "name", ["lora_te2_text_projection", "text_encoder_2.text_projection", "clip_g.text_projection"]
)
@pytest.mark.parametrize("mode", ["merge", "auto"])
def test_text_projection_of_open_clip_is_transposed(name, mode, tmp_path):
    """transformers multiplies by `text_projection.weight.T`, open_clip by `text_projection` (convert_open_clip_checkpoint)."""
    tensors, delta = kohya(name, PROJECTED, WIDE, seed=1)
    changes, lora = change_of(module_of(OPEN_CLIP), tensors, tmp_path, mode=mode)
    assert_changes(changes, {"text_projection": delta.t()})
    assert lora.used == 1


@pytest.mark.parametrize("kind", ["loha", "lokr", "diff", "dora"])
def test_other_kinds_on_a_transposed_text_projection(kind, tmp_path):
    name = "lora_te2_text_projection"
    a, b, c, d = rand(PROJECTED, 2, seed=1), rand(2, WIDE, seed=2), rand(PROJECTED, 2, seed=3), rand(2, WIDE, seed=4)
    model = module_of(OPEN_CLIP)
    weight = model.text_projection.double().t()
    if kind == "loha":
        tensors = {
            f"{name}.{k}": t
            for k, t in zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (a, b, c, d), strict=True)
        }
        delta = (a.double() @ b.double()) * (c.double() @ d.double())
    elif kind == "lokr":
        one, two = rand(2, 3, seed=5), rand(PROJECTED // 2, WIDE // 3, seed=6)
        tensors, delta = {f"{name}.lokr_w1": one, f"{name}.lokr_w2": two}, torch.kron(one.double(), two.double())
    elif kind == "diff":
        tensors, delta = {f"{name}.diff": rand(PROJECTED, WIDE, seed=7)}, rand(PROJECTED, WIDE, seed=7).double()
    else:
        magnitude = rand(PROJECTED, 1, seed=8).abs() + 1
        tensors = {f"{name}.lora_up.weight": a, f"{name}.lora_down.weight": b, f"{name}.dora_scale": magnitude}
        trained = weight + a.double() @ b.double()
        delta = magnitude.double() * trained / weight.norm(dim=1, keepdim=True) - weight
    changes, _ = change_of(model, tensors, tmp_path)
    assert_changes(changes, {"text_projection": delta.t()})


def test_a_text_projection_with_the_wrong_side_is_refused(tmp_path):
    model, path = module_of(OPEN_CLIP), tmp_path / "wrong.safetensors"
    save_file(kohya("lora_te2_text_projection", WIDE, PROJECTED, seed=1)[0], path)
    with pytest.raises(LoraMismatchError, match="text_projection"):
        LoraGuard(model).apply([(path, 1.0)])


def test_text_projection_of_a_clip_with_a_layer_is_not_transposed(tmp_path):
    shapes = {
        "text_model.encoder.layers.0.mlp.fc1.weight": (4 * WIDE, WIDE),
        "text_model.final_layer_norm.weight": (1280,),
        "text_projection.weight": (PROJECTED, WIDE),
    }
    tensors, delta = kohya("lora_te2_text_projection", PROJECTED, WIDE, seed=1)
    assert_changes(change_of(module_of(shapes), tensors, tmp_path)[0], {"text_projection.weight": delta})


CHECKPOINTS = {
    "sdxl": ("conditioner.embedders.1.model.", "text_projection", (WIDE, PROJECTED), True),
    "sd3": ("text_encoders.clip_g.transformer.", "text_projection.weight", (PROJECTED, WIDE), False),
}


@pytest.mark.parametrize("model", CHECKPOINTS)
def test_text_projection_is_baked_into_a_single_file(model, tmp_path):
    prefix, name, shape, transposed = CHECKPOINTS[model]
    projection = rand(*shape, seed=20)
    tensors = {prefix + name: projection, "model.diffusion_model.time_embed.0.weight": rand(4, 4, seed=21)}
    if transposed:
        tensors |= {prefix + n: rand(*s, seed=22 + i) for i, (n, s) in enumerate(OPEN_CLIP.items()) if n != name}
    else:
        layer = "text_model.encoder.layers.0.mlp.fc1.weight"
        tensors |= {
            prefix + layer: rand(4, WIDE, seed=22),
            prefix + "text_model.final_layer_norm.weight": rand(1280, seed=23),
        }
    save_file(tensors, tmp_path / "model.safetensors")
    lora, delta = kohya("lora_te2_text_projection", PROJECTED, WIDE, seed=1)
    save_file(lora, tmp_path / "lora.safetensors")
    out = tmp_path / "baked.safetensors"
    words = ["bake", str(tmp_path / "model.safetensors"), f"{tmp_path / 'lora.safetensors'}:0.5", "-o", str(out)]
    assert cli.main(words) == 0
    change = load_file(out)[prefix + name].double() - projection.double()
    expected = 0.5 * (delta.t() if transposed else delta)
    assert (change - expected).norm() <= 1e-4 * expected.norm()


def test_inspect_and_plan_count_text_projection(tmp_path, capsys):
    prefix = "conditioner.embedders.1.model."
    shapes = {
        prefix + "text_projection": (1280, 1280),
        prefix + "transformer.resblocks.0.attn.in_proj_weight": (3840, 1280),
        prefix + "ln_final.weight": (1280,),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    }
    write_safetensors(tmp_path / "model.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()})
    name = "lora_te2_text_projection"
    lora = {
        f"{name}.lora_up.weight": ("BF16", (1280, 4)),
        f"{name}.lora_down.weight": ("BF16", (4, 1280)),
        f"{name}.alpha": ("F32", ()),
    }
    write_safetensors(tmp_path / "lora.safetensors", lora, values={f"{name}.alpha": struct.pack("<f", 4.0)})
    assert (
        cli.main(
            ["inspect", str(tmp_path / "lora.safetensors"), "--model", str(tmp_path / "model.safetensors"), "--json"]
        )
        == 0
    )
    assert '"modules_used": 1' in capsys.readouterr().out
    assert (
        cli.main(
            [
                "plan",
                str(tmp_path / "model.safetensors"),
                str(tmp_path / "lora.safetensors"),
                "--vram",
                "8GB",
                "--ram",
                "16GB",
            ]
        )
        == 0
    )
