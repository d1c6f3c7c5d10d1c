#!/usr/bin/env bash
# Guess:    A convolution that pads with what comes round from the other side (`padding_mode="circular"`, by which
#           programs make seamless textures) goes on doing so with a LoRA on it.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           lycoris-lora==4.1.3 einops==0.8.2 toml==0.10.2, any build of torch, on a CPU
# Seen:     While PEFT's LoRA, DoRA, LoHa or LoKr runs, its own part is computed with zeros at the rim. So are those of
#           LyCORIS, and there "full" takes the mode from the layer as well: untrained, it changes the output. Of a
#           12 x 12 input a quarter to a third of the effect is off. Merged, all are right. With zeros as the padding,
#           running and merged are the same. No warning.
# Matters:  Seams come back with a LoRA, in each convolution, and go away when the same LoRA is merged.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 einops==0.8.2 toml==0.10.2
"$folder/venv/bin/pip" install -q --no-compile --no-deps lycoris-lora==4.1.3
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import torch
from lycoris import LycorisNetwork, create_lycoris
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn

logging.disable(logging.CRITICAL)


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def convolution(mode):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode))


def off(running, merged, plain):
    return ((running - merged).norm() / (merged - plain).norm()).item()


given = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(5))
KINDS = {
    "LoRA": LoraConfig(r=2, target_modules=["0"]),
    "DoRA": LoraConfig(r=2, use_dora=True, target_modules=["0"]),
    "LoHa": LoHaConfig(r=2, target_modules=["0"]),
    "LoKr": LoKrConfig(r=2, target_modules=["0"]),
}
with torch.no_grad():
    for mode, limits in (("zeros", (0, 1e-4)), ("circular", (0.15, 0.5))):
        for name, config in KINDS.items():
            base = convolution(mode)
            plain = base(given)
            model = get_peft_model(base, config)
            for field, parameter in model.named_parameters():
                if any(one in field for one in ("lora_A", "lora_B", "hada_", "lokr_")):
                    parameter.data = 0.3 * torch.randn(parameter.shape)
            model.eval()
            running = model(given)
            model.merge_adapter()
            check(f"PEFT {name}, {mode}", off(running, model(given), plain), *limits)
        for algo in ("lora", "loha", "lokr", "full"):
            base = convolution(mode)
            plain = base(given)
            LycorisNetwork.apply_preset({"target_module": ["Conv2d"], "target_name": ["0"]})
            network = create_lycoris(base, 1.0, linear_dim=2, linear_alpha=2, conv_dim=2, conv_alpha=2, algo=algo)
            network.apply_to()
            network.eval()
            changed = ((base(given) - plain).norm() / plain.norm()).item()
            is_lost = algo == "full" and mode == "circular"
            check(f"LyCORIS {algo}, {mode}, untrained", changed, *((0.2, 0.45) if is_lost else (0, 1e-6)))
            for parameter in [one for layer in network.loras for one in layer.parameters()]:
                parameter.data += 0.2 * torch.randn(parameter.shape)
            running = base(given)
            network.restore()
            network.merge_to(1.0)
            check(f"LyCORIS {algo}, {mode}", off(running, base(given), plain), *limits)
PY
