"""Other extensions on the guard's ground in a running Forge Neo, re-created in neighbours/; a table in docs/neo.md.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/neighbours.py --keep FOLDER [--write-docs]

Neo's own ControlNet is asked with a small random ControlNet and a Control-LoRA, which this script makes. "At work" is an image in
which the neighbour does something, "at rest" the next one, with the same LoRA and without the neighbour.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.server import png_base64

from real_neo.everyday import HIRES, LORA, SD, everyday
from real_neo.neo import FORGE, GGUF_PARTS, parts
from real_neo.tables import Table, image_with, main

A = "a cat <lora:lg_sd15_a:1>"
# Neo remembers an encoded prompt by its tags: without a mark in them the text encoder's weights would be those of the image before.
WEIGHED = "a cat <lora:lg_sd15_a:1:lbw=1>"
DORA = "a cat <lora:lgk_sd15_dora_out:1>"
HINT = [(3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2), (256, 320, 1)]
"""Channels in, out, and stride of a ControlNet's picture encoder; every second module is an activation."""


def make_control():
    """A ControlNet and a Control-LoRA for the small SD1.5, made of its own U-Net."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = FORGE / "models" / "ControlNet"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(13)
    mark = "model.diffusion_model."
    own = load_file(str(FORGE / "models" / "Stable-diffusion" / f"{SD}.safetensors"))
    own = {key.removeprefix(mark): value.float() for key, value in own.items() if key.startswith(mark)}
    blocks = {key.split(".")[1] for key in own if key.startswith("input_blocks.")}

    def convolution(name, into, out, kernel, gain):
        spread = gain / math.sqrt(into * kernel**2)
        yield f"{name}.weight", torch.randn(out, into, kernel, kernel, generator=generator) * spread
        yield f"{name}.bias", torch.zeros(out)

    new = {}
    for place, (into, out, _) in enumerate(HINT):
        new.update(convolution(f"input_hint_block.{2 * place}", into, out, 3, 1.5))
    for place in sorted(blocks, key=int):
        new.update(convolution(f"zero_convs.{place}.0", 320, 320, 1, 0.3))
    new.update(convolution("middle_block_out.0", 320, 320, 1, 0.3))
    parts = ("time_embed.", "input_blocks.", "middle_block.")
    shared = {
        key: value + torch.randn(value.shape, generator=generator) * value.std() * 0.3 if value.dim() > 1 else value
        for key, value in own.items()
        if key.startswith(parts)
    }
    save_file(shared | new, str(folder / "lgn_control.safetensors"))
    # A Control-LoRA takes the U-Net's own weights, with its own on top.
    factors = {}
    for key, value in shared.items():
        if key.endswith(("to_q.weight", "to_v.weight")):
            name, (rows, columns) = key.removesuffix(".weight"), value.shape
            factors[f"{name}.up"] = torch.randn(rows, 4, generator=generator) * 0.3
            factors[f"{name}.down"] = torch.randn(4, columns, generator=generator) / columns**0.5
    save_file(factors | new | {"lora_controlnet": torch.zeros(1)}, str(folder / "lgn_control_lora.safetensors"))


def remove_control():
    for path in (FORGE / "models" / "ControlNet").glob("lgn_*"):
        path.unlink()


def asking(title, setting):
    return {"alwayson_scripts": {f"lg {title}": {"args": [json.dumps(setting)]}}}


def control(model):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 16:48] = 255
    unit = {"enabled": True, "image": png_base64(picture), "module": "None", "model": model, "weight": 1.0}
    options = {"control_net_no_detectmap": True}
    return {"alwayson_scripts": {"ControlNet": {"args": [unit]}}, "override_settings": options}


BLOCKS = {"input_blocks": 0.3, "middle": 2.0, "layers.1.": 0.0}
STEPS = {"file": str(LORA / "lg_sd15_b.safetensors"), "strengths": [0.0, 0.3, 1.5, 0.5]}
LAYER = {"layer": "diffusion_model.input_blocks.1.1.proj_in"}
NEIGHBOURS = {
    "weights of blocks (LoRA Mixer)": (WEIGHED, asking("block weight", BLOCKS)),
    "weights of blocks, two LoRAs": (
        f"{WEIGHED} <lora:lg_sd15_b:0.6>",
        asking("block weight", {"attn1": -0.5, "ff": 0.0}),
    ),
    "weights of blocks, hires fix": (WEIGHED, {**asking("block weight", BLOCKS), **HIRES}),
    "strengths by step (loractl)": (A, {**asking("strength per step", STEPS), "steps": 4}),
    "frozen patcher (LayerDiffuse)": (A, asking("frozen patcher", {"strength": 0.8})),
    # The guard's come on top of what others add, which a DoRA's norms are of; Neo goes by the order of adding.
    "frozen patcher, a DoRA on top of it": (DORA, asking("frozen patcher", {"strength": 0.8, "first": True})),
    "a clone for every pass (FreeU)": (A, asking("clones", {"clones": 2})),
    "two clones in turns (Fooocus inpaint)": (A, {**asking("clones", {"turns": True}), "steps": 4}),
    "ControlNet": (A, control("lgn_control")),
    "ControlNet, hires fix": (A, {**control("lgn_control"), **HIRES}),
    "Control-LoRA": (A, control("lgn_control_lora")),
    "Control-LoRA, a difference": ("a cat <lora:lgk_sd15_full:1>", control("lgn_control_lora")),
    # Neo's merges do not outlive it: what stands after it is of no use for Neo's own column.
    "object patch": (A, asking("object patch", LAYER)),
    "object patch, hires fix": (A, {**asking("object patch", LAYER), **HIRES}),
}


def neighbours(neo, side):
    yield ("-", "without"), image_with(neo, SD, prompt="a cat")
    for name, (prompt, more) in NEIGHBOURS.items():
        plain = {key: value for key, value in more.items() if key != "alwayson_scripts"}
        yield (name, "at work"), image_with(neo, SD, prompt=prompt, **more)
        yield (name, "at rest"), image_with(neo, SD, prompt=prompt.replace(":lbw=1", ""), **plain)
    yield ("-", "removed"), image_with(neo, SD, prompt="a cat")


LOW_BITS = {
    "GGUF Q4_0": ("nf_q4_0.gguf", GGUF_PARTS),
    "nvfp4": ("nf_nvfp4.safetensors", []),
    "int8, rotated": ("nf_int8_rotated.safetensors", []),
}
FLUX = "a cat <lora:nf_lora:4>"
ON_LOW_BITS = {
    "weights of blocks": (
        FLUX.replace(":4", ":4:lbw=1"),
        asking("block weight", {"qkv": -0.5, "single": 1.5, "mod": 0.0}),
    ),
    "strengths by step": (
        FLUX,
        {
            **asking("strength per step", {"file": str(LORA / "nf_lora.safetensors"), "strengths": [0.0, 2, 6, -4]}),
            "steps": 4,
        },
    ),
    "patches for one pass, on the fly": (FLUX, asking("frozen patcher", {"strength": 0.8, "online": True})),
    "another LoRA inside a detailer": (FLUX, everyday("a face <lora:nf_lora:-3>")),
    "interrupted": (FLUX, {**everyday("", "interrupt", 2), "steps": 6}),
}


def on_low_bits(neo, side):
    for storage, (model, modules) in LOW_BITS.items():
        settings = {"modules": parts(modules), "cfg_scale": 1}
        for name, (prompt, more) in ON_LOW_BITS.items():
            row = f"{storage}: {name}"
            plain = {key: value for key, value in more.items() if key != "alwayson_scripts"}
            yield (row, "without"), image_with(neo, model, prompt="a cat", **settings)
            yield (row, "at work"), image_with(neo, model, prompt=prompt, **settings, **more)
            rest = prompt.replace(":lbw=1", "")
            yield (row, "at rest"), image_with(neo, model, prompt=rest, **settings, **plain)
            yield (row, "removed"), image_with(neo, model, prompt="a cat", **settings)


DIFFER = ("at work", "at rest")
TABLES = {
    "neighbours": Table(neighbours, "neighbour", differ=DIFFER),
    "neighbours on low bits": Table(on_low_bits, "storage: neighbour", differ=DIFFER, fp16_lora=True),
}

if __name__ == "__main__":
    sys.exit(main(TABLES, __doc__, make_control, remove_control))
