#!/usr/bin/env bash
# Guess:    save_as_lora() at full rank writes a LoRA that does what the adapter does, or refuses; it is made for
#           programs that know plain LoRA only.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0, any
#           build of torch, on a CPU
# Seen:     True of LoHa, LoKr and VeRA (0.0 off). A trained DoRA comes out without its magnitudes, 37 % of its effect
#           off, and a LoRA with lora_bias without its biases, 26 % off. The one warning is that these are LoRAs
#           already and there is no need to convert them. The change of the weight that merging makes is converted
#           without loss at the same rank.
# Matters:  A DoRA is just what one converts for a program that cannot read it. The file passes for a LoRA of the same
#           training, and no rank brings the rest back; take it from the merged weight instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python - <<'PY'
import warnings

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model, save_as_lora
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32))


torch.manual_seed(1)
given = torch.randn(64, 24)
plain = base()(given).detach()
goal = plain * (1 + 0.3 * torch.randn(32)) + 0.2 * given @ torch.randn(24, 3) @ torch.randn(3, 32)
for name, config, low, high in (
    ("LoHa", LoHaConfig(r=4, target_modules=["0"]), 0, 1e-4),
    ("LoKr", LoKrConfig(r=4, target_modules=["0"]), 0, 1e-4),
    ("VeRA", VeraConfig(r=8, target_modules=["0"]), 0, 1e-4),
    ("LoRA", LoraConfig(r=4, target_modules=["0"]), 0, 1e-4),
    ("DoRA", LoraConfig(r=4, target_modules=["0"], use_dora=True), 0.2, 0.6),
    ("LoRA with lora_bias", LoraConfig(r=4, target_modules=["0"], lora_bias=True), 0.15, 0.5),
):
    torch.manual_seed(2)
    model = get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        (model(given) - goal).square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        wanted = model(given)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save_as_lora("converted", model, rank=24)
        said = [str(entry.message) for entry in caught]
        converted = PeftModel.from_pretrained(base(), "converted").eval()
        off = ((converted(given) - wanted).norm() / (wanted - plain).norm()).item()
        check(f"{name}: off in its effect, at full rank", off, low, high)
        if high > 1e-4:
            print("  warned of:", said)
            lost = [text for text in said if "bias" in text.lower() or "dora" in text.lower() or "magnitude" in text]
            check(f"{name}: warnings that speak of a loss", len(lost), 0, 0)
        if name == "DoRA":
            change = model.merge_and_unload()[0].weight - base()[0].weight
            up, values, down = torch.linalg.svd(change, full_matrices=False)
            output = plain + given @ (up * values @ down).T
            check(
                "DoRA, by its merged weight: off in its effect",
                ((output - wanted).norm() / (wanted - plain).norm()).item(),
                0,
                1e-4,
            )
PY
