"""Prefixes of trainers and wrappers, in files and before models: every one leads to the module it stands before."""

import warnings

import pytest
import torch
from support.named_models import assert_changes, change_of, kohya, module_of, peft

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraMismatchError

H = 8
FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (3 * H, H),
    "double_blocks.0.img_attn.proj.weight": (H, H),
    "double_blocks.0.img_mod.lin.weight": (6 * H, H),
    "single_blocks.0.linear1.weight": (7 * H, H),
    "single_blocks.0.linear2.weight": (H, 5 * H),
}
PROJ = "double_blocks.0.img_attn.proj.weight"
ORIGINAL, DIFFUSERS = "double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"
DOTTED = [
    "",
    "transformer.",
    "transformer.base_model.model.",
    "base_model.model.",
    "base_model.model.model.",
    "base_model.model.transformer.",
    "base_model.model.model.diffusion_model.",
    "base_model.model.transformer.diffusion_model.",
    "unet.base_model.model.",
    "diffusion_model.base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "model.diffusion_model.diffusion_model.",
    "transformer.diffusion_model.",
    "transformer.transformer.",
    "_orig_mod.",
    "_orig_mod.transformer.",
    "transformer._orig_mod.",
    "base_model.model._orig_mod.",
    "model.",
    "module.",
    "module.transformer.",
    "dit.",
    "pipe.dit.",
]
FLAT = [
    "lora_unet_",
    "lora_unet__",
    "lora_unet_model_diffusion_model_",
    "lora_unet_diffusion_model_",
    "lora_unet_transformer_",
    "lora_unet_unet_",
    "lora_transformer_",
    "lora_",
    "lycoris_",
    "lycoris_transformer_",
    "lycoris_model_diffusion_model_",
    "lora_unet__orig_mod_",
    "oft_unet_",
]


@pytest.mark.parametrize("module", [ORIGINAL, DIFFUSERS])
@pytest.mark.parametrize("prefix", DOTTED)
def test_prefixes_with_dots(prefix, module, tmp_path):
    tensors, delta = peft(prefix + module, H, H, seed=1)
    changes, lora = change_of(module_of(FLUX), tensors, tmp_path)
    assert_changes(changes, {PROJ: delta})
    assert (lora.used, lora.skipped) == (1, [])


@pytest.mark.parametrize("module", [ORIGINAL, DIFFUSERS])
@pytest.mark.parametrize("prefix", FLAT)
@pytest.mark.parametrize("end", ["", "_"])
def test_prefixes_with_underscores(prefix, module, end, tmp_path):
    tensors, delta = kohya(prefix + module.replace(".", "_") + end, H, H, seed=1)
    changes, _ = change_of(module_of(FLUX), tensors, tmp_path)
    assert_changes(changes, {PROJ: delta})


@pytest.mark.parametrize(
    "written",
    [
        "transformer_2.double_blocks.0.img_attn.proj",  # the second transformer of a pipeline
        "vae.double_blocks.0.img_attn.proj",
        "controlnet.double_blocks.0.img_attn.proj",
        "lora_controlnet_double_blocks_0_img_attn_proj",
        "blocks.0.img_attn.proj",
        "xtransformer.double_blocks.0.img_attn.proj",
    ],
)
def test_other_beginnings_are_no_prefixes(written, tmp_path):
    tensors = {**peft(written, H, H, seed=1)[0], **peft("transformer.single_blocks.0.linear2", H, 5 * H, seed=3)[0]}
    changes, lora = change_of(module_of(FLUX), tensors, tmp_path)
    assert list(changes) == ["single_blocks.0.linear2.weight"]
    assert lora.skipped == [f"{written}.weight"]


def test_a_name_of_the_model_counts_before_one_with_a_prefix_taken_off(tmp_path):
    shapes = {"model.proj.weight": (H, H), "proj.weight": (H, H), "unet_proj.weight": (H, H), "lora_a.b.weight": (H, H)}
    for written, changed in {
        "model.proj": "model.proj",
        "proj": "proj",
        "lora_unet_proj": "unet_proj",
        "lora_lora_a_b": "lora_a.b",
        "lora_a_b": "lora_a.b",
    }.items():
        tensors, delta = kohya(written, H, H, seed=1)
        changes, _ = change_of(module_of(shapes), tensors, tmp_path)
        assert_changes(changes, {changed + ".weight": delta})


@pytest.mark.parametrize("written", ["transformer_blocks.0.attn.to_q", "lycoris_transformer_blocks_0_attn_to_q"])
def test_the_blocks_of_one_model_are_not_cut_to_those_of_another(written, tmp_path):
    shapes = {"blocks.0.attn.to_q.weight": (H, H), "blocks.0.ffn.0.weight": (H, H)}
    tensors = {**peft(written, H, H, seed=1)[0], **peft("transformer.blocks.0.ffn.0", H, H, seed=2)[0]}
    changes, lora = change_of(module_of(shapes), tensors, tmp_path)
    assert list(changes) == ["blocks.0.ffn.0.weight"]
    assert lora.skipped == [f"{written}.weight"]
    tensors, delta = peft("lora_transformer_blocks_0_attn_to_q", H, H, seed=1)
    assert_changes(change_of(module_of(shapes), tensors, tmp_path)[0], {"blocks.0.attn.to_q.weight": delta})


def compiled(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(model)


def inside(*names):
    def wrap(model):
        for name in reversed(names):
            outer = torch.nn.Module()
            outer.add_module(name, model)
            model = outer
        return model

    return wrap


WRAPPED = {
    "compiled": compiled,
    "data parallel": torch.nn.DataParallel,
    "compiled, then data parallel": lambda model: torch.nn.DataParallel(compiled(model)),
    "model": inside("model"),
    "module": inside("module"),
    "dit": inside("dit"),
    "pipe.dit": inside("pipe", "dit"),
    "base_model.model": inside("base_model", "model"),
    "transformer": inside("transformer"),
    "transformer, compiled": lambda model: inside("transformer")(compiled(model)),
    "model.diffusion_model": inside("model", "diffusion_model"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("written", ["transformer." + DIFFUSERS, "lora_unet_double_blocks_0_img_attn_proj", ORIGINAL])
def test_a_wrapped_model(wrapper, written, tmp_path):
    model = module_of(FLUX)
    tensors, delta = peft(written, H, H, seed=1)
    changes, lora = change_of(WRAPPED[wrapper](model), tensors, tmp_path, inner=model)
    assert_changes(changes, {PROJ: delta})
    assert (lora.used, lora.skipped) == (1, [])


def test_single_blocks_that_are_compiled(tmp_path):
    model = module_of(FLUX)
    model.double_blocks._modules["0"] = compiled(model.double_blocks._modules["0"])
    tensors, delta = kohya("lora_unet_double_blocks_0_img_attn_proj", H, H, seed=1)
    changes, _ = change_of(model, tensors, tmp_path)
    assert_changes(changes, {"double_blocks.0._orig_mod.img_attn.proj.weight": delta})
    tensors, delta = peft("double_blocks.0._orig_mod.img_attn.proj", H, H, seed=1)
    assert_changes(change_of(module_of(FLUX), tensors, tmp_path)[0], {PROJ: delta})


def test_layers_that_peft_has_wrapped(tmp_path):
    """A model with an adapter of peft: its own weights are called `base_layer`."""
    inner = {name.replace(".weight", ".base_layer.weight"): shape for name, shape in FLUX.items()}
    adapter = {"double_blocks.0.img_attn.proj.lora_A.default.weight": (2, H)}
    model = module_of({f"base_model.model.{name}": shape for name, shape in (inner | adapter).items()})
    for written in ("transformer." + DIFFUSERS, "lora_unet_double_blocks_0_img_attn_proj"):
        tensors, delta = peft(written, H, H, seed=1)
        changes, _ = change_of(model, tensors, tmp_path)
        assert_changes(changes, {"base_model.model.double_blocks.0.img_attn.proj.base_layer.weight": delta})


def test_names_of_many_prefixes_cost_no_more_than_others(tmp_path):
    tensors, _ = peft("lora_" * 150 + ORIGINAL, H, H, seed=1)
    tensors |= peft("transformer.single_blocks.0.linear2", H, 5 * H, seed=3)[0]
    assert list(change_of(module_of(FLUX), tensors, tmp_path)[0]) == ["single_blocks.0.linear2.weight"]


@pytest.mark.parametrize("wrapper", ["compiled", "data parallel", "model"])
def test_the_architecture_of_a_wrapped_model_is_known(wrapper, tmp_path):
    tensors = kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 640, 2048, seed=1)[0]
    with pytest.raises(LoraMismatchError, match="made for SDXL, this is Flux"):
        change_of(WRAPPED[wrapper](module_of(FLUX)), tensors, tmp_path)


CLIP = {
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (H, H),
    "text_model.encoder.layers.0.mlp.fc1.weight": (2 * H, H),
    "text_model.final_layer_norm.weight": (1280,),
}


@pytest.mark.parametrize("wrapper", ["compiled", "data parallel", "model"])
def test_a_wrapped_text_encoder(wrapper, tmp_path):
    model = module_of(CLIP)
    tensors, delta = kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1", 2 * H, H, seed=1)
    changes, _ = change_of(WRAPPED[wrapper](model), tensors, tmp_path, inner=model)
    assert_changes(changes, {"text_model.encoder.layers.0.mlp.fc1.weight": delta})


def test_a_model_of_one_wrapped_layer(tmp_path):
    model = torch.nn.Module()
    model.model = torch.nn.Linear(H, H).requires_grad_(False)
    tensors, delta = kohya("model", H, H, seed=1)
    assert_changes(change_of(model, tensors, tmp_path)[0], {"model.weight": delta})
    assert LoraGuard(model).remove() is not None
