#!/usr/bin/env bash
# Guess:    An adapter that was swapped in with hotswap=True has its own alpha from then on: at the next set_adapters(),
#           and in a file that is saved from it.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     True until then. set_adapters() multiplies by alpha / rank of the adapter that was swapped out. With alpha
#           16 in place of 4, a strength of 1 gives 0.25 of the LoRA; swapped the other way round it gives 4. The
#           saved file has the old alpha as well, and loads as 0.25 of the LoRA.
# Matters:  To swap and then set a strength is what a server does with each request. Every LoRA then has a strength that
#           depends on which one was loaded first, and a comparison of strengths compares nothing.
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


def layer(model):
    return model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q


def load(model, path, **settings):
    weight_name = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(path, adapter_name="style", prefix=None, weight_name=weight_name, **settings)


def change(model):
    """Returns the change of one weight, at the strength that is in force."""
    return layer(model).get_delta_weight("style").detach().clone()


for seed, (path, alpha) in enumerate((("weak", 4), ("strong", 16))):
    model = unet()
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.save_lora_adapter(path)

for first, second, ratio in (("weak", "strong", 0.25), ("strong", "weak", 4.0)):
    model = unet()
    load(model, second)
    model.set_adapters(["style"], [1.0])
    wanted = change(model)

    def strength(model):
        found = change(model)
        factor = ((found * wanted).sum() / wanted.square().sum()).item()
        assert (found - factor * wanted).norm() < 1e-4 * wanted.norm()
        return factor

    model = unet()
    load(model, first)
    load(model, second, hotswap=True)
    check(f"{second} for {first}: right after the swap", strength(model), 0.999, 1.001)
    for given in (1.0, 0.5):
        model.set_adapters(["style"], [given])
        expected = given * ratio
        check(f"{second} for {first}: at strength {given}", strength(model), expected * 0.999, expected * 1.001)
    model.save_lora_adapter("saved", adapter_name="style")
    again = unet()
    load(again, "saved")
    check(f"{second} for {first}: saved and loaded", strength(again), ratio * 0.999, ratio * 1.001)
PY
