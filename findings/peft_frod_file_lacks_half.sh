#!/usr/bin/env bash
# Guess:    A FRoD adapter of PEFT that was saved with save_projection=True, the default, has its projections in its
#           file. This "guarantees that we can reload the adapter on all system configurations", says that setting.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0, any
#           build of torch, on a CPU
# Seen:     On the same bits of the base it loads right (0.0 off). On a base whose numbers are a millionth off it misses
#           what was trained by 56 % of its effect, on one rounded to float16 by 62 %, to bfloat16 by 100 %; a LoRA by
#           0.0002 %, 0.02 % and 0.2 %. An untrained FRoD, which does nothing, changes the outputs by 22 to 39 %. A FRoD
#           weight is made of U, numbers that are trained, and V. The file has V. U is worked out when the adapter is
#           added, from the base and a V that is made anew; then the file's V takes that one's place, and U stays.
#           Eigenvectors come out with another sign or turned, so the two do not fit. With U worked out again from the
#           V of the file all is right, up to 3 % for bfloat16.
# Matters:  Training in one precision and running in another is usual, and another card or build of torch moves the last
#           bits too. Nothing is raised and no warning is given. FRoD puts its matrix in place of the base's weight, so a
#           wrong one harms the model itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python - 2>log.txt <<'PY' || { tail -n 20 log.txt; exit 1; }
import copy
import warnings

import torch
from peft import FrodConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
base = LlamaModel(LlamaConfig(**sizes)).eval()
ids = torch.randint(0, 64, (2, 12))
goal = torch.randn(64)


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


@torch.no_grad()
def run(model):
    return model.eval()(input_ids=ids).last_hidden_state


def trained(config, steps):
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(input_ids=ids).last_hidden_state - goal).square().mean().backward()
        optimizer.step()
    return model


def moved(how):
    """Returns a copy of the base whose weights are a little off, each of them in float32."""
    torch.manual_seed(2)
    model = copy.deepcopy(base)
    if how in ("float16", "bfloat16"):
        return model.to(getattr(torch, how)).float()
    for parameter in model.parameters() if how == "a millionth" else ():
        parameter.data *= 1 + 1e-6 * torch.randn(parameter.shape)
    return model


def mend(model):
    """Works U out again, from the weight of the base and the V that the file brought."""
    for layer in [one for one in model.modules() if hasattr(one, "frod_U")]:
        weight = layer.get_base_layer().weight
        layer.frod_U["default"] = layer._calculate_frod_u_and_lambda(layer.frod_V["default"], weight)[0]


plain = run(base)
for name, config, limits in (
    ("LoRA", LoraConfig(r=4, target_modules=TARGETS), {"a millionth": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}),
    ("FRoD", FrodConfig(target_modules=TARGETS, progressbar=False), {}),
):
    limits["the same"] = 1e-6
    for steps in (20, 0):
        wanted = run(model := trained(config, steps)) - plain
        effect = (wanted.norm() / plain.norm()).item()
        check(f"{name}, {steps} steps: effect", effect, *((0.2, 5) if steps else (0, 1e-5)))
        model.save_pretrained("file")
        has_v = any("frod_V" in field for field in load_file("file/adapter_model.safetensors"))
        check(f"{name}: has a V in its file", has_v, *((1, 1) if name == "FRoD" else (0, 0)))
        for how in ("the same", "a millionth", "float16", "bfloat16"):
            other = moved(how)
            before = run(other)
            check(f"the base, {how}: off", ((before - plain).norm() / plain.norm()).item(), 0, 2e-2)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", FutureWarning)
                loaded = PeftModel.from_pretrained(other, "file")
            what = f"{name}, {steps} steps, base {how}"
            unit = wanted if steps else plain
            off = ((run(loaded) - before - wanted).norm() / unit.norm()).item()
            check(f"{what}: off", off, *((0, limits[how]) if how in limits else (0.05, 5)))
            if name == "FRoD":
                mend(loaded)
                off = ((run(loaded) - before - wanted).norm() / unit.norm()).item()
                check(f"{what}, U worked out again: off", off, 0, 0.1)
PY
