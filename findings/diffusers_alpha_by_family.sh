#!/usr/bin/env bash
# Guess:    What lora_A, lora_B and alpha of a layer mean does not depend on the family of the model: alpha / rank times
#           their product. A loader that does not read an alpha says so.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     With alpha 2 at rank 8, the loaders of Flux, Qwen-Image and Z-Image apply 0.25. Those of Flux.2, Wan, SD3,
#           Sana, LTX-Video, Lumina 2, AuraFlow, HunyuanVideo and CogVideoX apply 1, with no warning. Flux does so too
#           where the factors are called lora_down and lora_up.
# Matters:  alpha = 1 is a usual choice of trainers. Such a file is as many times too strong as its rank is high, in one
#           family and not in the next, so a converted or renamed LoRA cannot be judged by how strong it looks here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 diffusers==0.42.1
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import diffusers
import torch
from diffusers.loaders import lora_pipeline as loaders
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


class Words(logging.Handler):
    """Collects what is logged."""

    def __init__(self):
        super().__init__()
        self.all = []

    def emit(self, record):
        self.all.append(record.getMessage())


words = Words()
diffusers_logging.set_verbosity_warning()
diffusers_logging.add_handler(words)

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = {"axes_dims_rope": (4, 4, 8)}
SINGLE = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32}
SQUARE = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4}
# family: (its model, the settings of a tiny one)
FAMILIES = {
    "Flux": ("FluxTransformer2DModel", SINGLE | HEADS | ROPE | {"pooled_projection_dim": 32}),
    "Flux2": (
        "Flux2Transformer2DModel",
        SINGLE | HEADS | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
    ),
    "QwenImage": (
        "QwenImageTransformer2DModel",
        HEADS | ROPE | {"in_channels": 16, "out_channels": 4, "num_layers": 1, "joint_attention_dim": 16},
    ),
    "ZImage": (
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [64, 32, 32]},
    ),
    "Wan": (
        "WanTransformer3DModel",
        HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 1},
    ),
    "SD3": (
        "SD3Transformer2DModel",
        SQUARE | HEADS | {"num_layers": 1, "caption_projection_dim": 32, "joint_attention_dim": 32}
        | {"pooled_projection_dim": 64},
    ),
    "Sana": (
        "SanaTransformer2DModel",
        SQUARE | HEADS | {"num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
        | {"cross_attention_dim": 32, "caption_channels": 8},
    ),
    "LTXVideo": (
        "LTXVideoTransformer3DModel",
        HEADS | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 1}
        | {"caption_channels": 16},
    ),
    "Lumina2": (
        "Lumina2Transformer2DModel",
        {"sample_size": 4, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1}
        | {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2)}
        | {"axes_lens": (32, 32, 32), "cap_feat_dim": 32},
    ),
    "AuraFlow": (
        "AuraFlowTransformer2DModel",
        SQUARE | HEADS | {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 32}
        | {"caption_projection_dim": 32, "pos_embed_max_size": 64},
    ),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1}
        | {"num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8}
        | {"rope_axes_dim": (2, 4, 4)},
    ),
    "CogVideoX": (
        "CogVideoXTransformer3DModel",
        HEADS | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 2, "text_embed_dim": 32, "num_layers": 1}
        | {"sample_width": 16, "sample_height": 16, "sample_frames": 9},
    ),
}  # fmt: skip


def strengths(family, prefix, down_name, up_name):
    """Returns the lowest and the highest strength at which the layers of a file are applied."""
    model_name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(diffusers, model_name)(**settings)
    loader = getattr(loaders, f"{family}LoraLoaderMixin")
    tensors, wanted = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v"):
            down, up = torch.randn(8, layer.in_features), torch.randn(layer.out_features, 8)
            tensors |= {f"{prefix}{name}.{down_name}.weight": down, f"{prefix}{name}.{up_name}.weight": up}
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(2.0)
            wanted[name] = up @ down
    save_file(tensors, "lora.safetensors")
    words.all.clear()
    if family == "Flux":  # the only one that hands alphas on; the others multiply them into the factors, or do not
        state, alphas = loader.lora_state_dict("lora.safetensors", return_alphas=True)
        loader.load_lora_into_transformer(state, network_alphas=alphas, transformer=model)
    else:
        loader.load_lora_into_transformer(loader.lora_state_dict("lora.safetensors"), transformer=model)
    found = []
    for name, product in wanted.items():
        layer = model.get_submodule(name)
        change = layer.get_delta_weight(layer.active_adapters[0]).detach()
        found.append(((change * product).sum() / product.square().sum()).item())
        assert (change - found[-1] * product).norm() < 1e-4 * product.norm()
    return min(found), max(found)


for family, prefix, factors, expected in (
    ("Flux", "transformer.", ("lora_A", "lora_B"), 0.25),
    ("QwenImage", "diffusion_model.", ("lora_A", "lora_B"), 0.25),
    ("ZImage", "diffusion_model.", ("lora_A", "lora_B"), 0.25),
    ("Flux", "transformer.", ("lora_down", "lora_up"), 1),
    ("Flux2", "transformer.", ("lora_A", "lora_B"), 1),
    ("Flux2", "diffusion_model.", ("lora_A", "lora_B"), 1),
    ("LTXVideo", "transformer.", ("lora_A", "lora_B"), 1),
    ("LTXVideo", "diffusion_model.", ("lora_A", "lora_B"), 1),
    *((family, "transformer.", ("lora_A", "lora_B"), 1) for family in ("Wan", "SD3", "Sana", "Lumina2")),
    *((family, "transformer.", ("lora_A", "lora_B"), 1) for family in ("AuraFlow", "HunyuanVideo", "CogVideoX")),
):
    what = f"{family}, {prefix}*.{factors[0]}"
    for bound, value in zip(("lowest", "highest"), strengths(family, prefix, *factors)):
        check(f"{what}, {bound} strength", value, expected * 0.999, expected * 1.001)
    check(f"{what}, warnings", len(words.all), 0, 0)
PY
