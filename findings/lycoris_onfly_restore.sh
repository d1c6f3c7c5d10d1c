#!/usr/bin/env bash
# Guess:    onfly_merge() puts a network into the weights for a while, and onfly_restore() puts the old weights back.
# Versions: torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0, any build of torch, on a CPU
# Seen:     On a CPU nothing is put back. What is kept of the old weight is weight.cpu(), which is the same memory when
#           the weight lies there already. 100 % of the network stay after restoring, three rounds leave it three times.
#           merge_to(1) and merge_to(-1) do come back to the base.
# Matters:  Where models rest in main memory, as offloaded ones do, the base is changed for good by the call that is
#           meant for a change on trial. Whoever keeps a copy of a weight this way needs clone(), not only cpu().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import torch
from lycoris import create_lycoris, create_lycoris_from_weights
from torch import nn

logging.disable(logging.CRITICAL)


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48, bias=False), nn.SiLU(), nn.Linear(48, 48, bias=False))


def trained(algo):
    """Returns the tensors of a network after some steps of training."""
    model = base()
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4, algo=algo)
    network.apply_to()
    torch.manual_seed(1)
    given, goal = torch.randn(64, 32), torch.randn(64, 48)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (model(given) - goal).square().mean().backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def distance(model):
    """Returns how far all weights are from the base's."""
    return sum((w - b).square().sum() for w, b in zip(model.parameters(), base().parameters())).sqrt().item()


for algo in ("lora", "loha", "lokr"):
    tensors = trained(algo)

    def network(model):
        return create_lycoris_from_weights(1.0, None, model, weights_sd=dict(tensors))[0]

    with torch.no_grad():
        model = base()
        temporary = network(model)
        temporary.merge_to(1.0)
        whole = distance(model)
        temporary.merge_to(-1.0)
        check(f"{algo}: left after merge_to(1) and merge_to(-1)", distance(model) / whole, 0, 1e-5)

        model = base()
        temporary = network(model)
        for done in range(1, 4):
            temporary.onfly_merge(1.0)
            check(f"{algo}, round {done}: merged", distance(model) / whole, done * 0.999, done * 1.001)
            temporary.onfly_restore()
            check(f"{algo}, round {done}: left after restoring", distance(model) / whole, done * 0.999, done * 1.001)
PY
