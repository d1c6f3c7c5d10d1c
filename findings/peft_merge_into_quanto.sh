#!/usr/bin/env bash
# Guess:    merge_and_unload() on a model that optimum-quanto has quantised merges the LoRA, with some rounding, or
#           refuses.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           optimum-quanto==0.2.7, any build of torch, on a CPU
# Seen:     It runs through, takes the adapter off, and leaves 0.0 of the LoRA, for int8, fp8 and int4 weights, with
#           safe_merge too. A sum in place, weight.add_(), goes to a dequantised copy that is dropped at once. So
#           quanto's own tensor says nothing to weight += delta either.
# Matters:  All that is saved from such a model is the base. Every tool that merges by an addition in place has the same
#           loss here; it has to dequantise, add, and quantise again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 optimum-quanto==0.2.7
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import torch
from optimum.quanto import freeze, qfloat8, qint4, qint8, quantize
from peft import LoraConfig, get_peft_model
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def quantised(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128)).eval()
    quantize(model, weights=kind)
    freeze(model)
    return model


torch.manual_seed(1)
given, delta = torch.randn(5, 128), torch.randn(128, 128)
with torch.no_grad():
    for kind in (qint8, qfloat8, qint4):
        plain = quantised(kind)(given)
        for safe in (False, True):
            config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
            model = get_peft_model(quantised(kind), config)
            effect = (model(given) - plain).norm().item()
            check(f"{kind.name}: effect of the LoRA, in the output", effect / plain.norm().item(), 0.1, 100)
            merged = model.merge_and_unload(safe_merge=safe)
            left = (merged(given) - plain).norm().item() / effect
            check(f"{kind.name}: left after merge_and_unload(safe_merge={safe})", left, 0, 1e-6)
        model = quantised(kind)
        model[0].weight.add_(delta)
        check(f"{kind.name}: change by weight.add_()", (model(given) - plain).norm().item(), 0, 1e-6)
PY
