#!/usr/bin/env bash
# Guess:    A strength of 1 is an adapter as it is, so setting it changes nothing; 2 is twice the effect.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     Setting an AdaLoRA to 1 divides it by its first rank: 0.083 is left with init_r = 12, the default, and 0.25
#           with 4. Its own scale is alpha, divided by the rank while it runs; set_scale() stores alpha / rank in its
#           place, and the division comes on top. diffusers' set_adapters() and PEFT's set_scale() both do it. A
#           LoRA stays as it is.
# Matters:  The first touch of a strength slider all but switches an AdaLoRA off, and the value that mends it, 12, is
#           nowhere to be read.
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
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def settings(kind, rank, names):
    if kind == "LoRA":
        return LoraConfig(r=rank, lora_alpha=8, target_modules=names)
    return AdaLoraConfig(init_r=rank, target_r=rank, lora_alpha=8, total_step=10, target_modules=names)


def fill(model):
    """Gives the factors of an adapter the values of a training."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


torch.manual_seed(9)
given, noise, text = torch.randn(5, 32), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
assert AdaLoraConfig(total_step=10).init_r == 12
with torch.no_grad():
    for kind, rank in (("LoRA", 12), ("AdaLoRA", 4), ("AdaLoRA", 12)):
        left = 1 if kind == "LoRA" else 1 / rank
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(32, 48))
        plain = base(given)
        model = get_peft_model(base, settings(kind, rank, ["0"])).eval()
        fill(model)
        layer = model.base_model.model[0]
        change = model(given) - plain

        def strength():
            return (((model(given) - plain) * change).sum() / change.square().sum()).item()

        for given_strength in (1.0, 2.0, float(rank)):
            layer.set_scale("default", given_strength)
            expected = given_strength * left
            what = f"{kind} of rank {rank}, set_scale({given_strength})"
            check(what, strength(), expected * 0.999, expected * 1.001)

        model = unet()
        plain_picture = model(noise, 10, text).sample
        model.add_adapter(settings(kind, rank, ["to_q", "to_v"]))
        fill(model)
        model.eval()
        effect = (model(noise, 10, text).sample - plain_picture).norm().item()
        model.set_adapters(["default"], [1.0])
        after = (model(noise, 10, text).sample - plain_picture).norm().item() / effect
        what = f"{kind} of rank {rank}, diffusers' set_adapters at 1: effect on a UNet"
        check(what, after, left * 0.9, left * 1.1)
PY
