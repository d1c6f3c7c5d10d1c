#!/usr/bin/env bash
# Guess:    A LoRA that works on an offloaded model can be fused into it: fuse_lora() merges, or raises.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     The LoRA works before. After fuse_lora() on a model with accelerate's cpu_offload its effect is 0.0, though
#           every layer says that it is merged. The sum is made on the meta device; the weights that the hooks bring in
#           do not have it. After unload_lora() nothing is left of the LoRA.
# Matters:  Sequential offload is how large models run on small cards. Fused there, a LoRA is lost with no error, and
#           the picture is the base model's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 diffusers==0.42.1
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer


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


def run(model):
    with torch.no_grad():
        return model(noise, 10, text).sample


plain = run(unet())
for offloaded, kept in ((False, 1), (True, 0)):
    model = unet()
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    effect = (run(model) - plain).norm().item()
    if offloaded:
        cpu_offload(model, execution_device=torch.device("cpu"))
    name = "offloaded" if offloaded else "ordinary"
    check(f"{name}: effect before fusing", (run(model) - plain).norm().item() / effect, 0.999, 1.001)
    model.fuse_lora()
    merged = [layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    check(f"{name}: layers that say they are merged", sum(merged) / len(merged), 1, 1)
    check(f"{name}: effect after fusing", (run(model) - plain).norm().item() / effect, kept - 1e-3, kept + 1e-3)
PY
