#!/usr/bin/env bash
# Guess:    load_state_dict() replaces what a network holds. Loading a file twice is loading it once; loading another
#           one changes over to that.
# Versions: torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0, any build of torch, on a CPU
# Seen:     For algo=full each load adds its difference to what is there. The same file loaded four times is four times
#           as strong; a file of zeros loaded after it takes nothing off. Saved again, the file has the sum.
# Matters:  Comparing the epochs of a full LyCORIS by loading one after the other shows the sum of all of them. So does
#           loading weights once more after create_lycoris_from_weights(), which is harmless for the other kinds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from torch import nn

logging.disable(logging.CRITICAL)
LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": []})


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def file(scale):
    torch.manual_seed(1)
    return {"lycoris_0.diff": torch.randn(16, 16) * scale, "lycoris_0.diff_b": torch.randn(16) * scale}


def held(network):
    """Return the network's difference in that of the file of 0.1."""
    return (network.state_dict()["lycoris_0.diff"].norm() / file(0.1)["lycoris_0.diff"].norm()).item()


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16))
given = torch.randn(3, 16)
plain = model(given).detach()
network = create_lycoris(model, 1.0, algo="full")
network.apply_to()
with torch.no_grad():
    for times in (1, 2, 3, 4):
        network.load_state_dict(file(0.1))
        check(f"loaded {times} times", held(network), times - 1e-3, times + 1e-3)
    network.load_state_dict(file(0.0))
    check("a file of zeros loaded over it", held(network), 3.999, 4.001)
    check("and the model runs with it", (model(given) - plain).norm().item(), 1, 100)

    model = nn.Sequential(nn.Linear(16, 16))
    network, tensors = create_lycoris_from_weights(1.0, "", model, weights_sd=file(0.1))
    network.apply_to()
    check("create_lycoris_from_weights", held(network), 0.999, 1.001)
    network.load_state_dict(tensors)
    check("and load_state_dict of the same", held(network), 1.999, 2.001)
PY
