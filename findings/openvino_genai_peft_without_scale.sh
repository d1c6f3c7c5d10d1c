#!/usr/bin/env bash
# Guess:    OpenVINO GenAI reads adapters as PEFT saves them: handed adapter_model.safetensors, with its adapter_config.json
#           beside it, it makes the text that PEFT makes, or says what it does not read.
# Versions: openvino==2026.4.1 openvino-genai==2026.4.1.0 optimum-intel==2.2.0 optimum==2.3.0 nncf==3.4.0 peft==0.21.2
#           transformers==5.5.4 tokenizers==0.22.2 torch==2.13.0 numpy==2.4.6, any build of torch, on a CPU
# Seen:     Only the tensors are read. PEFT keeps alpha in the JSON, so a LoRA of rank 4 and alpha 32 runs at an eighth of
#           its strength with alpha=1.0; with alpha=8.0, alpha over rank by hand, each token is PEFT's. The magnitudes of a
#           DoRA are in the file and are not read: its tokens are those of the same file without them. Nothing is said of
#           either, though a tensor that fits no layer is named in a warning. A whole lm_head beside the LoRA is applied.
# Matters:  An adapter that is too weak looks like one that was trained badly, and the strength that cures it is another one
#           for each file. Whoever passes safetensors alone from one program to the next has to write alpha over rank into
#           the factors or the file, and has to refuse what has magnitudes where they are not applied.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 openvino-genai==2026.4.1.0 \
    optimum-intel==2.2.0 optimum==2.3.0 nncf==3.4.0 peft==0.21.2 transformers==5.5.4 tokenizers==0.22.2 numpy==2.4.6
# Not needed, and not every build of it fits every build of torch.
"$folder/venv/bin/pip" uninstall -q -y torchvision || true
cd "$folder"
cat >common.py <<'PY'
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

COUNT = 24


def prompt():
    found = AutoTokenizer.from_pretrained("tiny")("the cat sat on the mat", return_tensors="pt", add_special_tokens=False)
    return found.input_ids


@torch.no_grad()
def tokens(model):
    ids = prompt()
    out = model.generate(input_ids=ids, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    return out[0, ids.shape[1] :].tolist()


def plain():
    return LlamaForCausalLM.from_pretrained("tiny").eval()
PY
cat >make.py <<'PY'
"""A small random model for both, adapters as PEFT saves them, and what PEFT makes with them."""
import json

import torch
from common import plain, tokens
from optimum.exporters.openvino import main_export
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
words = ["a cat sat on the mat and looked at the sea " * 3, "the dog ran far away over hills"]
special = ["<unk>", "<s>", "</s>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )
)
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.15)
model.save_pretrained("tiny")
fast.save_pretrained("tiny")
main_export("tiny", "tiny_ov", task="text-generation-with-past", convert_tokenizer=True)


def adapter(name, alpha, **more):
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "o_proj"], **more)
    made = get_peft_model(plain(), config).eval()
    for key, value in made.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            torch.nn.init.normal_(value, std=0.1)
        if "magnitude" in key:
            value.data *= 1.5
        if "modules_to_save" in key:
            torch.nn.init.normal_(value, std=0.15)
    made.save_pretrained(name)
    return tokens(made)


found = {"plain": tokens(plain())}
found["alpha 4"] = adapter("lora_4", 4)
found["alpha 32"] = adapter("lora_32", 32)
found["dora"] = adapter("dora", 4, use_dora=True)
found["head"] = adapter("head", 4, modules_to_save=["lm_head"])
values = load_file("dora/adapter_model.safetensors")
rest = {key: value for key, value in values.items() if "magnitude" not in key}
assert len(rest) < len(values)
save_file(rest, "dora_without.safetensors")
json.dump(found, open("peft.json", "w"))
PY
cat >run.py <<'PY'
import json

import openvino
import openvino_genai
from common import COUNT, prompt


def tokens(path=None, alpha=1.0):
    more = {} if path is None else {"adapters": openvino_genai.AdapterConfig(openvino_genai.Adapter(path), alpha)}
    pipeline = openvino_genai.LLMPipeline("tiny_ov", "CPU", **more)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos, config.apply_chat_template = COUNT, False, True, False
    return [int(one) for one in pipeline.generate(openvino.Tensor(prompt().numpy()), config).tokens[0]]


file = "adapter_model.safetensors"
found = {
    "plain": tokens(),
    "alpha 4": tokens(f"lora_4/{file}"),
    "alpha 32": tokens(f"lora_32/{file}"),
    "alpha 32 by 8": tokens(f"lora_32/{file}", 8.0),
    "dora": tokens(f"dora/{file}"),
    "dora without": tokens("dora_without.safetensors"),
    "head": tokens(f"head/{file}"),
}
json.dump(found, open("openvino.json", "w"))
PY
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python make.py >make.txt 2>&1 || { tail -n 20 make.txt; exit 1; }
venv/bin/python run.py >run.txt 2>&1 || { tail -n 20 run.txt; exit 1; }
venv/bin/python - <<'PY'
import json

peft, here = json.load(open("peft.json")), json.load(open("openvino.json"))


def check(what, right):
    print(f"{what}: {right}")
    assert right, "CHANGED"


check("the model alone is the same", peft["plain"] == here["plain"])
check("a LoRA whose alpha is its rank is the same", peft["alpha 4"] == here["alpha 4"] != peft["plain"])
check("one of alpha 32 and rank 4 is not PEFT's", peft["alpha 32"] != here["alpha 32"])
check("but what alpha 4 gives", here["alpha 32"] == here["alpha 4"])
check("and with alpha over rank by hand it is PEFT's", peft["alpha 32"] == here["alpha 32 by 8"])
check("a DoRA is not PEFT's", peft["dora"] != here["dora"])
check("but what its file without magnitudes gives", here["dora"] == here["dora without"])
check("a whole head beside a LoRA is PEFT's", peft["head"] == here["head"] != here["alpha 4"])
check("nothing is said", "unused" not in open("run.txt").read().lower() and "magnitude" not in open("run.txt").read())
PY
