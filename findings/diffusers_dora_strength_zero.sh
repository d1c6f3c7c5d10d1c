#!/usr/bin/env bash
# Guess:    A LoRA at strength 0 is off, and at strength 0.1 it has about a tenth of its effect. A DoRA too.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     A DoRA of 100 steps at strength 0 keeps 21 % of its effect (LoRA of the same training: 0 %), at 0.001 the
#           same. The strength multiplies the factors only; the trained magnitudes stay in force.
#           fuse_lora(lora_scale=0) changes the weights likewise. disable_lora() does take it off.
# Matters:  A slider of strengths never reaches the model without the DoRA. A schedule that ends at 0, or a comparison
#           against 0, compares with a picture that still has part of it.
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


torch.manual_seed(5)
noise, text, goal = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 16), torch.randn(4, 4, 8, 8)


def trained(dora):
    model = unet()
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=names, use_dora=dora))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        (model(noise, 10, text).sample - goal).square().mean().backward()
        optimizer.step()
    return model


for dora in (False, True):
    model = trained(dora)
    with torch.no_grad():
        plain = unet()(noise, 10, text).sample
        model.disable_lora()
        disabled = (model(noise, 10, text).sample - plain).norm().item()
        model.enable_lora()

        def effect(strength):
            model.set_adapters(["default"], [strength])
            return (model(noise, 10, text).sample - plain).norm().item()

        whole = effect(1.0)
        kind = "DoRA" if dora else "LoRA"
        check(f"{kind} disabled", disabled / whole, 0, 1e-4)
        for strength in (0.0, 0.001):
            low, high = (0.1, 0.4) if dora else (0, 0.01)
            check(f"{kind} at {strength}, in its effect at 1", effect(strength) / whole, low, high)
        effect(1.0)
        model.fuse_lora(lora_scale=0.0)
        change = (model(noise, 10, text).sample - plain).norm().item()
        check(f"{kind} fused with lora_scale=0", change / whole, *((0.1, 0.4) if dora else (0, 0.01)))
PY
