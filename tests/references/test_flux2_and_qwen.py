"""LoRAs for Flux.2, Chroma and Qwen-Image: what peft trains on diffusers' model, in every spelling, against its own fusing.

The original layout of a model is a checkpoint that diffusers converts itself: what the guard adds there has to come out
of the conversion as what diffusers' fusing adds.
"""

import copy
import functools
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.end_to_end import fill
from support.make import gen, rand
from support.named_models import assert_changes, change_of, module_of
from support.small_models import chroma
from support.stream_layouts import bfl2

pytest.importorskip("peft", reason="peft writes the reference")
from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel
from diffusers.loaders import lora_conversion_utils as lora_names
from diffusers.loaders import single_file_utils as checkpoints
from peft import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, about classes it makes itself

H, STRENGTH = 16, 0.8


def flat(name):
    return name.replace(".", "_")


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
MAKE = {
    "flux2": lambda: Flux2Transformer2DModel(
        **HEADS, num_single_layers=2, joint_attention_dim=24, in_channels=128, axes_dims_rope=(2, 2, 2, 2)
    ),
    "klein": lambda: Flux2Transformer2DModel(
        **HEADS, num_single_layers=2, joint_attention_dim=24, in_channels=128, axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    ),
    "qwen": lambda: QwenImageTransformer2DModel(**HEADS, joint_attention_dim=24, axes_dims_rope=(2, 2, 4)),
    "qwen edit": lambda: QwenImageTransformer2DModel(
        **HEADS, joint_attention_dim=24, axes_dims_rope=(2, 2, 4), zero_cond_t=True, use_additional_t_cond=True
    ),
    "chroma": chroma,
}  # fmt: skip


@functools.cache
def model_of(name):
    return fill(MAKE[name]()).requires_grad_(False)


@functools.cache
def trained(name, only=""):
    """The tensors of an adapter of peft on every linear layer, and what fusing it adds, by parameter."""
    base = model_of(name)
    model = copy.deepcopy(base)
    layers = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and only in n]
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=layers))
    with torch.no_grad():
        for number, p in enumerate(p for key, p in model.named_parameters() if ".lora_" in key):
            p.copy_(torch.randn(p.shape, generator=gen(50 + number)))
    state = {key.replace(".default", ""): p.detach().clone() for key, p in model.named_parameters() if ".lora_" in key}
    model.fuse_lora(lora_scale=STRENGTH)
    after = {key.replace(".base_layer", ""): p.double() for key, p in model.named_parameters() if ".lora_" not in key}
    deltas = {key: after[key] - p.double() for key, p in base.named_parameters()}
    return state, {key: delta for key, delta in deltas.items() if delta.any()}


def with_alpha(state, spell, up="lora_up.weight", down="lora_down.weight"):
    """The adapter with every module spelled anew, in kohya's fields, which need no settings beside the tensors."""
    tensors = {}
    for key, value in state.items():
        module, _, field = key.partition(".lora_")
        tensors[f"{spell(module)}.{down if field.startswith('A') else up}"] = value
        tensors[f"{spell(module)}.alpha"] = torch.tensor(6.0)
    return tensors


SPELLINGS = {
    "diffusers": lambda module: "transformer." + module,
    "bare": lambda module: module,
    "base_model": lambda module: "base_model.model." + module,
    "ai-toolkit": lambda module: "diffusion_model." + module,
    "SimpleTuner": lambda module: "transformer.base_model.model." + module,
    "lycoris": lambda module: "lycoris_" + flat(module),
    "OneTrainer": lambda module: "lora_transformer_" + flat(module),
    "musubi": lambda module: "lora_unet_" + flat(module),
    "two underscores": lambda module: "lora_unet__" + flat(module),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", MAKE)
def test_every_layer_in_the_layout_of_diffusers(name, spelling, tmp_path):
    state, deltas = trained(name)
    tensors = with_alpha(state, SPELLINGS[spelling])
    changes, lora = change_of(model_of(name), tensors, tmp_path, strength=STRENGTH)
    assert_changes(changes, deltas)
    assert (lora.used, lora.skipped) == (len(deltas), [])


@pytest.mark.parametrize("name", MAKE)
def test_the_file_that_diffusers_writes(name, tmp_path):
    model = copy.deepcopy(model_of(name))
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=layers))
    state, deltas = trained(name)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".lora_" in key:
                p.copy_(state[key.replace(".default", "")])
    model.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    changes, _ = change_of(model_of(name), load_file(file), tmp_path, strength=STRENGTH, metadata=metadata)
    assert_changes(changes, deltas)


# ---- the original layout

ORIGINAL = {
    "flux2": (
        lambda: bfl2(H, 2, 2, text=24, guidance=True),
        checkpoints.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "klein": (lambda: bfl2(H, 2, 2, text=24), checkpoints.convert_flux2_transformer_checkpoint_to_diffusers),
}


def shapes_of(layers):
    return {
        f"{module}.{name}": (rows, columns) if columns and name == "weight" else (rows,)
        for module, rows, columns, names in layers
        for name in names.split()
    }


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["flux2", "klein"])
def test_the_names_of_diffusers_on_the_original_layout(name, spelling, tmp_path):
    state, deltas = trained(name)
    layers, convert = ORIGINAL[name]
    tensors = with_alpha(state, SPELLINGS[spelling])
    model = module_of(shapes_of(layers()))
    changes, lora = change_of(model, tensors, tmp_path, strength=STRENGTH)
    assert lora.skipped == []
    original = {key: changes.get(key, torch.zeros(p.shape).double()) for key, p in model.named_parameters()}
    converted = {key: change for key, change in convert(original).items() if change.any()}
    assert_changes(converted, deltas)


@pytest.mark.parametrize("alias", ["sformer_blocks", "transformer.sformer_blocks", "diffusion_model.sformer_blocks"])
def test_the_cut_name_of_the_double_blocks(alias, tmp_path):
    state, deltas = trained("klein", "transformer_blocks.")
    tensors = with_alpha(
        state, lambda module: module if "single" in module else module.replace("transformer_blocks", alias)
    )
    changes, _ = change_of(model_of("klein"), tensors, tmp_path, strength=STRENGTH)
    assert_changes(changes, deltas)
    if alias.startswith("diffusion_model."):
        prefixed = {k if k.startswith("diffusion") else "diffusion_model." + k: v for k, v in tensors.items()}
        theirs = lora_names._convert_non_diffusers_flux2_lora_to_diffusers(prefixed)
        assert {key.rpartition(".lora")[0] for key in theirs if ".lora" in key} == {
            "transformer." + key.removesuffix(".weight") for key in deltas
        }


def original_lora(name):
    """A LoRA for every matrix of the original layout, and the delta of each."""
    tensors, deltas = {}, {}
    for number, (key, shape) in enumerate(shapes_of(ORIGINAL[name][0]()).items()):
        if len(shape) == 2:
            module = key.removesuffix(".weight")
            up, down = rand(shape[0], 4, seed=2 * number), rand(4, shape[1], seed=2 * number + 1)
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            deltas[key] = STRENGTH * up.double() @ down.double()
    return tensors, deltas


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "base_model.model.", "lora_unet_", "lycoris_"])
@pytest.mark.parametrize("name", ["flux2", "klein"])
def test_the_original_names_on_the_model_of_diffusers(name, prefix, tmp_path):
    tensors, deltas = original_lora(name)
    is_flat = prefix.endswith("_")
    written = {}
    for key, value in tensors.items():
        module, _, field = key.partition(".lora_")
        written[f"{prefix}{flat(module) if is_flat else module}.lora_{field}"] = value
    changes, lora = change_of(model_of(name), written, tmp_path, strength=STRENGTH)
    zeros = {
        key: torch.zeros(shape).double() for key, shape in shapes_of(ORIGINAL[name][0]()).items() if len(shape) == 1
    }
    expected = {key: d for key, d in ORIGINAL[name][1]({**zeros, **deltas}).items() if d.any()}
    assert_changes(changes, expected)
    assert lora.skipped == []


def test_the_original_names_of_klein_as_diffusers_converts_the_lora(tmp_path):
    """Not the last modulation: diffusers forgets there that its halves are swapped, which its checkpoints have."""
    tensors, _ = original_lora("klein")
    tensors = {
        f"diffusion_model.{key}": value for key, value in tensors.items() if "final_layer.adaLN_modulation" not in key
    }
    changes, _ = change_of(model_of("klein"), tensors, tmp_path, strength=STRENGTH)
    model = copy.deepcopy(model_of("klein"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_lora_adapter(
            lora_names._convert_non_diffusers_flux2_lora_to_diffusers(dict(tensors)), prefix="transformer"
        )
        model.fuse_lora(lora_scale=STRENGTH)
    after = {k.replace(".base_layer", ""): p.double() for k, p in model.named_parameters() if ".lora_" not in k}
    expected = {
        k: after[k] - p.double()
        for k, p in model_of("klein").named_parameters()
        if not torch.equal(after[k], p.double())
    }
    assert_changes(changes, expected)


def test_the_layer_of_flux2_that_both_layouts_fuse_in_parts(tmp_path):
    """OneTrainer's numbers, and the attention alone: rows of query, key, value and both halves of the MLP."""
    parts = [rand(rows, 4, seed=n) for n, rows in enumerate((H, H, H, 6 * H))]
    down = rand(4, H, seed=9)
    single = "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"
    tensors = {}
    for n, up in enumerate(parts):
        name = f"transformer.single_blocks.0.linear1.{n}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down.clone()}
    changes, _ = change_of(model_of("klein"), tensors, tmp_path)
    assert_changes(changes, {single: torch.cat(parts).double() @ down.double()})
    fused = {
        "single_blocks.0.linear1_qkv.lora_up.weight": torch.cat(parts[:3]),
        "single_blocks.0.linear1_qkv.lora_down.weight": down,
    }
    changes, _ = change_of(model_of("klein"), fused, tmp_path)
    expected = torch.zeros(9 * H, H, dtype=torch.float64)
    expected[: 3 * H] = torch.cat(parts[:3]).double() @ down.double()
    assert_changes(changes, {single: expected})
