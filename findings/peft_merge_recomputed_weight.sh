#!/usr/bin/env bash
# Guess:    A LoRA that runs beside a layer can be merged into that layer, or the merge is refused: PEFT names the kinds of
#           layer that it cannot merge into. torch's weight_norm and spectral_norm leave a Linear a Linear with a weight.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1 lycoris-lora==4.1.3, any build of torch, on a CPU
# Seen:     Beside such a layer a LoRA and a DoRA run as they should. merge_and_unload() runs through, takes the adapter off,
#           and leaves 0.0 of it, with safe_merge as well, for Linear and Conv2d, for the weight_norm and the spectral_norm
#           of torch.nn.utils, the newer ones of torch.nn.utils.parametrizations, and orthogonal: their weight is not
#           stored but computed from other tensors at each use, and PEFT adds to the computed one. All tensors of the
#           model are those of the base, bit for bit. LyCORIS' merge_to() does the same to the older weight_norm; of the
#           newer one's layers it says that they are none of its kinds. With the norm taken off first all is merged.
# Matters:  What is saved is the base. The autoencoder of Stable Audio in diffusers is made of such layers, as vocoders and
#           audio codecs are. Whoever patches a weight has to ask first whether it is a stored one: a parameter of that
#           name in named_parameters(); and read the weight again after the next run, or compare outputs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 \
    accelerate==1.15.0 safetensors==0.8.0 diffusers==0.42.1 lycoris-lora==4.1.3
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - 2>log.txt <<'PY' || { tail -n 20 log.txt; exit 1; }
import warnings
from collections import OrderedDict

import torch
from diffusers import AutoencoderOobleck
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def take_off(layer):
    parametrize.remove_parametrizations(layer, "weight")


NORMS = {
    "none": (lambda layer: layer, lambda layer: None),
    "old weight_norm": (weight_norm, remove_weight_norm),
    "old spectral_norm": (spectral_norm, remove_spectral_norm),
    "new weight_norm": (parametrizations.weight_norm, take_off),
    "new spectral_norm": (parametrizations.spectral_norm, take_off),
    "orthogonal": (parametrizations.orthogonal, take_off),
}
LAYERS = {
    "Linear": (torch.randn(32, 24), lambda: nn.Linear(24, 24), lambda: nn.Linear(24, 8)),
    "Conv2d": (torch.randn(2, 4, 12, 12), lambda: nn.Conv2d(4, 6, 3), lambda: nn.Conv2d(6, 6, 3)),
}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def measure(what, model, given, targets, lost, dora, safe, call=None):
    """Adds an adapter, merges it and says how much of its effect is left."""
    call = call or (lambda one: one(given))
    before = state(model)
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=dora)).eval()
    torch.manual_seed(1)
    for name, value in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.2)
        if "magnitude" in name:
            value.data *= 1.2
    with made.disable_adapter():
        plain = call(made.base_model.model)
    goal = call(made.base_model.model)
    effect = (goal - plain).norm()
    check(f"{what}: effect beside the layer", (effect / plain.norm()).item(), 0.02, 5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merged = made.merge_and_unload(safe_merge=safe)
    left = sum("lora" in name for name, _ in merged.named_modules())
    check(f"{what}: warnings of the merge, and adapters left", len(said) + left, 0, 0)
    if lost:
        check(f"{what}: merged, change of the outputs", (call(merged) - plain).norm().item(), 0, 0)
        after = merged.state_dict()
        same = set(before) == set(after) and all(after[name].equal(value) for name, value in before.items())
        check(f"{what}: merged, all tensors are the base's", same, 1, 1)
    else:
        check(f"{what}: merged, off", ((call(merged) - goal).norm() / effect).item(), 0, 1e-4)


for kind, (given, first, last) in LAYERS.items():
    for name, (put_on, off) in NORMS.items():
        for without in (False, True) if name != "none" else (False,):
            for dora in (False, True):
                for safe in (False, True):
                    torch.manual_seed(0)
                    model = nn.Sequential(OrderedDict(one=put_on(first()), two=nn.Tanh(), three=last())).eval()
                    check(f"{kind}, {name}: still of its class", isinstance(model.one, getattr(nn, kind)), 1, 1)
                    if without:
                        off(model.one)
                    what = f"{kind}, {name}{' taken off' if without else ''}, {'DoRA' if dora else 'LoRA'}, safe {safe}"
                    measure(what, model, given, ["one"], name != "none" and not without, dora, safe)

# the autoencoder of Stable Audio; the convolutions of width 1, to keep it small
for without in (False, True):
    torch.manual_seed(0)
    small = dict(encoder_hidden_size=8, decoder_channels=8, decoder_input_channels=4)
    model = AutoencoderOobleck(downsampling_ratios=[2, 4], channel_multiples=[1, 2], **small).eval()
    if without:
        for layer in model.modules():
            if hasattr(layer, "weight_g"):
                remove_weight_norm(layer)
    latents = torch.randn(1, 4, 64)
    what = f"Stable Audio's decoder{', norm taken off' if without else ''}"
    measure(what, model, latents, ["conv2"], not without, False, True, lambda one: one.decoder(latents))

LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": []})
given = LAYERS["Linear"][0]
for name in ("none", "old weight_norm", "new weight_norm"):
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[name][0](nn.Linear(24, 24))).eval()
    with torch.no_grad():
        plain = model(given)
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4, algo="lora")
        check(f"LyCORIS, {name}: layers", len(network.loras), *((0, 0) if name == "new weight_norm" else (1, 1)))
        if not network.loras:
            continue
        network.apply_to()
        for key, value in network.named_parameters():
            if "lora_up" in key:
                nn.init.normal_(value, std=0.1)
        goal = model(given)
        effect = (goal - plain).norm()
        check(f"LyCORIS, {name}: effect while running", (effect / plain.norm()).item(), 0.03, 5)
        network.restore()
        network.merge_to(1.0)
        if name == "none":
            check(f"LyCORIS, {name}: merged, off", ((model(given) - goal).norm() / effect).item(), 0, 1e-4)
        else:
            check(f"LyCORIS, {name}: merged, change of the outputs", (model(given) - plain).norm().item(), 0, 0)
PY
