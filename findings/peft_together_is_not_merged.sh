#!/usr/bin/env bash
# Guess:    Two adapters that are active together give what they give when both are merged.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0, any
#           build of torch, on a CPU
# Seen:     True of LoRA, LoHa, LoKr, BOFT and HRA (1e-6 off), but not of OFT and C3A. Two OFTs turn the input one after
#           the other, and merging composes them in the other order. A second C3A gets what the first one gave out, not
#           the layer's input; merged, they add up. Of the effect of both, OFT is 44 % off and C3A 101 %. Each alone
#           merges without loss.
# Matters:  A stack that was tried and found good is another one once it is merged for speed, and the merged sum cannot
#           be checked against the running model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import torch
from peft import BOFTConfig, C3AConfig, HRAConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


CONFIGS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=["0"]),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=["0"]),
    "LoKr": lambda: LoKrConfig(r=4, target_modules=["0"]),
    "BOFT": lambda: BOFTConfig(boft_block_size=8, target_modules=["0"]),
    "HRA": lambda: HRAConfig(r=4, target_modules=["0"]),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=8, target_modules=["0"]),
    "C3A": lambda: C3AConfig(block_size=16, target_modules=["0"]),
}
torch.manual_seed(1)
given = torch.randn(64, 32)
for name, config in CONFIGS.items():
    low, high = {"OFT": (0.3, 0.6), "C3A": (0.7, 1.3)}.get(name, (0, 1e-4))
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32, bias=False))
    plain = base(given).detach()
    model = get_peft_model(base, config())
    model.add_adapter("second", config())
    for parameter_name, parameter in model.named_parameters():
        if any(field in parameter_name for field in ("lora_", "hada_", "lokr_", "boft_", "hra_", "oft_", "c3a_")):
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.eval()
    with torch.no_grad():
        for names, lowest, highest in (
            (["default"], 0, 1e-4),
            (["second"], 0, 1e-4),
            (["default", "second"], low, high),
        ):
            model.base_model.set_adapter(names)
            running = model(given)
            model.merge_adapter()
            merged = model(given)
            off = ((merged - running).norm() / (running - plain).norm()).item()
            check(f"{name}, {' and '.join(names)}: merged, off in the effect", off, lowest, highest)
            model.unmerge_adapter()
        if name == "OFT":
            model.base_model.set_adapter(["second", "default"])
            model.merge_adapter()
            off = ((model(given) - running).norm() / (running - plain).norm()).item()
            check("OFT, merged in the other order, off in the effect", off, 0, 1e-4)
PY
