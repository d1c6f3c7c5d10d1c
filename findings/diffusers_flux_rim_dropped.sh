#!/usr/bin/env bash
# Guess:    load_lora_weights() applies all of a kohya file for Flux, or names the parts that it leaves out.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     Of a file for 13 layers it applies the 3 that lie in blocks. img_in, txt_in, time_in, vector_in, guidance_in
#           and final_layer, 10 layers, are gone, and no warning has their names. The conversion knows them but forgets
#           the prefix "transformer." there, and what has another prefix is left out. Under diffusers' own names the
#           same layers are applied.
# Matters:  Files with those layers exist, or the conversion would not list them: trained on all layers, or distilled.
#           The picture is then neither the base's nor the one that other programs make of the same file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 diffusers==0.42.1
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

BLOCK = {
    "double_blocks_0_img_attn_proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks_0_img_mlp_0": "transformer_blocks.0.ff.net.0.proj",
    "double_blocks_0_img_mlp_2": "transformer_blocks.0.ff.net.2",
}
RIM = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


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


def loaded(tensors):
    """Returns the names of the layers that have an adapter once the file is loaded."""
    save_file(tensors, "lora.safetensors")
    model = flux()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=model,
    )  # fmt: skip
    words.all.clear()
    pipeline.load_lora_weights("lora.safetensors")
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


shapes = {name: module.weight.shape for name, module in flux().named_modules() if isinstance(module, torch.nn.Linear)}
kohya, own = {}, {}
for theirs, ours in (BLOCK | RIM).items():
    down, up = torch.randn(4, shapes[ours][1]), torch.randn(shapes[ours][0], 4)
    kohya |= {f"lora_unet_{theirs}.lora_down.weight": down, f"lora_unet_{theirs}.lora_up.weight": up}
    kohya[f"lora_unet_{theirs}.alpha"] = torch.tensor(4.0)
    own |= {f"transformer.{ours}.lora_A.weight": down, f"transformer.{ours}.lora_B.weight": up}

check("under diffusers' names: layers of the file that are applied", len(loaded(own)), 13, 13)
found = loaded(kohya)
print("as a kohya file:", sorted(found))
check("as a kohya file: layers in blocks that are applied", len(found & set(BLOCK.values())), 3, 3)
check("as a kohya file: other layers that are applied", len(found & set(RIM.values())), 0, 0)
print("said:", words.all)
named = [name for name in (*RIM, *RIM.values()) if any(name in text for text in words.all)]
check("as a kohya file: lost layers that a warning names", len(named), 0, 0)
PY
