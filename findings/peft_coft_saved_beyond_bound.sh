#!/usr/bin/env bash
# Guess:    Constrained OFT keeps its rotations within eps. The saved file holds what the trained model applies.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0, any
#           build of torch, on a CPU
# Seen:     After 30 steps of AdamW at 1e-3 the file's numbers are 250 times beyond what the model applies, at 1e-4 26
#           times. The bound is laid on by the next forward pass, which also overwrites the parameter. So one forward
#           pass between training and saving makes another file.
# Matters:  A reader that takes the tensors as they are applies the adapter hundreds of times too strongly. The bound,
#           eps / sqrt(blocks) for the norm of each block, has to be laid on again at load.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import copy

import torch
from peft import OFTConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def saved(model):
    model.save_pretrained("adapter")
    return load_file("adapter/adapter_model.safetensors")["base_model.model.0.oft_R.weight"]


torch.manual_seed(0)
base = nn.Sequential(nn.Linear(32, 32, bias=False))
given = torch.randn(64, 32)
goal = given @ torch.linalg.qr(torch.randn(32, 32))[0]
for rate, low, high in ((1e-3, 200, 300), (1e-4, 20, 30)):
    torch.manual_seed(1)
    config = OFTConfig(r=0, oft_block_size=8, target_modules=["0"], coft=True, eps=6e-5, use_cayley_neumann=False)
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(30):
        optimizer.zero_grad()
        (model(given) - goal).square().mean().backward()
        optimizer.step()
    at_once = saved(model)
    with torch.no_grad():
        model(given)
    later = saved(model)
    norms = (2 * later.square().sum(1)).sqrt()  # of the skew-symmetric blocks
    bound = 6e-5 / 4**0.5
    check(f"rate {rate}: largest norm of a block that is applied, in bounds", norms.max().item() / bound, 0.99, 1.01)
    ratio = (at_once.norm() / later.norm()).item()
    check(f"rate {rate}: file saved at once / file saved after a forward pass", ratio, low, high)
PY
