#!/usr/bin/env bash
# Guess:    load_lora_adapter(hotswap=True) replaces the one adapter that it names. All others keep their weights.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     It fills with zeros every adapter whose name contains the name. A swap of "style" leaves 0.0 of "style_two"
#           and all of "other"; a swap of "lora" wipes every adapter there is, as each tensor has lora_ in its name.
#           Nothing is raised and nothing is logged.
# Matters:  Names such as default and default_2, or v1 and v10, are what one gives to LoRAs that are loaded together. A
#           wiped one stays in the list and takes a strength, but has no effect until it is loaded from its file again.
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


torch.manual_seed(9)
noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)


def run(model):
    with torch.no_grad():
        return model(noise, 10, text).sample


def load(model, path, name, **settings):
    weight_name = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(path, adapter_name=name, prefix=None, weight_name=weight_name, **settings)


for seed, path in enumerate(("first", "second", "third")):
    model = unet()
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.save_lora_adapter(path)

plain = run(unet())
for swapped, beside, low, high in (
    ("style", "other", 1, 1),
    ("style", "style_two", 0, 0),
    ("v1", "v10", 0, 0),
    ("lora", "other", 0, 0),
):
    model = unet()
    load(model, "first", swapped)
    load(model, "third", beside)
    model.set_adapters([beside], [1.0])
    before = (run(model) - plain).norm().item()
    load(model, "second", swapped, hotswap=True)
    model.set_adapters([beside], [1.0])
    after = (run(model) - plain).norm().item()
    check(f"{swapped} swapped: left of {beside}", after / before, low, high)
    model.set_adapters([swapped], [1.0])
    alone = unet()
    load(alone, "second", "alone")
    check(f"{swapped} swapped: itself, off by", (run(model) - run(alone)).abs().max().item(), 0, 1e-5)
PY
