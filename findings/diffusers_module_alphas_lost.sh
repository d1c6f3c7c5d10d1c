#!/usr/bin/env bash
# Guess:    A kohya file states an alpha for every module, and diffusers gives every module its own alpha / rank.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     True of feed-forward layers and convolutions in the UNet. Attention projections there, and all layers of a
#           text encoder, get the alpha that is most frequent in the file. Where ranks are 4, 8 and 16 with alpha equal
#           to rank, which is strength 1 everywhere, they are applied at 2, 1 and 0.5.
# Matters:  Files that were resized to a dynamic rank, or trained with alphas by block, have such alphas, and other
#           programs read them as they stand. Here the balance of the LoRA is another one, without a word; one factor
#           for the whole file does not bring it back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 diffusers==0.42.1
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

KINDS = (nn.Linear, nn.Conv2d)


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def layers(model):
    """Returns the plain layers of a model, beneath their adapters where they have some, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[name] = module.get_base_layer()
        elif isinstance(module, KINDS) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def written(model, prefix, path):
    """Writes a kohya file for all layers of a model and returns the change and the rank that it states, by layer."""
    tensors, stated = {}, {}
    ranks = [8, 4, 8, 16]
    for place, (name, layer) in enumerate(layers(model).items()):
        rank, shape = ranks[place % 4], layer.weight.shape
        down = torch.randn(rank, *shape[1:])
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
        module = prefix + name.removeprefix("text_model.").replace(".", "_")
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(float(rank))
        stated[name] = (up.flatten(1) @ down.flatten(1)).reshape(shape), rank
    save_file(tensors, path)
    return stated


def applied(model, load, stated):
    """Returns the strength at which a file is applied, by the layer's name, and checks its direction."""
    before = {name: layer.weight.detach().clone() for name, layer in layers(model).items()}
    load(*Loader.lora_state_dict("lora.safetensors"))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    strengths = {}
    for name, layer in layers(model).items():
        change, (wanted, _) = layer.weight.detach() - before[name], stated[name]
        strengths[name] = ((change * wanted).sum() / wanted.square().sum()).item()
        assert (change - strengths[name] * wanted).norm() < 1e-3 * wanted.norm(), name
    return strengths


def report(what, strengths, stated):
    for rank, wanted in ((4, 2.0), (8, 1.0), (16, 0.5)):
        values = [value for name, value in strengths.items() if stated[name][1] == rank]
        low, high = (wanted - 1e-3, wanted + 1e-3) if "lost" in what else (0.999, 1.001)
        check(f"{what}, {len(values)} of rank {rank}, lowest", min(values), low, high)
        check(f"{what}, {len(values)} of rank {rank}, highest", max(values), low, high)


torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
    attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()  # fmt: skip
stated = written(unet, "lora_unet_", "lora.safetensors")
strengths = applied(unet, lambda tensors, alphas: Loader.load_lora_into_unet(tensors, alphas, unet), stated)
attention = {name: value for name, value in strengths.items() if ".attn" in name}
others = {name: value for name, value in strengths.items() if ".attn" not in name}
report("UNet, alpha kept", others, stated)
report("UNet attention, alpha lost", attention, stated)

torch.manual_seed(1)
text = CLIPTextModel(
    CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2,
    )
)  # fmt: skip
stated = written(text, "lora_te_text_model_", "lora.safetensors")
strengths = applied(
    text, lambda tensors, alphas: Loader.load_lora_into_text_encoder(tensors, alphas, text, "text_encoder"), stated
)
report("text encoder, alpha lost", strengths, stated)
PY
