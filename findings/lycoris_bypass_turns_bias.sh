#!/usr/bin/env bash
# Guess:    LyCORIS' `bypass_mode` is another way of running the same adapter: the output is the same.
# Versions: torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0, any build of torch, on a CPU
# Seen:     Not for OFT ("diag-oft") and BOFT on a layer with a bias. In bypass mode they turn what the layer gives out,
#           and its bias with it; otherwise, and merged, they turn the weight alone. On linear layers and convolutions
#           12 to 42 % of the effect are off here. Without a bias both ways agree.
# Matters:  Most layers of image models have a bias. An adapter that was trained or tried in bypass mode, as on
#           quantised weights, is another one once it is merged.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import torch
from lycoris import LycorisNetwork, create_lycoris
from torch import nn

logging.disable(logging.CRITICAL)


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def layer(kind, has_bias):
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(8, 8, bias=has_bias)), torch.randn(64, 8)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=has_bias)), torch.randn(2, 8, 12, 12)


with torch.no_grad():
    for kind in ("linear", "convolution"):
        for has_bias in (True, False):
            for algo in ("diag-oft", "boft"):
                for mode in ({}, {"bypass_mode": True}):
                    base, given = layer(kind, has_bias)
                    plain = base(given)
                    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "target_name": ["0"]})
                    network = create_lycoris(
                        base, 1.0, linear_dim=2, linear_alpha=2, conv_dim=2, conv_alpha=2, algo=algo, **mode
                    )
                    for parameter in [one for lora in network.loras for one in lora.parameters()]:
                        parameter.data += 0.2 * torch.randn(parameter.shape)
                    network.apply_to()
                    network.eval()
                    running = base(given)
                    network.restore()
                    network.merge_to(1.0)
                    merged = base(given)
                    off = ((running - merged).norm() / (merged - plain).norm()).item()
                    what = f"{kind}, {'with' if has_bias else 'without'} a bias, {algo}{', bypass' if mode else ''}"
                    check(what, off, *((0.05, 0.6) if mode and has_bias else (0, 1e-4)))
PY
