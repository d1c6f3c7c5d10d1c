#!/usr/bin/env bash
# Guess:    In a model whose lm_head is its embedding (tied weights, as in small Llama, Qwen and Gemma) PEFT asks for
#           ensure_weight_tying=True, as merging could go wrong without it. With it both layers share one LoRA, and
#           merging puts that LoRA into the shared weight.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0, any
#           build of torch, on a CPU
# Seen:     It puts it in twice. Both layers do share the two factors, and running, saving and loading are right. But each
#           of the two adds the change to the one weight: merged it has 2.000 times the LoRA, for embed_tokens, for
#           lm_head and for both as targets, with safe_merge too. Other layers have theirs once. The model misses what was
#           trained by 117 % of its effect. With 0 as the scale of the head's LoRA before merging it is right. Merging
#           warns, with and without the setting, that tied weights "can lead to complications", and advises a base with
#           a copy of the embedding as its head. On such a base the head's two factors in the file are left out, 48 % off.
# Matters:  The embedding of a merged model is too strong in every program, and no strength mends it, as all other
#           layers are right. The warning does not change with the setting, so it passes for one about being without it.
#           Whoever merges layer by layer has to find out first which layers have one weight, and merge once for each.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python - 2>log.txt <<'PY' || { tail -n 20 log.txt; exit 1; }
import copy
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
base.model.embed_tokens.weight.data *= 20
ids, labels = torch.randint(0, 64, (2, 2, 12))


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


@torch.no_grad()
def run(model):
    return model.eval()(input_ids=ids).logits


plain = run(base)
for targets in (["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head", "q_proj"]):
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, ensure_weight_tying=True)
        model = get_peft_model(copy.deepcopy(base), config)
    name = " ".join(targets)
    check(f"{name}: warnings that ask for the setting", sum("ensure_weight_tying" in str(one.message) for one in seen), 0, 0)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
    wanted = run(model)

    def off(outputs):
        return ((outputs - wanted).norm() / (wanted - plain).norm()).item()

    inner = model.base_model.model
    head, embedding, query = inner.lm_head, inner.model.embed_tokens, inner.model.layers[0].self_attn.q_proj
    shared = [
        torch.equal(head.lora_A["default"].weight, embedding.lora_embedding_B["default"].T),
        torch.equal(head.lora_B["default"].weight, embedding.lora_embedding_A["default"].T),
    ]
    check(f"{name}: factors that both layers share", sum(shared), 2, 2)
    check(f"{name}: effect", ((wanted - plain).norm() / plain.norm()).item(), 0.05, 10)
    model.save_pretrained("file")
    check(f"{name}, loaded: off", off(run(PeftModel.from_pretrained(copy.deepcopy(base), "file"))), 0, 1e-5)

    parts = {"embedding": head.get_delta_weight("default").detach(), "q_proj": query.get_delta_weight("default").detach()}
    old = {"embedding": base.model.embed_tokens.weight, "q_proj": base.model.layers[0].self_attn.q_proj.weight}
    model.merge_adapter()
    check(f"{name}, merged: off", off(run(model)), 0.1, 10)
    model.unmerge_adapter()
    check(f"{name}, unmerged: off", off(run(model)), 0, 1e-4)
    for safe in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), "file").merge_and_unload(safe_merge=safe)
        check(f"{name}, merged, safe {safe}: off", off(run(loaded)), 0.1, 10)
        check(f"{name}, merged, safe {safe}: still tied", loaded.lm_head.weight is loaded.model.embed_tokens.weight, 1, 1)
        new = {"embedding": loaded.model.embed_tokens.weight, "q_proj": loaded.model.layers[0].self_attn.q_proj.weight}
        for layer, times in (("embedding", 2), ("q_proj", 1)):
            change = (new[layer] - old[layer]).detach()
            there = ((change * parts[layer]).sum() / parts[layer].square().sum()).item()
            check(f"{name}, merged, safe {safe}, {layer}: times the LoRA", there, times - 1e-3, times + 1e-3)
            rest = ((change - times * parts[layer]).norm() / parts[layer].norm()).item()
            check(f"{name}, merged, safe {safe}, {layer}: anything else", rest, 0, 1e-3)

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), "file")
    loaded.base_model.model.lm_head.scaling["default"] = 0.0
    check(f"{name}, merged with 0 as the head's scale: off", off(run(loaded.merge_and_unload())), 0, 1e-4)

    apart = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
    apart.load_state_dict({field: value.clone() for field, value in base.state_dict().items()})
    head = [field for field in load_file("file/adapter_model.safetensors") if "lm_head.lora_" in field]
    check(f"{name}: factors for the head in the file", len(head), 2, 2)
    loaded = PeftModel.from_pretrained(apart, "file")
    check(f"{name}, on an untied base: layers with a LoRA", sum(hasattr(one, "lora_A") for one in loaded.modules()), 3, 3)
    check(f"{name}, on an untied base: off", off(run(loaded)), 0.1, 2)
PY
