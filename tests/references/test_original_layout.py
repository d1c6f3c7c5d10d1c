"""Flux and Chroma LoRAs in the authors' own layout, on models in that of diffusers, where the fused weights are apart."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.end_to_end import (
    assert_seen,
    check_in_modes,
    one_thread,  # noqa: F401  # a fixture for all tests here
    without_alpha,
    without_module,
)
from support.original_layouts import bfl

pytest.importorskip("peft", reason="peft writes the reference")
from diffusers.loaders import lora_conversion_utils as lora_names
from support.small_models import STRENGTH, delta_of, forward_of, fused, model_of, small_lora, with_deltas

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, about classes it makes itself

MODES = ("auto", "on_the_fly", "merge")

SPLIT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "in_proj": ("in_proj",),
    "out_proj": ("out_proj",),
    "in_layer": ("linear_1",),
    "out_layer": ("linear_2",),
}


def in_diffusers(module):
    """The diffusers layers that a BFL module is, top rows first."""
    for theirs, ours in (("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks")):
        if found := re.fullmatch(rf"{theirs}\.(\d+)\.(.+)", module):
            return [f"{ours}.{found[1]}.{layer}" for layer in SPLIT[found[2]]]
    if found := re.fullmatch(r"(distilled_guidance_layer\.(?:layers\.\d+\.)?)(\w+)", module):
        return [found[1] + SPLIT[found[2]][0]]
    return list(SPLIT[module])


def modules_of(name):
    """`{BFL module: (rows, columns)}`, of the size of the small models here."""
    return {module: (out, inner) for module, out, inner, _ in bfl(16, 2, 1, chroma=name == "chroma") if inner}


def split_deltas(model, module, delta):
    """The delta of a (fused) BFL module by diffusers layer, cut by hand."""
    if module == "final_layer.adaLN_modulation.1":
        # BFL's rows are (shift, scale), those of diffusers (scale, shift).
        return {"norm_out.linear": [(0, torch.cat(delta.chunk(2)[::-1]))]}
    deltas, first = {}, 0
    for layer in in_diffusers(module):
        rows = model.get_submodule(layer).weight.shape[0]
        deltas[layer] = [(0, delta[first : first + rows])]
        first += rows
    assert first == len(delta)
    return deltas


def spelled_bfl(module):
    return "diffusion_model." + module


def spelled_kohya(module):
    return "lora_unet_" + module.replace(".", "_")


@pytest.mark.parametrize("spell", [spelled_kohya, spelled_bfl])
@pytest.mark.parametrize("kind", ["lora", "loha"])
@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_fused_weights_of_the_original_layout(name, kind, spell, tmp_path):
    model, tensors, deltas = model_of(name), {}, {}
    for number, (module, shape) in enumerate(modules_of(name).items()):
        key = spell(module)
        up, down = small_lora(shape, number)
        if kind == "lora":
            tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
            delta = delta_of(up, down, 2.0)
        else:
            up2, down2 = small_lora(shape, 1000 + number)
            up2, down2 = up2 * 10, down2 * shape[1] ** 0.5
            tensors |= {
                f"{key}.hada_w1_a": up, f"{key}.hada_w1_b": down, f"{key}.hada_w2_a": up2, f"{key}.hada_w2_b": down2,
            }  # fmt: skip
            delta = 0.5 * (up.double() @ down.double()) * (up2.double() @ down2.double())
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
        deltas |= split_deltas(model, module, delta)
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    forward = forward_of(name)
    reference = forward(with_deltas(model, deltas))
    check_in_modes(model, file, reference, forward, strength=STRENGTH, used=len(deltas), modes=MODES)
    assert_seen(model, [(file, STRENGTH * 1.05)], reference, forward)
    assert_seen(model, [(without_alpha(file, tmp_path / "alpha"), STRENGTH)], reference, forward)
    for part in ("qkv", "linear1"):
        assert_seen(model, [(without_module(file, tmp_path / part, part), STRENGTH)], reference, forward)


def test_fused_weights_as_diffusers_converts_them(tmp_path):
    """The double blocks, whose sizes diffusers' converter takes from the tensors."""
    model, tensors = model_of("flux"), {}
    for number, (module, shape) in enumerate(modules_of("flux").items()):
        if module.startswith("double_blocks"):
            up, down = small_lora(shape, number)
            key = spelled_kohya(module)
            tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)}
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    own = copy.deepcopy(model)
    own.load_lora_adapter(lora_names._convert_kohya_flux_lora_to_diffusers(load_file(file)), prefix="transformer")
    reference = forward_of("flux")(fused(own, STRENGTH))
    # Ten layers and four more for the two fused ones, in two blocks.
    check_in_modes(model, file, reference, forward_of("flux"), strength=STRENGTH, used=2 * (10 + 4), modes=MODES)
    assert_seen(model, [(without_module(file, tmp_path / "part", "qkv"), STRENGTH)], reference, forward_of("flux"))
