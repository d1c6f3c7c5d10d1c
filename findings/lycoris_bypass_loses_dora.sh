#!/usr/bin/env bash
# Guess:    bypass_mode is another way to compute the same network: beside the layer instead of in its weight. It is for
#           quantised layers, so a DoRA file means there what it means elsewhere.
# Versions: torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0 optimum-quanto==0.2.7, any build of torch,
#           on a CPU
# Seen:     The bypass of LoRA has no magnitudes. A DoRA of LyCORIS, loaded by LyCORIS onto int8 layers, misses what was
#           trained by 97 % of its effect; a LoRA by 0.4 %, from the rounding of the base. The warning says that the
#           bypass is forced, not what it costs. Trained in bypass, dora_scale gets no gradient but is in the file, and
#           makes it miss by 75 % on plain layers.
# Matters:  A DoRA on a quantised model is applied as a LoRA of other strength, and a file trained there has magnitudes
#           that were never in force: every other program applies them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3 safetensors==0.8.0 \
    optimum-quanto==0.2.7
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import torch
from lycoris import create_lycoris, create_lycoris_from_weights
from optimum.quanto import freeze, qint8, quantize
from torch import nn


class Words(logging.Handler):
    """Collects what is warned of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.all = []

    def emit(self, record):
        self.all.append(record.getMessage())


words = Words()
logger = logging.getLogger("LyCORIS")
logger.handlers[:] = [words]


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


torch.manual_seed(1)
given, goal = torch.randn(64, 32), torch.randn(64, 48)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 48)).eval()


def quantised():
    model = base()
    quantize(model, weights=qint8)
    freeze(model)
    return model


def trained(model, dora, **settings):
    """Returns the trained network of a model, which is left wrapped by it."""
    torch.manual_seed(2)
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4, algo="lora", dora_wd=dora, **settings)
    network.apply_to()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        (model(given) - goal).square().mean().backward()
        optimizer.step()
    return network


def loaded(model, tensors):
    """Returns the output of a model with a network that is loaded from its tensors."""
    network, _ = create_lycoris_from_weights(1.0, None, model, weights_sd=dict(tensors))
    network.apply_to()
    with torch.no_grad():
        return model(given)


for dora in (False, True):
    kind = "DoRA" if dora else "LoRA"
    model = base()
    network = trained(model, dora)
    with torch.no_grad():
        plain, wanted = base()(given), model(given)
        effect = (wanted - plain).norm().item()
        tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        off = (loaded(base(), tensors) - wanted).norm().item() / effect
        check(f"{kind} loaded onto plain layers, off in its effect", off, 0, 1e-5)
        off = (loaded(quantised(), tensors) - wanted).norm().item() / effect
        check(f"{kind} loaded onto int8 layers, off in its effect", off, *((0.3, 3) if dora else (0, 0.05)))
print("warned of:", words.all)
said = [text for text in words.all if "dora" in text.lower() or "decompos" in text.lower()]
check("warnings that speak of DoRA", len(said), 0, 0)

model = base()
network = trained(model, True, bypass_mode=True)
grown = [p.grad for name, p in network.named_parameters() if "dora_scale" in name and p.grad is not None]
check("trained in bypass: magnitudes that got a gradient", len(grown), 0, 0)
with torch.no_grad():
    wanted = model(given)
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    check("trained in bypass: magnitudes in the file", sum("dora_scale" in name for name in tensors), 2, 2)
    off = ((loaded(base(), tensors) - wanted).norm() / (wanted - base()(given)).norm()).item()
    check("trained in bypass, loaded onto plain layers, off in its effect", off, 0.3, 3)
PY
