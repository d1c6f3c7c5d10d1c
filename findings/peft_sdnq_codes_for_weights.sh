#!/usr/bin/env bash
# Guess:    On a model that SDNQ has quantised to 8 bits, PEFT runs LoRA and DoRA beside the layers as it does on any
#           model, and merging puts them in, with some rounding, or refuses; with safe_merge it is the more careful one.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1 sdnq==0.2.8, any build of torch, on a CPU
# Seen:     A LoRA runs as it should. merge_and_unload() refuses it, but with safe_merge=True it runs through, takes the
#           adapter off, and leaves 0.0 of it: the sum is kept in the type of the weight, whose integers are codes, and
#           any change below one is cut to zero. A DoRA does not even run: its magnitudes are divided by the norms of
#           the codes, and a layer gives 0.05 % of what it should (int8). No merge refuses it, and both set every code
#           of the layer to zero.
# Matters:  SDNQ is one of the quantisers in diffusers. A LoRA merged the safe way saves the bare base, and a DoRA wipes
#           out each layer that it is for. An SDNQ layer is an ordinary Linear to isinstance, so whoever patches has to
#           ask for its dequantizer; after the layer's own dequantize() all of it is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 diffusers==0.42.1 sdnq==0.2.8
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sdnq import sdnq_post_load_quant
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


torch.manual_seed(0)
float_base = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh(), nn.Linear(256, 256, bias=False)).eval()
given = torch.randn(64, 256)
for kind in ("LoRA", "DoRA"):
    # a small adapter, made on the float model as a trainer makes it
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"], use_dora=kind == "DoRA")
    made = get_peft_model(copy.deepcopy(float_base), config)
    for name, value in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.05)
        if "magnitude" in name:
            value.data *= 1.2
    made.save_pretrained(kind)


def adapted(base, kind):
    return PeftModel.from_pretrained(copy.deepcopy(base), kind).eval()


@torch.no_grad()
def run(model):
    return model(given)


for weights in ("int8", "uint8"):
    base = sdnq_post_load_quant(copy.deepcopy(float_base), weights_dtype=weights, torch_dtype=torch.float32)
    linear = isinstance(base[0], nn.Linear) and not base[0].weight.is_floating_point()
    check(f"{weights}: layers are Linear, and of integers", linear, 1, 1)
    decoded = copy.deepcopy(base)
    for number in (0, 2):
        decoded[number] = decoded[number].dequantize()
    plain = run(decoded)
    check(f"{weights}: quantised, off decoded", ((run(base) - plain).norm() / plain.norm()).item(), 0, 1e-4)

    for kind in ("LoRA", "DoRA"):
        what = f"{weights}, {kind}"
        goal = run(adapted(decoded, kind))
        effect = (goal - plain).norm()
        check(f"{what}: effect on the decoded model", (effect / plain.norm()).item(), 0.1, 1)
        for safe in (False, True):
            merged = run(adapted(decoded, kind).merge_and_unload(safe_merge=safe))
            check(f"{what}: decoded, merged, safe {safe}, off", ((merged - goal).norm() / effect).item(), 0, 1e-4)
        running = run(adapted(base, kind))
        if kind == "LoRA":
            check(f"{what}: running on the quantised model, off", ((running - goal).norm() / effect).item(), 0, 1e-4)
        else:
            ratio = running.norm() / goal.norm()
            check(f"{what}: running on the quantised model, size of the output", ratio.item(), 0, 1e-4)
            layer = adapted(base, kind).base_model.model[0]
            with torch.no_grad():
                ratio = layer(given).norm() / adapted(decoded, kind).base_model.model[0](given).norm()
            check(f"{what}: size of its first layer's output alone", ratio.item(), 1e-4, 2e-3)
        for safe in (False, True):
            try:
                merged = adapted(base, kind).merge_and_unload(safe_merge=safe)
            except RuntimeError as error:
                check(f"{what}: merging with safe {safe} is refused ({error})", kind == "LoRA" and not safe, 1, 1)
                continue
            check(f"{what}: merging with safe {safe} runs through", kind == "DoRA" or safe, 1, 1)
            if kind == "LoRA":
                check(f"{what}: merged, change of the outputs", (run(merged) - run(base)).norm().item(), 0, 0)
            else:
                largest = max(merged[number].weight.abs().max().item() for number in (0, 2))
                check(f"{what}: merged, safe {safe}, largest code in the layers", largest, 0, 0)
PY
