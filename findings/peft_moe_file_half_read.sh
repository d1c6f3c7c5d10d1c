#!/usr/bin/env bash
# Guess:    transformers 5 keeps the experts of a MoE model in one tensor each, where version 4 had a Linear for each. PEFT
#           converts LoRAs for the old layers when it loads them, so a file does after the update what it did before, or
#           PEFT says what it leaves out.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 safetensors==0.8.0 accelerate==1.15.0, with transformers==4.57.6 to make
#           the files and transformers==5.24.0 to read them, any build of torch, on a CPU
# Seen:     True of Mixtral and of a Qwen3-MoE whose layers all have experts (1e-6 off). DeepSeek V2 and V3, GLM-4-MoE, ERNIE
#           4.5 and a Qwen3-MoE with a dense layer get the experts' part alone: the shared experts and the dense layers,
#           whose names end in gate_proj, up_proj and down_proj as well, are in the file and get nothing. Qwen2-MoE gets
#           the reverse: the shared expert's part, and nothing for the experts. With use_rslora gate and up, which become
#           one factor of twice the rank, are the root of 2 too strong: alpha is doubled, and then divided by the root
#           of the new rank. No warning tells, of any of it; one about rank_pattern comes with files that are read right too.
# Matters:  The file is right, its targets are the usual ones, and half of it is not applied, or at another strength. Merge
#           with the version that trained it. Whoever renames or fuses layers in a file has to count afterwards: each
#           tensor that was read must lie in a layer, and alpha over rank must be what it was.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 safetensors==0.8.0 \
    accelerate==1.15.0 transformers==4.57.6
cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
cat >make.py <<'PY'
"""Small random models, a LoRA for each as PEFT saves it, and what it does there: all of it, and each part alone."""
import copy

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

COMMON = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
FEW = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
ROUTED = dict(
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
    moe_intermediate_size=40,
)
LATENT = dict(kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
ERNIE = dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1, moe_intermediate_size=40)
FAMILIES = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(head_dim=8, **FEW),
    "Qwen3Moe, first layer dense": dict(head_dim=8, mlp_only_layers=[0], **FEW),
    "DeepseekV2": dict(**ROUTED, **LATENT),
    "DeepseekV3": dict(**ROUTED, **LATENT),
    "Glm4Moe": dict(head_dim=8, **ROUTED),
    "Ernie4_5_Moe": ERNIE,
    "Qwen2Moe": dict(shared_expert_intermediate_size=40, **FEW),
}
ids = torch.arange(24).view(2, 12)
found = {}


@torch.no_grad()
def run(model):
    return model(ids).logits


for family, more in FAMILIES.items():
    kind = family.split(",")[0]
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**COMMON, **more)).eval()
    for value in base.parameters():
        if value.dim() > 1:
            torch.nn.init.normal_(value, std=0.15)
    base.save_pretrained(family)
    names = ["w1", "w2", "w3"] if kind == "Mixtral" else ["gate_proj", "up_proj", "down_proj"]
    # where an ordinary LoRA is read right
    for rslora in (False, True) if family in ("Mixtral", "Qwen3Moe") else (False,):
        torch.manual_seed(1)
        # both are of scale 2
        config = LoraConfig(r=4, lora_alpha=4 if rslora else 8, use_rslora=rslora, target_modules=names)
        made = get_peft_model(copy.deepcopy(base), config).eval()
        up = {name: value for name, value in made.named_parameters() if "lora_B" in name}
        for value in up.values():
            torch.nn.init.normal_(value, std=0.1)
        file = f"{family}, {'rsLoRA' if rslora else 'LoRA'}"
        made.save_pretrained(file)
        result = {"plain": run(base), "all": run(made)}
        again = run(PeftModel.from_pretrained(copy.deepcopy(base), file).eval())
        assert torch.allclose(again, result["all"], atol=1e-5), "the file is not what was made"
        for part in (True, False):
            kept = {name: value.detach().clone() for name, value in up.items()}
            for name, value in up.items():
                if (".experts." in name) != part:
                    value.data.zero_()
            result["experts" if part else "rest"] = run(made)
            for name, value in up.items():
                value.data.copy_(kept[name])
        found[file] = result
torch.save(found, "made.pt")
PY
venv/bin/python -W ignore make.py >make.txt 2>&1 || { tail -n 20 make.txt; exit 1; }
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 safetensors==0.8.0 accelerate==1.15.0 \
    transformers==5.24.0
cat >read.py <<'PY'
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ids = torch.arange(24).view(2, 12)


@torch.no_grad()
def run(model):
    return model(ids).logits


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


for file, made in torch.load("made.pt").items():
    family, _, kind = file.rpartition(", ")
    plain, effect = made["plain"], (made["all"] - made["plain"]).norm()
    base = AutoModelForCausalLM.from_pretrained(family).eval()
    check(f"{file}: the model alone, off", ((run(base) - plain).norm() / plain.norm()).item(), 0, 1e-5)
    check(f"{file}: effect where it was made", (effect / plain.norm()).item(), 0.1, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, file).eval()
    said = " ".join(str(one.message) for one in said).lower()
    told = any(word in said for word in ("missing", "unexpected", "rslora", "scal", "experts.0", "dense", "shared_expert"))
    check(f"{file}: a warning tells", told, 0, 0)

    def off(goal, given):
        return ((run(given) - goal).norm() / effect).item()

    if kind == "rsLoRA":
        check(f"{file}: off", off(made["all"], model), 0.1, 2)
        count = 0
        for name, layer in model.named_modules():
            if name.endswith("experts.base_layer"):
                check(f"{file}: scale of gate and up over 2", layer.scaling["default"] / 2, 1.41421, 1.41422)
                layer.scaling["default"] = 2.0
                count += 1
        check(f"{file}: such layers", count, 3, 3)
        check(f"{file}: with that scale set to 2, off", off(made["all"], model), 0, 1e-4)
        continue
    if family in ("Mixtral", "Qwen3Moe"):
        check(f"{file}: off", off(made["all"], model), 0, 1e-4)
        continue
    kept, lost = ("rest", "experts") if family == "Qwen2Moe" else ("experts", "rest")
    check(f"{file}: effect of the part '{lost}'", ((made[lost] - plain).norm() / effect).item(), 0.1, 2)
    check(f"{file}: off", off(made["all"], model), 0.1, 2)
    check(f"{file}: off what the part '{kept}' did alone", off(made[kept], model), 0, 1e-4)
PY
venv/bin/python -W ignore read.py 2>read.txt || { tail -n 20 read.txt; exit 1; }
if grep -qiE "missing|unexpected|shared_expert" read.txt; then echo "CHANGED: it is told"; exit 1; fi
