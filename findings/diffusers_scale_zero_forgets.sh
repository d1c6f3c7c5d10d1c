#!/usr/bin/env bash
# Guess:    The scale of one call, cross_attention_kwargs={'scale': s}, lasts for that call. Afterwards the strengths of
#           set_adapters() are in force again.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     True for every s but 0. After one call with scale 0 all active adapters are at strength 1, those at 0.3 and
#           those at 0 too.
# Matters:  A comparison picture without LoRAs, made by scale 0, changes every picture after it, and a LoRA that was set
#           to 0 comes on at full strength.
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


torch.manual_seed(1)
noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
model = unet()
for name in ("first", "second"):
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)


def run(**settings):
    with torch.no_grad():
        return model(noise, 10, text, **settings).sample


def strengths(*values):
    model.set_adapters(["first", "second"], list(values))
    return run()


full = strengths(1.0, 1.0)
wanted = strengths(0.3, 0.0)
apart = (full - wanted).norm().item()
for scale in (1.0, 0.5, 1e-6, 0.0):
    strengths(0.3, 0.0)
    run(cross_attention_kwargs={"scale": scale})
    after = run()
    low, high = (0.999, 1.001) if scale == 0 else (0, 1e-4)
    off = (after - wanted).norm().item() / apart
    check(f"after a call with scale {scale}, off by (1 = both at strength 1)", off, low, high)
PY
