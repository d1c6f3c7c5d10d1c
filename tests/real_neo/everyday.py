"""Pictures of a running Forge Neo with LoRAs: kinds, broken files, and what people do around a LoRA; tables in docs/neo.md.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/everyday.py --keep FOLDER [--tables NAME,...] [--write-docs]

Pictures are of tiny random models: what is compared is arithmetic, not beauty.
"""

import functools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.server import png_base64

from real_neo.neo import FORGE
from real_neo.tables import Table, main

LORA = FORGE / "models" / "Lora"
SD, SECOND = "rand_sd15_tiny", "zz_second_sd15"
A, C = "<lora:lg_sd15_a:1>", "<lora:lg_sd15_b:1>"
FLUX_STRENGTH = 4
KINDS = ["locon", "tucker", "loha", "loha r16", "loha tucker", "lokr", "lokr factored", "glora", "full", "dora out", "dora in", "dora loha", "dora lokr"]  # fmt: skip
OTHER_KINDS = ["oft", "oft bounded", "boft", "ia3 out", "ia3 in", "rslora"]
HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "hr_second_pass_steps": 2,
    "denoising_strength": 0.6,
    "hr_upscaler": "None",
    "hr_additional_modules": ["Use same choices"],
}


def kinds(neo, side):
    yield ("-", "without"), functools.partial(neo.image, SD, prompt="a cat")
    for kind in KINDS + OTHER_KINDS:
        name = f"lgk_sd15_{kind}".replace(" ", "_")
        if kind in OTHER_KINDS and side == "reference":
            name += f"_as_diff_{SD}"
        for strength in (1,) if kind == "boft" else (1, 0.5):
            yield (kind, strength), functools.partial(neo.image, SD, prompt=f"a cat <lora:{name}:{strength}>")


def written(name, make):
    """A file in Neo's folder of LoRAs, made from the good one."""
    from safetensors.torch import load_file

    path = LORA / f"lgn_{name}.safetensors"
    make(path, load_file(str(LORA / "lg_sd15_a.safetensors")))
    return path.stem


def _changed(change):
    def make(path, tensors):
        from safetensors.torch import save_file

        module = next(k for k in tensors if k.startswith("lora_unet") and k.endswith("lora_up.weight"))
        change(tensors, module.removesuffix(".lora_up.weight"))
        save_file(tensors, str(path))

    return make


def _wrong_width(tensors, module):
    down = tensors[f"{module}.lora_down.weight"]
    tensors[f"{module}.lora_down.weight"] = down.new_ones(down.shape[0], down.shape[1] + 16, *down.shape[2:])


def _rows(count):
    def change(tensors, module):
        up = tensors[f"{module}.lora_up.weight"]
        tensors[f"{module}.lora_up.weight"] = up.new_ones(count, *up.shape[1:]) * 0.1

    return change


def _nan(tensors, module):
    tensors[f"{module}.lora_up.weight"].view(-1)[3] = float("nan")


def _lonely(tensors, module):
    for key in [k for k in tensors if k.endswith("lora_down.weight")]:
        del tensors[key]


# What it does to the file, and whether the rest of it is to be applied.
BROKEN = {
    "one layer of another width": (_changed(_wrong_width), True),
    "fewer rows than the layer": (_changed(_rows(160)), True),
    "more rows than the layer": (_changed(_rows(3000)), True),
    "not a number": (_changed(_nan), False),
    "up without down": (_changed(_lonely), False),
    "cut off": (lambda path, _: path.write_bytes((LORA / "lg_sd15_a.safetensors").read_bytes()[:5000]), False),
    "a web page": (lambda path, _: path.write_text("<html>not found</html>"), False),
    "empty": (lambda path, _: path.write_bytes(b"\x02\0\0\0\0\0\0\0{}"), False),
}


def files(neo, side):
    """Broken files between two good ones. The reference makes them without the broken one, or without its one layer."""
    from safetensors.torch import load_file, save_file

    image = functools.partial(neo.image, SD)
    yield ("-", "without"), functools.partial(image, prompt="a cat")
    for name, (make, is_partly_good) in BROKEN.items():
        stem = written(name.replace(" ", "_"), make)
        rest = f"a cat {A} {C}"
        if side == "reference" and is_partly_good:
            tensors = load_file(str(LORA / "lg_sd15_a.safetensors"))
            module = next(k for k in tensors if k.startswith("lora_unet") and k.endswith("lora_up.weight"))
            save_file(
                {k: v for k, v in tensors.items() if not k.startswith(module.split(".")[0] + ".")},
                str(LORA / "lgn_rest.safetensors"),
            )
            rest = f"a cat {A} <lora:lgn_rest:1> {C}"
        prompt = rest if side == "reference" else f"a cat {A} <lora:{stem}:1> {C}"
        yield (name, "between A and C"), functools.partial(image, prompt=prompt)
    missing = f"a cat {A} {C}" if side == "reference" else f"a cat {A} <lora:no_such_lora:1> {C}"
    yield ("a name that is not there", "between A and C"), functools.partial(image, prompt=missing)
    gone = written("gone", _changed(lambda tensors, module: None))
    yield ("deleted after it was used", "before"), functools.partial(image, prompt=f"a cat <lora:{gone}:1>")

    def deleted():
        (LORA / f"{gone}.safetensors").unlink()
        return image(prompt=f"a cat {A} {C}" if side == "reference" else f"a cat {A} <lora:{gone}:1> {C}")

    yield ("deleted after it was used", "between A and C"), deleted
    again = written("again", _changed(lambda tensors, module: None))
    yield ("trained again under its name", "before"), functools.partial(image, prompt=f"a cat <lora:{again}:1>")

    def trained_again():
        target = LORA / f"{again}.safetensors"
        # Put in its place: a mapped file that is written over would end stock's process.
        save_file(load_file(str(LORA / "lg_sd15_b.safetensors")), str(target.with_suffix(".part")))
        target.with_suffix(".part").replace(target)
        return image(prompt="a cat <lora:lg_sd15_b:1>" if side == "reference" else f"a cat <lora:{again}:1>")

    yield ("trained again under its name", "after"), trained_again
    yield ("-", "removed"), functools.partial(image, prompt="a cat")


def everyday(detail, stop="", step=0):
    """What the test extension of tests/real_forge does in an image."""
    return {"alwayson_scripts": {"lora guard everyday": {"args": [detail, stop, step]}}}


def refiner(neo, fast):
    return {
        "refiner_checkpoint": neo.checkpoint(SECOND),
        "refiner_switch_at": 0.5,
        "override_settings": {"refiner_fast_sd": fast},
    }


def make_second():
    """A checkpoint like the first one, of other values."""
    import torch
    from safetensors.torch import load_file, save_file

    folder, generator = FORGE / "models" / "Stable-diffusion", torch.Generator().manual_seed(11)
    target = folder / f"{SECOND}.safetensors"
    if target.exists():
        return
    tensors = load_file(str(folder / f"{SD}.safetensors"))
    for key, value in tensors.items():
        if key.startswith("model.diffusion_model.") and value.is_floating_point() and value.dim() > 1:
            noise = torch.randn(value.shape, generator=generator) * value.float().std() * 0.3
            tensors[key] = (value.float() + noise).to(value.dtype)
    save_file(tensors, str(target))


def paths(neo, side):
    """What people do around a LoRA."""
    image = functools.partial(neo.image, SD)
    plain = image(prompt="a cat")
    yield ("-", "without"), lambda: plain
    start = {"init_images": [png_base64(plain[0])], "denoising_strength": 0.7, "endpoint": "img2img"}
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 255
    one = f"a cat {A}"
    shots = {
        "strength 0.5": {"prompt": "a cat <lora:lg_sd15_a:0.5>"},
        "two": {"prompt": "a cat <lora:lg_sd15_a:0.7> <lora:lg_sd15_b:-0.6>"},
        "other strength for the text encoder": {"prompt": "a cat <lora:lg_sd15_a:0.4:1>"},
        "text encoder alone": {"prompt": "a cat <lora:lg_sd15_text:1>"},
        "norms alone": {"prompt": "a cat <lora:lg_sd15_norm:1>"},
        "the same twice in a prompt": {"prompt": "a cat <lora:lg_sd15_a:0.5> <lora:lg_sd15_a:0.5>"},
        "hires fix": dict(prompt=one, **HIRES),
        "hires fix, another LoRA in it": dict(prompt=one, hr_prompt=f"a cat {C}", **HIRES),
        "hires fix, LoRA in it alone": dict(prompt="a cat", hr_prompt=one, **HIRES),
        "batch of 2 x 2": {"prompt": one, "n_iter": 2, "batch_size": 2},
        "img2img": dict(prompt=one, **start),
        "inpaint": dict(prompt=one, mask=png_base64(half), **start),
        "prompt editing": {"prompt": f"a [cat:dog:0.5] {A}", "steps": 4},
        "AND": {"prompt": f"a cat AND a dog :0.7 {A}"},
        "another LoRA inside a detailer": {"prompt": one, **everyday(f"a face {C}")},
        "the same inside": {"prompt": one, **everyday(f"a face {A}")},
        "outside only": {"prompt": one, **everyday("a face")},
        "interrupted": {"prompt": one, "steps": 8, **everyday("", "interrupt", 2)},
        "after that": {"prompt": f"a cat {C}"},
        "a schedule that stays at 0.5": {
            "prompt": f"a cat <lora:lg_sd15_a:{'0.5@0,0.5@1' if side == 'guard' else 0.5}>"
        },
        "refiner": {"prompt": one, "steps": 4, **refiner(neo, fast=False)},
        "refiner, read into the same model": {"prompt": one, "steps": 4, **refiner(neo, fast=side != "reference")},
        "after that, again": {"prompt": one, "override_settings": {"refiner_fast_sd": False}},
        "patches of another extension": {"prompt": one, "alwayson_scripts": {"lora guard neo": {"args": ["merged"]}}},
        "the same on the fly": {"prompt": one, "alwayson_scripts": {"lora guard neo": {"args": ["on the fly"]}}},
        "after another checkpoint": {"prompt": one, "model": "nf_bf16.safetensors", "cfg_scale": 1},
        "and back": {"prompt": one, "model": SD},
    }
    for name, settings in shots.items():
        settings = {"model": SD, **settings}
        options = {"refiner_fast_sd": False, **settings.pop("override_settings", {})}
        yield (name, ""), functools.partial(neo.image, settings.pop("model"), override_settings=options, **settings)
    yield ("-", "removed"), functools.partial(image, prompt="a cat")


def saved(neo, side):
    """A checkpoint saved while it carries a LoRA has it in its weights."""
    folder = FORGE / "models" / "Stable-diffusion"
    for name, (checkpoint, lora, cfg) in {
        "SD1.5 fp16": (SD, "lg_sd15_a:1", 7),
        "Flux bf16": ("nf_bf16.safetensors", f"nf_lora:{FLUX_STRENGTH}", 1),
        "Flux plain fp8": ("nf_fp8.safetensors", f"nf_lora:{FLUX_STRENGTH}", 1),
    }.items():
        image = functools.partial(neo.image, prompt="a cat", cfg_scale=cfg)
        stem = f"lgn_saved_{side}_{name.split()[-1]}"

        def read(image=image, checkpoint=checkpoint, stem=stem, lora=lora):
            try:
                image(checkpoint, prompt=f"a cat <lora:{lora}>")
                neo.call("/lora-guard-test/save", {"name": stem, "function": "save_checkpoint"})
                return image(stem)
            finally:
                (folder / f"{stem}.safetensors").unlink(missing_ok=True)

        yield (name, "without"), functools.partial(image, checkpoint)
        yield (name, "saved with it and read"), read
        yield (name, "removed"), functools.partial(image, checkpoint)


TABLES = {
    "kinds": Table(kinds, "kind"),
    "files": Table(files, "file"),
    "paths": Table(paths, "what is done"),
    "saved": Table(saved, "checkpoint"),
}


def remove_made():
    for path in LORA.glob("lgn_*"):
        path.unlink()


if __name__ == "__main__":
    sys.exit(main(TABLES, __doc__, make_second, remove_made))
