#!/usr/bin/env bash
# Guess:    mergekit-extract-lora writes the difference of two models as an adapter for PEFT. With a rank that is high
#           enough, base and adapter are the fine-tuned model again, in every layer that the file has numbers for.
# Versions: torch==2.13.0 numpy==2.4.6 mergekit==0.1.5 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0
#           safetensors==0.8.0, any build of torch, on a CPU
# Seen:     True of Llama (1e-6 off). Qwen2 has biases at q, k and v. Their differences are in the file, exact, as
#           lora_B.bias, but the adapter_config.json beside it does not say "lora_bias": true, without which PEFT has
#           no place for them and drops them: all of the biases' change is lost, the weights' is right. Here the model
#           is 79 % of the fine-tuning off. mergekit exits with 0 and PEFT does not warn. With that one word added to
#           the config it is right.
# Matters:  A training of all weights moves the biases too, so what is extracted from a Qwen2 or Qwen2.5 is less than it
#           was, at any rank. It passes for what a low rank costs. Files that exist can be mended: add the word (and do
#           not merge, which PEFT refuses then for layers without a bias), or add the biases to the base by hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 mergekit==0.1.5 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
cat > common.py <<'PY'
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config}
RANK = 4


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def base(family):
    """Returns a tiny random model, large enough in its numbers to attend to something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[family](
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=128,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
            elif value.dim() == 2:
                value.mul_(5)
    return model.float().eval()


def tuned(family):
    """Returns the same model, each linear layer changed by a matrix of rank 4 and each bias by as much as it is."""
    model = base(family)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.add_(torch.randn(value.shape, generator=dice))
            elif "proj" in name:
                up = torch.randn(value.shape[0], RANK, generator=dice)
                down = torch.randn(RANK, value.shape[1], generator=dice)
                value.add_(0.02 * up @ down)
    return model
PY
cat > write.py <<'PY'
from common import FAMILIES, base, tuned

for family in FAMILIES:
    base(family).save_pretrained(f"{family}/base")
    tuned(family).save_pretrained(f"{family}/tuned")
PY
cat > read.py <<'PY'
import json
import logging
import shutil
import warnings

import torch
from common import FAMILIES, RANK, base, check, tuned
from peft import PeftModel
from safetensors.torch import load_file

words = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))


class Words(logging.Handler):
    """Collects what is logged."""

    def __init__(self):
        super().__init__()
        self.all = []

    def emit(self, record):
        self.all.append(record.getMessage())


@torch.no_grad()
def outputs(model):
    return model(words).logits


def adapted(family, folder):
    """Returns PEFT's model of base and adapter, and what was said about keys on the way."""
    said = Words()
    logging.getLogger().addHandler(said)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base(family), folder).eval()
    logging.getLogger().removeHandler(said)
    about = [line for line in said.all + [str(each.message) for each in warned] if "key" in line or "bias" in line]
    return model, about


for family in FAMILIES:
    before, after = base(family).state_dict(), tuned(family).state_dict()
    changes = {name: after[name] - before[name] for name in after if not after[name].equal(before[name])}
    biases = [name for name in changes if name.endswith("bias")]
    check(f"{family}: weights that changed", len(changes) - len(biases), 14, 14)
    check(f"{family}: biases that changed", len(biases), *((6, 6) if family == "qwen2" else (0, 0)))
    plain, true = outputs(base(family)), outputs(tuned(family))
    effect = (true - plain).norm()
    check(f"{family}: what the fine-tuning did to the outputs", (effect / plain.norm()).item(), 0.1, 5)

    folder = f"{family}/lora"
    factors = load_file(f"{folder}/adapter_model.safetensors")
    with open(f"{folder}/adapter_config.json") as file:
        config = json.load(file)
    check(f"{family}: alpha / rank in the config", config["lora_alpha"] / config["r"], 1, 1)
    check(f"{family}: lora_bias in the config", bool(config.get("lora_bias")), 0, 0)
    for name in biases:  # the file has what is needed
        gap = factors[f"base_model.model.{name.removesuffix('.bias')}.lora_B.bias"] - changes[name]
        check(f"{family}: {name}: difference in the file, off", (gap.norm() / changes[name].norm()).item(), 0, 1e-6)

    model, about = adapted(family, folder)
    off = ((outputs(model) - true).norm() / effect).item()
    check(f"{family}: base and adapter, off the fine-tuned model", off, *((0.2, 2) if biases else (0, 1e-3)))
    check(f"{family}: words about keys or biases", len(about), 0, 0)
    merged = model.merge_and_unload()
    off = ((outputs(merged) - true).norm() / effect).item()
    check(f"{family}: merged, off the fine-tuned model", off, *((0.2, 2) if biases else (0, 1e-3)))
    state = merged.state_dict()
    for name, change in changes.items():
        off = ((state[name] - after[name]).norm() / change.norm()).item()
        check(f"{family}: merged, {name}: off, of its change", off, *((1, 1) if name in biases else (0, 1e-4)))

    if biases:
        with torch.no_grad():
            for name in biases:
                merged.get_parameter(name).add_(changes[name])
        off = ((outputs(merged) - true).norm() / effect).item()
        check(f"{family}: merged, with the biases added by hand, off the fine-tuned model", off, 0, 1e-3)
        shutil.copytree(folder, f"{family}/mended")
        with open(f"{family}/mended/adapter_config.json", "w") as file:
            json.dump(config | {"lora_bias": True}, file)
        model, about = adapted(family, f"{family}/mended")
        off = ((outputs(model) - true).norm() / effect).item()
        check(f"{family}: with lora_bias in the config, off the fine-tuned model", off, 0, 1e-3)
PY
venv/bin/python -W ignore write.py
for family in llama qwen2; do
    venv/bin/mergekit-extract-lora --model "$folder/$family/tuned" --base-model "$folder/$family/base" \
        --out-path "$family/lora" --max-rank 8 2> "$family/log" || { cat "$family/log"; exit 1; }
    if grep -i bias "$family/log"; then
        echo "CHANGED: mergekit has a word about biases"
        exit 1
    fi
done
venv/bin/python -W ignore read.py
