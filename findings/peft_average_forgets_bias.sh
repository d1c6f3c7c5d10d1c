#!/usr/bin/env bash
# Guess:    An adapter that PEFT makes of others (`add_weighted_adapter`) has all of them: of one at weight 1, the same.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0, any
#           build of torch, on a CPU
# Seen:     Of LoRAs with `lora_bias=True` the new adapter gets the two factors alone. It says `lora_bias=True` too and
#           has a bias, which is zero. Made of one adapter at weight 1, by "cat", "linear" or "svd", it lacks what the
#           bias did: here 57 % of the effect are off. No warning. Running, merging and scaling the adapter take the bias.
# Matters:  Control LoRAs for FLUX are trained with such biases. A stack that is joined to one file, or averaged with
#           another, loses their part, and nothing in the file tells.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python - <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


torch.manual_seed(0)
given = torch.randn(64, 16)
for has_bias in (False, True):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1"], lora_bias=has_bias)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    model.eval()
    with torch.no_grad():
        with model.disable_adapter():
            plain = model(given)
        running = model(given)
        model.merge_adapter()
        check(f"bias {has_bias}: merged", ((model(given) - running).norm() / (running - plain).norm()).item(), 0, 1e-4)
        model.unmerge_adapter()
        for way in ("cat", "linear", "svd"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.add_weighted_adapter(["default"], [1.0], way, combination_type=way)
            said = [str(one.message) for one in caught if "bias" in str(one.message).lower()]
            check(f"bias {has_bias}: warnings of {way}", len(said), 0, 0)
            model.set_adapter(way)
            off = ((model(given) - running).norm() / (running - plain).norm()).item()
            check(f"bias {has_bias}: {way} of one adapter", off, *((0.4, 0.9) if has_bias else (0, 1e-4)))
            if has_bias:
                biases = [one for name, one in model.named_parameters() if f"lora_B.{way}.bias" in name]
                check(f"biases of {way}", len(biases), 2, 2)
                check("the largest number in them", max(one.abs().max().item() for one in biases), 0, 0)
                check(f"{way} says that it has one", float(model.peft_config[way].lora_bias), 1, 1)
PY
