#!/usr/bin/env bash
# Guess:    The Adapters library (AdapterHub) averages LoRAs in two ways: while running, with Average(), and into a new adapter,
#           with average_adapter(). The average of a LoRA and its copy is that LoRA. combine_strategy="lora_delta_w_svd"
#           averages the changes of the weights, and is without loss when svd_rank is as large as the ranks together.
# Versions: torch==2.13.0 numpy==2.4.6 adapters==1.3.0 transformers==4.57.6 (adapters takes no newer one) safetensors==0.8.0,
#           any build of torch, on a CPU
# Seen:     Average() weights each of n LoRAs with 1/n, sums them by a mean, and so divides by n again: two come out at a
#           quarter each, three at a ninth, and weights of 0.25 and 0.75 as 0.125 and 0.375. Weights of 1 that are not
#           normalised give the average. With the svd the directions are right (1e-6 off), but the new adapter keeps the old
#           alpha over the new rank: LoRAs of rank 4 averaged at rank 8 have half their strength, at 12 a third, and a LoRA
#           of rank 2 that is written at rank 1 twice its strength. Set to the old scale it is right. A single one
#           averaged by "linear", the default, is what it was.
# Matters:  Nothing is said, and a mixture of three with a ninth of each looks as if LoRAs did not mix. The file of one made by
#           svd has its new rank and the alpha, but not the strength it was to have, so no reader can tell. Whoever changes
#           the rank of a LoRA has to change its alpha by the same factor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 adapters==1.3.0 \
    transformers==4.57.6 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - 2>log.txt <<'PY' || { tail -n 20 log.txt; exit 1; }
import logging

import adapters
import torch
from adapters import LoRAConfig
from adapters.composition import Average
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

logging.disable(logging.WARNING)
torch.manual_seed(0)
SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
ids = torch.randint(0, 64, (2, 10))


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def build(family, rank, alpha):
    """Returns a model of one layer with three LoRAs, and the two linear layers that they are for."""
    torch.manual_seed(1)
    model = LlamaModel(LlamaConfig(**SIZES)) if family == "Llama" else BertModel(BertConfig(**SIZES))
    adapters.init(model)
    model.eval()
    for name in "abc":
        model.add_adapter(name, config=LoRAConfig(r=rank, alpha=alpha))
    for name, value in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.1)
    if family == "Llama":
        return model, {"q": model.layers[0].self_attn.q_proj, "v": model.layers[0].self_attn.v_proj}
    return model, {"q": model.encoder.layer[0].attention.self.query, "v": model.encoder.layer[0].attention.self.value}


for family in ("Llama", "BERT"):
    for rank, alpha in ((4, 4), (4, 16), (2, 2)):
        model, layers = build(family, rank, alpha)
        outputs = {}
        for name, layer in layers.items():
            layer.register_forward_hook(lambda module, given, output, name=name: outputs.update({name: output.detach()}))

        @torch.no_grad()
        def run(setup):
            """Returns what each of the two layers, which come first in the model, gives with these adapters."""
            model.set_active_adapters(setup)
            model(ids)
            return dict(outputs)

        plain = run(None)
        alone = {name: run(name) for name in "abc"}

        def parts(what, setup, wanted):
            """Finds how much of each LoRA there is, by least squares, and that there is nothing else."""
            found = run(setup)
            for layer in layers:
                given = torch.stack([(alone[name][layer] - plain[layer]).flatten() for name in "abc"], 1).double()
                seen = (found[layer] - plain[layer]).flatten().double()
                parts = torch.linalg.lstsq(given, seen[:, None]).solution.flatten()
                where = f"{family}, rank {rank}, alpha {alpha}, {layer}, {what}"
                worst = max(abs(part - value) for part, value in zip(parts.tolist(), wanted))
                rest = ((given @ parts - seen).norm() / seen.norm()).item()
                there = ", ".join(f"{part:.4f} of {name}" for name, part in zip("abc", parts.tolist()))
                check(f"{where}: {there}, off", max(worst, rest), 0, 1e-4)

        for name in "abc":
            effect = (alone[name]["q"] - plain["q"]).norm() / plain["q"].norm()
            check(f"{family}, rank {rank}, alpha {alpha}, {name}: effect at q", effect.item(), 0.02, 10)
        parts("a alone", "a", (1, 0, 0))
        parts("Average of a and b", Average("a", "b"), (0.25, 0.25, 0))
        parts("Average of three", Average("a", "b", "c"), (1 / 9, 1 / 9, 1 / 9))
        parts("Average, a quarter and three", Average("a", "b", weights=[0.25, 0.75]), (0.125, 0.375, 0))
        parts("Average, weights 1", Average("a", "b", weights=[1.0, 1.0], normalize_weights=False), (0.5, 0.5, 0))
        parts("Average of a and a", Average("a", "a"), (0.5, 0, 0))

        model.average_adapter("linear", ["a"])
        parts("linear, of a", "linear", (1, 0, 0))
        if rank == 2:
            # a of rank 1 in truth, so that a lower rank can hold it
            for layer in layers.values():
                layer.loras["a"].lora_B.data[:, 1] = 0
            alone["a"] = run("a")
            model.average_adapter("svd_1", ["a"], combine_strategy="lora_delta_w_svd", svd_rank=1)
            parts("svd at half the rank, of a", "svd_1", (2, 0, 0))
            continue
        for number, (names, wanted) in enumerate((("a", (1, 0, 0)), ("ab", (0.5, 0.5, 0)), ("abc", (1 / 3, 1 / 3, 1 / 3)))):
            for size in range(len(names), 4):
                name, what = f"svd_{number}_{size}", f"svd at {size} times the rank, of {' and '.join(names)}"
                model.average_adapter(name, list(names), combine_strategy="lora_delta_w_svd", svd_rank=size * rank)
                parts(what, name, [value / size for value in wanted])
                for layer in layers.values():
                    layer.loras[name].scaling = alpha / rank
                parts(f"{what}, with the old scale", name, wanted)
PY
