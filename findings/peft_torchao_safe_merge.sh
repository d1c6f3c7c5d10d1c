#!/usr/bin/env bash
# Guess:    merge_adapter(safe_merge=True) refuses an adapter with NaN before it touches a weight, on every kind of
#           layer that it can merge into.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           torchao==0.17.0, any build of torch, on a CPU
# Seen:     True of an ordinary layer: ValueError, and the outputs are as before. On a layer that torchao has quantised
#           the old weight is checked, then the sum is stored unchecked. Nothing is raised, the outputs are NaN, and
#           stay NaN after unmerge_adapter() and with the adapter disabled.
# Matters:  A file with one bad value ends the loaded model, by the very call that is meant to prevent it. Check the
#           sum, not the two terms, and do it before the old weight is given up.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 torchao==0.17.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1,
        eos_token_id=2,
    )
).save_pretrained("model")  # fmt: skip
given = torch.arange(8)[None]


def adapted(quantised):
    settings = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())} if quantised else {}
    model = LlamaForCausalLM.from_pretrained("model", dtype=torch.bfloat16, **settings)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()


def finite(model):
    """Returns the part of the outputs that are finite numbers."""
    return model(given).logits.isfinite().float().mean().item()


def merged(model):
    """Returns whether a safe merge went through."""
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError as error:
        print("  refused:", str(error)[:80])
        return False
    return True


with torch.no_grad():
    for quantised in (False, True):
        kind = "int8 of torchao" if quantised else "ordinary"
        model = adapted(quantised)
        check(f"{kind}, sound adapter: merged", merged(model), 1, 1)
        check(f"{kind}, sound adapter: finite outputs", finite(model), 1, 1)

        model = adapted(quantised)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_A["default"].weight[0, 0] = float("nan")
        check(f"{kind}, adapter with NaN: merged", merged(model), quantised, quantised)
        model.unmerge_adapter()
        with model.disable_adapter():
            left = 0 if quantised else 1
            check(f"{kind}, after unmerging and disabled: finite outputs", finite(model), left, left)
PY
