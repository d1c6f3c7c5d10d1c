#!/usr/bin/env bash
# Guess:    unfuse_lora() undoes fuse_lora(): the weights are what they were, and the adapter has the strength it had
#           before.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     It subtracts at the strength of the moment. set_adapters() to 0.3 while the LoRA is fused at 1 changes no
#           output, but then 70 % of the LoRA stay in the weights for good, with LoRAs disabled or unloaded too. And
#           lora_scale outlives its fusing: 0.5, unfused, fused with 0.5 again gives 0.25.
# Matters:  A pipeline that fuses and unfuses per request drifts away from its checkpoint without a word. Only loading
#           the checkpoint again mends it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 diffusers==0.42.1
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def with_lora():
    model = unet()
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return model


def in_weight(model):
    """Return how much of the LoRA is in the weight of one layer."""
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    layer = getattr(layer, "base_layer", layer)
    change = layer.weight.detach() - original
    return ((change * lora).sum() / lora.square().sum()).item()


first = unet().down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
original = first.weight.detach()
layer = with_lora().down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
lora = layer.get_delta_weight("default").detach()

model = with_lora()
model.fuse_lora()
check("fused", in_weight(model), 0.999, 1.001)
model.set_adapters(["default"], [0.3])
check("set to 0.3", in_weight(model), 0.999, 1.001)
model.unfuse_lora()
check("unfused, left in the weight", in_weight(model), 0.699, 0.701)
model.unload_lora()
check("unloaded, left in the weight", in_weight(model), 0.699, 0.701)

model = with_lora()
for wanted in (0.5, 0.25, 0.125):
    model.fuse_lora(lora_scale=0.5)
    check("fused with 0.5", in_weight(model), wanted - 1e-3, wanted + 1e-3)
    model.unfuse_lora()
    check("unfused", in_weight(model), -1e-3, 1e-3)
PY
