#!/usr/bin/env bash
# Guess:    The base of a LoRA is frozen: it gets no gradient of its own, and lets those for earlier layers through.
# Versions: torch==2.13.0 numpy==2.4.6 lora-pytorch==0.2.0, any build of torch, on a CPU
# Seen:     Each layer's base runs without gradients, so that what comes back reaches the layers before it through that
#           layer's LoRA alone. A new LoRA's is zero: in the first step every layer but the last gets exactly zero.
#           After that they get gradients, but wrong ones, 87 to 115 % off after 100 steps of Adam on three layers.
#           Those steps lower the loss by 77 % of what the same steps with the true gradients do.
# Matters:  The loss falls and the file has factors for every layer, so it passes for a weak LoRA, and no strength mends
#           it. Whoever runs a frozen layer beside a LoRA must not put it under no_grad(): requires_grad=False at its
#           weights is what freezing means.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 lora-pytorch==0.2.0
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import copy

import torch
from lora_pytorch import LoRA
from torch import nn
from torch.nn import functional


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
given, goal = torch.randn(64, 8), torch.randn(64, 4)
start = LoRA.from_module(base, rank=2)
LAYERS = (0, 2, 4)


def factors(model):
    loras = [model.module[number].lora_module for number in LAYERS]
    return [(lora.in_proj, lora.out_proj) for lora in loras]


def loss_of(model):
    return functional.mse_loss(model(given), goal)


def true_loss_of(model):
    """Returns the same loss, from the same factors and weights, by torch alone."""
    hidden = given
    for number, (down, up) in zip(LAYERS, factors(model)):
        layer = model.module[number].module
        hidden = functional.linear(hidden, layer.weight.detach(), layer.bias.detach()) + hidden @ down @ up
        hidden = hidden if number == LAYERS[-1] else hidden.tanh()
    return functional.mse_loss(hidden, goal)


def gradients(model, loss):
    # zeros, where a factor does not reach the loss at all
    flat = [value for pair in factors(model) for value in pair]
    return torch.autograd.grad(loss(model), flat, materialize_grads=True)


def trained(loss):
    model = copy.deepcopy(start)
    flat = [value for pair in factors(model) for value in pair]
    optimizer = torch.optim.Adam(flat, lr=1e-2)
    for _ in range(100):
        for value, gradient in zip(flat, gradients(model, loss)):
            value.grad = gradient
        optimizer.step()
    return model


check("losses of both, apart", abs(loss_of(start) - true_loss_of(start)).item(), 0, 1e-12)
for place, (theirs, true) in enumerate(zip(gradients(start, loss_of), gradients(start, true_loss_of))):
    if place % 2:  # out_proj; the gradient of in_proj is zero while out_proj is
        layer = f"new LoRA, layer {place // 2 + 1} of 3"
        check(f"{layer}: true gradient", true.norm().item(), 1e-3, 10)
        if place // 2 < 2:
            check(f"{layer}: gradient", theirs.norm().item(), 0, 0)
        else:
            check(f"{layer}: gradient, off", ((theirs - true).norm() / true.norm()).item(), 0, 1e-9)

model = trained(loss_of)
check("after 100 steps, losses of both, apart", abs(loss_of(model) - true_loss_of(model)).item(), 0, 1e-12)
for place, (theirs, true) in enumerate(zip(gradients(model, loss_of), gradients(model, true_loss_of))):
    what = f"after 100 steps, layer {place // 2 + 1} of 3, {('in_proj', 'out_proj')[place % 2]}: gradient, off"
    check(what, ((theirs - true).norm() / true.norm()).item(), *((0, 1e-9) if place // 2 == 2 else (0.6, 5)))

# the true gradient, checked once more by differences of lora-pytorch's own loss
true = gradients(model, true_loss_of)[1]
up, numeric, step = factors(model)[0][1], torch.zeros_like(true), 1e-6
with torch.no_grad():
    for place in range(up.numel()):
        sides = []
        for move in (step, -2 * step):
            up.view(-1)[place] += move
            sides.append(loss_of(model).item())
        up.view(-1)[place] += step
        numeric.view(-1)[place] = (sides[0] - sides[1]) / (2 * step)
off = ((true - numeric).norm() / true.norm()).item()
check("first layer's out_proj: true gradient, off differences of the loss", off, 0, 1e-5)

begin, theirs, true = (loss_of(each).item() for each in (start, model, trained(true_loss_of)))
check("fall of the loss by their gradients, of that by the true ones", (begin - theirs) / (begin - true), 0.1, 0.95)
PY
