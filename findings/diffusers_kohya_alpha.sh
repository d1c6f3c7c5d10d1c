#!/usr/bin/env bash
# Guess:    convert_state_dict_to_kohya() writes a file for other programs that is as strong as the adapter it came
#           from, and that diffusers reads back.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
#           diffusers==0.42.1, any build of torch, on a CPU
# Seen:     It writes alpha = rank, whatever lora_alpha was: r=4 with lora_alpha=16 comes back at a quarter, in
#           diffusers too. A DoRA keeps its magnitudes under dotted names beside flattened factors; diffusers refuses
#           the file it has written.
# Matters:  The state dict that is converted has no alpha, so the function cannot know it; but the file then states one.
#           Such a LoRA is too weak or too strong by lora_alpha / rank in every program.
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
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def weight(model):
    return model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.detach().clone()


def written(dora):
    model = unet()
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"], use_dora=dora, init_lora_weights=False)
    model.add_adapter(config)
    tensors = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}
    tensors = convert_state_dict_to_kohya(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "kohya.safetensors")
    return model, tensors


before = weight(unet())
model, tensors = written(dora=False)
print("alphas in the file:", {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")})
model.fuse_lora()
own = weight(model) - before
again = unet()
state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict("kohya.safetensors")
StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, again)
again.fuse_lora()
change = weight(again) - before
check("read back, in the adapter's own change", ((change * own).sum() / own.square().sum()).item(), 0.2499, 0.2501)

_, tensors = written(dora=True)
magnitude = next(name for name in tensors if "magnitude" in name)
down = next(name for name in tensors if "lora_down" in name)
print("of one module:", down, magnitude, sep="\n  ")
flat, dotted = ({n.split(".")[0] for n in tensors if field in n} for field in ("lora_down", "magnitude"))
check("modules of the file that have both", len(flat & dotted), 0, 0)
try:
    StableDiffusionLoraLoaderMixin.lora_state_dict("kohya.safetensors")
except ValueError as error:
    print("diffusers:", str(error)[:70].strip())
else:
    raise SystemExit("CHANGED: diffusers reads its DoRA")
PY
