#!/usr/bin/env bash
# Guess:    In AdapterHub's adapters, merge_adapter() puts an adapter into the weights without changing the outputs, and
#           reset_adapter() takes it out again. For a DoRA as for a LoRA.
# Versions: torch==2.13.0 numpy==2.4.6 adapters==1.3.0 transformers==4.57.6, any build of torch, on a CPU
# Seen:     True of a LoRA, in float64 to 1e-15. For a DoRA reset_adapter() works out the old weights and drops them: it
#           raises nothing, marks the layer as not merged, and leaves every weight merged. With the adapter off the
#           model then still has all of the DoRA's effect, and with it on the DoRA acts twice, 43 % off. Merging a DoRA
#           changes the outputs too, unless alpha is the rank and the layers have no bias: 60 % off with alpha 16 at
#           rank 4, as merging leaves alpha out, and 38 % in BERT, whose biases a DoRA scales until it is merged.
# Matters:  Whoever merges, saves and resets goes on with a base that is no longer the base, trains the next adapter on
#           it, and saves that one for a model that nobody has. Keep a copy of the weights before merging a DoRA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 adapters==1.3.0 transformers==4.57.6
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import adapters
import torch
from adapters import DoRAConfig, LoRAConfig
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


class Words(logging.Handler):
    """Collects what is logged."""

    def __init__(self):
        super().__init__()
        self.all = []

    def emit(self, record):
        self.all.append(record.getMessage())


words = Words()
for name in ("adapters", "transformers"):
    logging.getLogger(name).addHandler(words)
SIZES = dict(vocab_size=50, hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=2)
FAMILIES = {"Llama": (LlamaModel, LlamaConfig), "BERT": (BertModel, BertConfig)}
RANK = 4
ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))


def fresh(family):
    """Returns a tiny random model in float64, large enough in its numbers to attend to something."""
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    model = kind(config(**SIZES)).double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(std=0.3)
            elif value.dim() == 2:
                value.mul_(5)
    adapters.init(model)
    return model


@torch.no_grad()
def outputs(model):
    return model(ids).last_hidden_state


def off(value, true, scale=None):
    return ((value - true).norm() / (true.norm() if scale is None else scale)).item()


def pieces(model):
    """Yields the name and the layer of each layer that has the adapter."""
    for name, module in model.named_modules():
        if "loras" in module._modules and "mine" in module.loras:
            yield name, module


@torch.no_grad()
def dora_by_hand(model):
    """Returns the weights that a DoRA means, from its factors and magnitudes alone."""
    weights = {}
    for name, layer in pieces(model):
        dora = layer.loras["mine"]
        whole = layer.weight + dora.lora_alpha / dora.r * dora.lora_B @ dora.lora_A
        weights[name] = dora.m.weight * whole / whole.norm(dim=1, keepdim=True)
    return weights


# family, config, what merging changes, what stays of the adapter after a reset with it off and with it on
CASES = (
    ("Llama", LoRAConfig(r=RANK, alpha=16), (0, 1e-9), (0, 1e-9), (0, 1e-9)),
    ("BERT", LoRAConfig(r=RANK, alpha=16), (0, 1e-9), (0, 1e-9), (0, 1e-9)),
    ("Llama", DoRAConfig(r=RANK, alpha=RANK), (0, 1e-9), (0.99, 1.01), (0.1, 2)),
    ("Llama", DoRAConfig(r=RANK, alpha=16), (0.2, 2), (0.2, 2), (0.1, 2)),
    ("BERT", DoRAConfig(r=RANK, alpha=RANK), (0.2, 2), (0.2, 2), (0.1, 2)),
)
for family, config, merging, left, twice in CASES:
    dora = config.use_dora
    case = f"{family}, {'DoRA' if dora else 'LoRA'} of rank {RANK}, alpha {config.alpha}"
    model = fresh(family)
    plain = outputs(model)
    model.add_adapter("mine", config=config)
    model.double()
    model.set_active_adapters("mine")
    check(f"{case}: a new one changes the outputs by", off(outputs(model), plain), 0, 1e-6)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".loras." in name:
                value.add_(0.3 * torch.randn_like(value))
    adapted = outputs(model)
    effect = (adapted - plain).norm()
    check(f"{case}: effect", (effect / plain.norm()).item(), 0.05, 5)
    base = {name: layer.weight.detach().clone() for name, layer in pieces(model)}
    check(f"{case}: layers that have it", len(base), 4, 4)
    meant = dora_by_hand(model) if dora else {}
    words.all.clear()

    model.merge_adapter("mine")
    check(f"{case}: merged, outputs off those before", off(outputs(model), adapted, effect), *merging)
    merged = {name: layer.weight.detach().clone() for name, layer in pieces(model)}
    if dora:
        gap = max(off(merged[name], meant[name]) for name in base)
        check(f"{case}: merged weights, off DoRA by hand", gap, *((0, 1e-9) if config.alpha == RANK else (0.1, 2)))

    model.reset_adapter()
    check(f"{case}: reset, layers that say that they are merged", sum(bool(x.merged) for _, x in pieces(model)), 0, 0)
    check(f"{case}: reset, with it on, outputs off those before", off(outputs(model), adapted, effect), *twice)
    model.set_active_adapters(None)
    logged = [line for line in words.all if "none are activated" not in line]  # said once all are off, which is meant
    check(f"{case}: reset, with it off, outputs off the base's", off(outputs(model), plain, effect), *left)
    kept = [layer.weight.equal(merged[name]) for name, layer in pieces(model)]
    check(f"{case}: reset, layers whose weights are the merged ones", sum(kept), *((4, 4) if dora else (0, 0)))
    gap = max(off(layer.weight, base[name]) for name, layer in pieces(model))
    check(f"{case}: reset, weights off the base's", gap, *((0.05, 5) if dora else (0, 1e-9)))
    check(f"{case}: words logged", len(logged), 0, 0)

    with torch.no_grad():
        for name, layer in pieces(model):
            layer.weight.copy_(base[name])
    check(f"{case}: weights put back by hand, outputs off the base's", off(outputs(model), plain, effect), 0, 1e-9)
    model.set_active_adapters("mine")
    check(f"{case}: and with it on, off those before", off(outputs(model), adapted, effect), 0, 1e-9)
PY
