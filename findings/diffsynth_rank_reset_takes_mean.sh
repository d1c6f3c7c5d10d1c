#!/usr/bin/env bash
# Guess:    reset_lora_rank() of DiffSynth-Studio brings a LoRA to another rank and keeps the strongest of it. At the
#           rank that it has, or a higher one, it stays the same LoRA.
# Versions: torch==2.13.0 numpy==2.4.6 diffsynth==2.1.12 (alone: its part for LoRAs needs nothing but torch), any build
#           of torch, on a CPU
# Seen:     It does not. From each layer's change the mean over the layer's outputs is taken off, at any rank. A LoRA
#           that moves all outputs of a layer alike is gone: zero is left of it. One whose up factor has no negative
#           number is 88 % off at its own rank 8, and just so at 16 and 64; one with random factors, at 64 outputs, 8 %.
#           A plain SVD is 1e-6 off. The cause is torch.pca_lowrank(), which centres unless it is told not to.
# Matters:  What a LoRA does to all channels alike is what is lost, such as brighter, darker or stronger. The shapes
#           fit, nothing is raised or logged, and the rest works, so it passes for the price of a small rank, and a
#           larger rank does not help. The mean that is missing has rank 1: it can be put beside the rest as one more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install -q --no-compile --no-deps diffsynth==2.1.12
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import copy
import sys
import types
from importlib.util import find_spec

import torch
from torch import nn

# the package's own __init__ imports what only its pipelines need (torchvision, transformers, modelscope)
package = types.ModuleType("diffsynth")
package.__path__ = list(find_spec("diffsynth").submodule_search_locations)
sys.modules["diffsynth"] = package
from diffsynth.utils.lora import GeneralLoRALoader, merge_lora, reset_lora_rank  # noqa: E402


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


SIZE, RANK, NAME = 64, 8, "blocks.0.attn.to_q"
DOWN, UP = f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"
torch.manual_seed(0)
model = nn.Module()
model.blocks = nn.ModuleList([nn.Module()])
model.blocks[0].attn = nn.Module()
model.blocks[0].attn.to_q = nn.Linear(SIZE, SIZE)
given = torch.randn(32, SIZE)


def change(lora):
    """Returns what a LoRA adds to the weight, in float64."""
    return lora[UP].double() @ lora[DOWN].double()


def effect(lora):
    """Returns what a LoRA adds to the outputs, once DiffSynth's own loader has fused it into a copy of the model."""
    fused = copy.deepcopy(model)
    GeneralLoRALoader().fuse_lora_to_base_model(fused, dict(lora))
    with torch.no_grad():
        return fused.blocks[0].attn.to_q(given) - model.blocks[0].attn.to_q(given)


def off(value, true):
    return ((value - true).norm() / true.norm()).item()


def by_svd(lora, rank):
    left, values, right = torch.linalg.svd(lora[UP] @ lora[DOWN], full_matrices=False)
    return {UP: left[:, :rank] * values[:rank], DOWN: right[:rank]}


def mended(small, lora):
    """Returns the smaller LoRA with the missing mean over the outputs as one more rank."""
    row = lora[UP].mean(0, keepdim=True) @ lora[DOWN]
    return {UP: torch.cat([small[UP], torch.ones(SIZE, 1)], 1), DOWN: torch.cat([small[DOWN], row], 0)}


down = torch.randn(RANK, SIZE)
LORAS = {
    "random factors": ({DOWN: down, UP: torch.randn(SIZE, RANK)}, 0.05, 0.3),
    "no negative number in the up factor": ({DOWN: down, UP: torch.rand(SIZE, RANK)}, 0.7, 0.99),
    "all outputs alike": ({DOWN: down, UP: torch.rand(1, RANK).expand(SIZE, RANK).contiguous()}, 0.999, 1.001),
}
for what, (lora, low, high) in LORAS.items():
    true = change(lora)
    by_hand = off(effect(lora).double(), given.double() @ true.T)
    check(f"{what}: fused, off what its factors say", by_hand, 0, 1e-5)
    check(f"{what}: merge_lora() of it alone, off", off(change(merge_lora([lora])), true), 0, 0)
    centred = true - true.mean(0, keepdim=True)
    for rank in (RANK, 2 * RANK, SIZE):
        small = reset_lora_rank(dict(lora), rank)
        check(f"{what}: rank of the file that was asked to have {rank}", small[DOWN].shape[0], rank, rank)
        check(f"{what}: to rank {rank} by a plain SVD, off", off(change(by_svd(lora, rank)), true), 0, 1e-5)
        check(f"{what}: to rank {rank}, off", off(change(small), true), low, high)
        check(f"{what}: to rank {rank}, fused, effect on the outputs, off", off(effect(small), effect(lora)), low, high)
        gap = ((change(small) - centred).norm() / true.norm()).item()
        check(f"{what}: to rank {rank}, off the change less its mean over the outputs", gap, 0, 1e-5)
        gap = off(change(mended(small, lora)), true)
        check(f"{what}: to rank {rank}, with that mean as one more rank, off", gap, 0, 1e-4)

# torch's own words for it: the same call, told not to centre
lora = LORAS["random factors"][0]
left, values, right = torch.pca_lowrank(lora[UP] @ lora[DOWN], q=RANK, center=False)
check("torch.pca_lowrank(center=False), off", off((left * values @ right.T).double(), change(lora)), 0, 1e-5)
PY
