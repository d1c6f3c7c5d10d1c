#!/usr/bin/env bash
# Guess:    use_cayley_neumann chooses between a fast series and the exact solution of one formula, so a file means
#           nearly the same with both.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0, any
#           build of torch, on a CPU
# Seen:     They turn in opposite directions. The product of both rotations is the identity (1e-5 off); their difference
#           is twice the turn. More terms of the series bring them no closer.
# Matters:  The tensors of a PEFT OFT file do not say their direction; only a flag in adapter_config.json does. A file
#           whose flag is lost, or a reader that knows one formula, undoes the training instead of applying it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import torch
from peft import OFTConfig, get_peft_model
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def rotation(tensor, **settings):
    config = OFTConfig(r=0, oft_block_size=4, target_modules=["0"], **settings)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16, bias=False)), config).double()
    adapter = model.base_model.model[0].oft_R["default"]
    adapter.weight.data = tensor.clone()
    return adapter.get_weight().detach()


torch.manual_seed(0)
tensor = torch.randn(4, 6).double() * 0.02
identity = torch.eye(16).double()
exact = rotation(tensor, use_cayley_neumann=False)
turn = (exact - identity).norm().item()
for terms, slack in ((5, 1e-4), (30, 1e-12)):
    series = rotation(tensor, use_cayley_neumann=True, num_cayley_neumann_terms=terms)
    check(f"{terms} terms, difference, in turns", (series - exact).norm().item() / turn, 1.95, 2.001)
    check(f"{terms} terms, both after each other, in turns", (series @ exact - identity).norm().item() / turn, 0, slack)
check("the series is the default", float(OFTConfig().use_cayley_neumann), 1, 1)
PY
