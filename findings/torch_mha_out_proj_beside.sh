#!/usr/bin/env bash
# Guess:    A LoRA that runs beside a layer acts wherever that layer is used, and merged it does the same.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           lycoris-lora==4.1.3, any build of torch, on a CPU
# Seen:     Beside the out_proj of torch's MultiheadAttention it acts never: 0.0 in PEFT and in LyCORIS, and no gradient
#           reaches it. torch reads weight and bias of that layer and does not call it. Merged, the same adapters have
#           their effect. With the attention itself as target PEFT has it while running too.
# Matters:  The text encoders of open_clip, those of SDXL and SD 2 in their original form, are built of such attention,
#           and files for them have this layer in every block. A patch of the weight reaches it; a bypass, however it
#           hooks the layer's forward, does not, and no error tells.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 lycoris-lora==4.1.3
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging

import torch
from lycoris import create_lycoris_from_weights
from peft import LoraConfig, get_peft_model
from torch import nn

logging.disable(logging.CRITICAL)


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


class Block(nn.Module):
    """Is a transformer block as open_clip has it."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.c_fc = nn.Linear(32, 32)

    def forward(self, given):
        given = given + self.attn(given, given, given, need_weights=False)[0]
        return given + self.c_fc(given)


def block():
    torch.manual_seed(0)
    return Block()


torch.manual_seed(1)
given = torch.randn(2, 5, 32)
plain = block()(given).detach()


def effect(model):
    """Returns the change of the output, in outputs."""
    return ((model(given) - plain).norm() / plain.norm()).item()


for target in ("c_fc", "out_proj", "attn"):
    model = get_peft_model(block(), LoraConfig(r=4, lora_alpha=4, target_modules=[target], init_lora_weights=False))
    output = model(given)
    if output.requires_grad:
        output.square().sum().backward()
    reached = sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        low, high = (0, 1e-6) if target == "out_proj" else (0.05, 10)
        check(f"PEFT, {target}: effect while it runs", effect(model), low, high)
        check(
            f"PEFT, {target}: factors that a gradient reaches", reached, *((0, 0) if target == "out_proj" else (2, 4))
        )
        check(f"PEFT, {target}: effect of the merge", effect(model.merge_and_unload()), 0.05, 10)

for target in ("c_fc", "attn_out_proj"):
    model = block()
    torch.manual_seed(2)
    tensors = {
        f"lycoris_{target}.lora_down.weight": 0.2 * torch.randn(4, 32),
        f"lycoris_{target}.lora_up.weight": 0.2 * torch.randn(32, 4),
        f"lycoris_{target}.alpha": torch.tensor(4.0),
    }
    network, _ = create_lycoris_from_weights(1.0, None, model, weights_sd=tensors)
    check(f"LyCORIS, {target}: layers that the file is applied to", len(network.loras), 1, 1)
    model.eval()
    with torch.no_grad():
        network.apply_to()
        low, high = (0, 1e-6) if target == "attn_out_proj" else (0.05, 10)
        check(f"LyCORIS, {target}: effect while it runs", effect(model), low, high)
        network.restore()
        network.merge_to(1.0)
        check(f"LyCORIS, {target}: effect of the merge", effect(model), 0.05, 10)
PY
