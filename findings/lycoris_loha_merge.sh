#!/usr/bin/env bash
# Guess:    merge_to() puts into the weight what the LoHa adds while it runs.
# Versions: torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0, any build of torch, on a CPU
# Seen:     It multiplies by alpha / rank twice. With rank 8 and alpha 1 the merged LoHa has an eighth of its strength,
#           with alpha 4 the half; only alpha = rank is right. onfly_merge() and merge_to(precise=True) do the same.
# Matters:  An alpha below the rank is common for LoHa. A checkpoint merged by LyCORIS is then weaker than the same file
#           in a program that patches, with no error and no line.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import torch
from lycoris import LycorisNetwork, create_lycoris
from torch import nn

logging.disable(logging.CRITICAL)


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def strength(alpha, merge):
    """Return the change of the output by the running LoHa and by the merged one, both in the trained change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).double()
    given = torch.randn(6, 16).double()
    plain, weight = model(given).detach(), model[0].weight.detach().clone()
    network = create_lycoris(model, 1.0, linear_dim=8, linear_alpha=alpha, algo="loha")
    network.apply_to()
    network.double().eval()
    loha = network.loras[0]
    for factor in (loha.hada_w1_a, loha.hada_w1_b, loha.hada_w2_a, loha.hada_w2_b):
        nn.init.normal_(factor, std=0.3)
    with torch.no_grad():
        trained = (loha.hada_w1_a @ loha.hada_w1_b) * (loha.hada_w2_a @ loha.hada_w2_b) * alpha / 8
        running = ((model(given) - plain).norm() / (given @ trained.T).norm()).item()
        network.restore()
        merge(network)
        return running, ((model[0].weight - weight).norm() / trained.norm()).item()


LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": []})
ways = {
    "merge_to": lambda network: network.merge_to(1.0),
    "merge_to, precise": lambda network: network.merge_to(1.0, precise=True),
    "onfly_merge": lambda network: network.onfly_merge(1.0),
}
for alpha in (8, 4, 1):
    for name, merge in ways.items():
        running, merged = strength(alpha, merge)
        check(f"alpha {alpha} of rank 8, running", running, 1 - 1e-6, 1 + 1e-6)
        check(f"alpha {alpha} of rank 8, {name}", merged, alpha / 8 - 1e-6, alpha / 8 + 1e-6)
PY
