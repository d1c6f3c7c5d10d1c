#!/usr/bin/env bash
# Guess:    A DyLoRA in eval mode is one function, merging it gives one result, and its file loads as what was trained.
# Versions: torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0, any build of torch, on a CPU
# Seen:     With rank 16 in blocks of 4, the same input gives 4 outputs in eval mode: each call draws the number of
#           blocks. merge_to() draws it too and merges rank 4, 8, 12 or 16. The file has the names of a plain LoRA;
#           LyCORIS itself loads it as one, at a quarter of the trained strength (block_size 4, the default).
# Matters:  A DyLoRA of LyCORIS looks a quarter as strong in every other program. Its file does not say block_size, so
#           no reader can mend that; the strength has to be set to 4 by hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging
import random

import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from torch import nn

logging.disable(logging.CRITICAL)
LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": []})


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32)).double()
    network = create_lycoris(model, 1.0, linear_dim=16, linear_alpha=16, algo="dylora")
    network.apply_to()
    network.double().eval()
    for factor in network.parameters():
        nn.init.normal_(factor, std=0.1)
    return model, network


random.seed(0)
model, network = trained()
given = torch.randn(4, 32).double()
with torch.no_grad():
    outputs = {round(model(given).norm().item(), 9) for _ in range(60)}
    check("outputs of one input in eval mode", len(outputs), 4, 4)

    ranks = set()
    for _ in range(20):
        model, network = trained()
        weight = model[0].weight.clone()
        network.restore()
        network.merge_to(1.0)
        ranks.add(int(torch.linalg.matrix_rank(model[0].weight - weight)))
    print("ranks that were merged:", sorted(ranks))
    check("different results of merge_to", len(ranks), 4, 4)

    model, network = trained()
    whole = network.loras[0].get_diff_weight(rank=12)[0]  # the fourth block, the last that training can draw
    tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    plain = nn.Sequential(nn.Linear(32, 32)).double()
    weight = plain[0].weight.clone()
    loaded, _ = create_lycoris_from_weights(1.0, "", plain, weights_sd=tensors)
    print("loaded as", type(loaded.loras[0]).__name__)
    loaded.merge_to(1.0)
    change = plain[0].weight - weight
    check("loaded, in what was trained", ((change * whole).sum() / whole.square().sum()).item(), 0.2499, 0.2501)
PY
