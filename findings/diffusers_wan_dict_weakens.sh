#!/usr/bin/env bash
# Guess:    Loading a LoRA from a dictionary of tensors reads the tensors. Loaded, unloaded and loaded again it has the
#           same strength; the loader even says that it copies a dictionary so as not to change it.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     The copy holds the same tensors, and for Wan they are multiplied in place. With alpha 2 at rank 8 the second
#           load has cross attention and feed-forward at 0.25 of the first, the third at 0.0625. Self attention stays.
# Matters:  Whoever keeps LoRAs in memory, to switch between requests without reading the disk, gets a weaker LoRA with
#           every switch, and not evenly. With alpha above the rank it grows instead. Give such a loader a deep copy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 diffusers==0.42.1
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

LAYERS = {
    "self_attn.q": "attn1.to_q",
    "cross_attn.q": "attn2.to_q",
    "ffn.0": "ffn.net.0.proj",
}


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


torch.manual_seed(0)
model = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=64, num_layers=1, rope_max_seq_len=32,
)  # fmt: skip
pipeline = WanPipeline(
    tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model
)
tensors, wanted = {}, {}
for theirs, ours in LAYERS.items():
    shape = model.get_submodule(f"blocks.0.{ours}").weight.shape
    down, up = torch.randn(8, shape[1]), torch.randn(shape[0], 8)
    module = f"diffusion_model.blocks.0.{theirs}"
    tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    tensors[f"{module}.alpha"] = torch.tensor(2.0)
    wanted[ours] = up @ down * 2 / 8

for load in range(3):
    pipeline.load_lora_weights(tensors, adapter_name=f"load{load}")
    for ours in LAYERS.values():
        change = model.get_submodule(f"blocks.0.{ours}").get_delta_weight(f"load{load}").detach()
        strength = ((change * wanted[ours]).sum() / wanted[ours].square().sum()).item()
        expected = 1.0 if ours == "attn1.to_q" else 0.25**load
        check(f"load {load + 1}, {ours}: strength", strength, expected * 0.999, expected * 1.001)
    pipeline.unload_lora_weights()
PY
