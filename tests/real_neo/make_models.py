"""Tiny random models of every kind that Forge Neo loads, a LoRA for each, and the same models with the LoRA in their weights.

    FORGE_ROOT=... $FORGE_PYTHON tests/real_neo/make_models.py [NAME ...]

`tiny.py` has their sizes. A checkpoint holds denoiser, text encoders and VAE under the names of the authors' files; weights are
random, bf16. `lgm_NAME_reference` and `lgm_NAME_text_reference` have the difference of the LoRA added in fp64, in fp32 tensors.
"""

import importlib
import math
import os
import re
import sys
import zlib
from pathlib import Path

FORGE = os.environ["FORGE_ROOT"]
NAMES = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [FORGE, f"{FORGE}/modules_forge/packages", str(Path(__file__).resolve().parent.parent)]
os.chdir(FORGE)

import torch  # noqa: E402  # Neo's modules are found by the lines above
from safetensors.torch import save_file  # noqa: E402

from real_neo import tiny  # noqa: E402

RANK = 4
TEXT_SHARE = 0.8
"""What a LoRA adds to a text encoder, as a share of each weight."""
PREFIX = "model.diffusion_model."
BLOCKS = re.compile(r"^(\w*blocks|layers|\w*refiner|txtfusion\.\w+_blocks)\.\d+\..*weight$")


def random_weight(key, shape, gain, generator):
    if "num_batches" in key:
        return torch.zeros(shape, dtype=torch.long)
    if key.endswith(("bias", "running_mean", "llm_adapter.in_proj")):
        return torch.zeros(shape)
    if len(shape) <= 1:
        return torch.ones(shape)
    if key == "llm_adapter.embed.weight":
        spread = 0.05  # Anima's own embedding of the prompt must not drown its language model's.
    elif "embed" in key and max(shape) > 10000:
        spread = 1.0
    else:
        spread = gain / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=generator) * spread


def state_of(name, make, gain, generator):
    from backend.operations import using_forge_operations

    with torch.device("meta"), using_forge_operations(device=torch.device("meta"), dtype=torch.float32):
        module = make()
    state = {k: random_weight(k, tuple(v.shape), gain, generator) for k, v in module.state_dict().items()}
    print(f"  {name}: {len(state)} tensors, {sum(v.numel() for v in state.values()) / 1e6:.1f} M")
    return state


def encoder(cls, folder):
    if cls == "CLIP":
        from backend.nn.clip import IntegratedCLIP
        from transformers import CLIPTextConfig, CLIPTextModel

        return IntegratedCLIP(CLIPTextModel, CLIPTextConfig.from_pretrained(folder), add_text_projection=True)
    from backend.utils import read_arbitrary_config

    if cls == "T5":
        from backend.nn.t5 import IntegratedT5

        return IntegratedT5(read_arbitrary_config(folder))
    from backend.nn.llm import llama

    return getattr(llama, cls)({})


def vae(model, folder):
    from backend.nn.vae import AutoencoderKLFlux2, IntegratedAutoencoderKL
    from backend.nn.wan_vae import WanVAE

    if model.vae is tiny.WAN_VAE:
        cls = WanVAE
    else:
        cls = AutoencoderKLFlux2 if model.guess in ("Flux2K4B", "ErnieImage") else IntegratedAutoencoderKL
    return cls.from_config(cls.load_config(folder))


# Each gives (name of the LoRA's module, rows of the layer that it is for or None) of a layer.


def unet_modules(path, rows):
    path = re.sub(r"^middle_block\.1", "mid_block.attentions.0", path)
    path = re.sub(
        r"^input_blocks\.(\d+)\.1",
        lambda m: f"down_blocks.{(int(m[1]) - 1) // 3}.attentions.{(int(m[1]) - 1) % 3}",
        path,
    )
    path = re.sub(r"^output_blocks\.(\d+)\.1", lambda m: f"up_blocks.{int(m[1]) // 3}.attentions.{int(m[1]) % 3}", path)
    yield path, None


def thirds(rows, names):
    for index, name in enumerate(names):
        yield name, (index * rows // 3, (index + 1) * rows // 3)


FLUX = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}


def flux_modules(path, rows):
    kind, number, rest = path.split(".", 2)
    block = f"{'single_' if kind == 'single_blocks' else ''}transformer_blocks.{number}."
    if rest.endswith("attn.qkv"):
        part = "to_{}" if rest.startswith("img") else "add_{}_proj"
        yield from thirds(rows, [f"{block}attn.{part.format(one)}" for one in "qkv"])
    elif rest == "linear1":
        width = rows // 7
        yield from thirds(3 * width, [f"{block}attn.to_{one}" for one in "qkv"])
        yield f"{block}proj_mlp", (3 * width, rows)
    else:
        yield block + FLUX[rest], None


def z_image_modules(path, rows):
    if path.endswith("attention.qkv"):
        yield from thirds(rows, [path.replace("qkv", f"to_{one}") for one in "qkv"])
    else:
        yield path.replace("attention.out", "attention.to_out.0"), None


def own_modules(path, rows):
    yield path, None


NAMED = {
    "kohya, U-Net": ("lora_unet_", unet_modules),
    "kohya": ("lora_unet_", own_modules),
    "diffusers, Flux": ("transformer.", flux_modules),
    "ai-toolkit": ("diffusion_model.", own_modules),
    "ai-toolkit, Z-Image": ("diffusion_model.", z_image_modules),
}


def lora_for(layers, prefix, modules, share, generator):
    """A LoRA in one spelling, and the layers with its difference.

    Args:
        layers: `{(path, key in the checkpoint): weight}`.
    """
    tensors, changed = {}, {}
    for (path, key), weight in layers.items():
        whole = weight.double().clone()
        for name, rows in modules(path, weight.shape[0]):
            part = whole if rows is None else whole[rows[0] : rows[1]]
            flat = part.reshape(part.shape[0], -1)
            down = torch.randn(RANK, flat.shape[1], generator=generator) / math.sqrt(flat.shape[1])
            spread = share * float(flat.std()) * math.sqrt(flat.shape[1] / RANK)
            is_kohya = prefix.startswith("lora_")
            scale = 0.5 if is_kohya else 1.0
            up = torch.randn(flat.shape[0], RANK, generator=generator) * spread / scale
            down, up = down.bfloat16(), up.bfloat16()
            part += (scale * up.double() @ down.double()).reshape(part.shape)
            if weight.dim() == 4:
                down, up = down[:, :, None, None], up[:, :, None, None]
            module = prefix + (name.replace(".", "_") if is_kohya else name)
            first, second = ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B")
            tensors |= {f"{module}.{first}.weight": down, f"{module}.{second}.weight": up}
            if is_kohya:
                tensors[f"{module}.alpha"] = torch.tensor(RANK * scale)
        changed[key] = whole.float()
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, changed


def text_modules(path, rows):
    """As sd-scripts names them: a CLIP from `text_model`, a language model from its own `layers`."""
    yield re.sub(r"^(transformer|model)\.", "", path), None


def is_target(model, key, weight):
    if not key.endswith(".weight") or weight.dim() not in (2, 4) or (weight.dim() == 4 and weight.shape[-1] != 1):
        return False
    if model.network[0] == "unet":
        return any(word in key for word in (".transformer_blocks.", ".proj_in.", ".proj_out."))
    return bool(BLOCKS.match(key))


def make(name):
    print(name)
    model, generator = tiny.MODELS[name], torch.Generator().manual_seed(zlib.crc32(name.encode()))
    folder = tiny.small_configs(model)
    module, cls = model.network
    network = getattr(importlib.import_module(f"backend.nn.{module}"), cls)
    state = state_of("denoiser", lambda: network(**model.sizes), 0.7, generator)
    every = {PREFIX + key: value for key, value in state.items()}
    texts = {}
    for place, (kind, prefix) in model.encoders.items():
        part = state_of(place, lambda kind=kind, place=place: encoder(kind, folder / place), 0.7, generator)
        texts[place] = {(key.removesuffix(".weight"), prefix + key): value for key, value in part.items()}
        every |= {prefix + key: value for key, value in part.items()}
    if name == "anima":
        # In the file the adapter is the denoiser's.
        mark = model.encoders["text_encoder"][1] + "llm_adapter."
        every = {k.replace(mark, PREFIX + "llm_adapter."): v for k, v in every.items()}
    picture = state_of("VAE", lambda: vae(model, folder / "vae"), 1.0, generator)
    mark = "first_stage_model." if module == "unet" else "vae."
    every |= {mark + key: value for key, value in picture.items()}
    every = {k: v.bfloat16().contiguous() if v.is_floating_point() else v for k, v in every.items()}
    every[tiny.MARKER] = torch.tensor(list(name.encode()), dtype=torch.uint8)

    target, loras = Path(FORGE) / "models" / "Stable-diffusion", Path(FORGE) / "models" / "Lora"
    save_file(every, target / f"lgm_{name}.safetensors")
    layers = {
        (key.removesuffix(".weight"), PREFIX + key): every[PREFIX + key]
        for key, weight in state.items()
        if is_target(model, key, weight)
    }
    tensors, changed = lora_for(layers, *NAMED[model.spelling], model.share, generator)
    save_file(tensors, loras / f"lgm_{name}.safetensors")
    save_file(every | changed, target / f"lgm_{name}_reference.safetensors")
    print(f"  LoRA: {len(layers)} layers")
    if not model.text_spelling:
        return
    tensors, changed = {}, {}
    for place, prefix in model.text_spelling.items():
        layers = {
            path_key: every[path_key[1]]
            for path_key, weight in texts[place].items()
            if re.search(r"\blayers\.\d+\.", path_key[0]) and weight.dim() == 2
        }
        more, new = lora_for(layers, prefix, text_modules, TEXT_SHARE, generator)
        tensors, changed = tensors | more, changed | new
    save_file(tensors, loras / f"lgm_{name}_text.safetensors")
    save_file(every | changed, target / f"lgm_{name}_text_reference.safetensors")
    print(f"  LoRA of the text encoders: {len(changed)} layers")


if __name__ == "__main__":
    tiny.shrink()
    for one in NAMES or tiny.MODELS:
        make(one)
