"""Pictures of a running Forge Neo with LoRAs: storages, kinds, broken files, and what people do around a LoRA.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/everyday.py [--only SIDE] [--tables storages,kinds,...]

Four servers one after the other: Neo with the guard off, in its setting "Automatic" and in "(fp16 LoRA)", with the guard, and a
test-only one that merges in fp64 into fp32 weights (extension/). Each cell is the largest and the mean difference from the last in
grey levels. Pictures are of tiny random models: what is compared is arithmetic, not beauty.
"""

import argparse
import functools
import json
import pickle
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import difference, markdown, show
from real_forge.server import png_base64

from real_neo.neo import FORGE, GGUF_PARTS, attempt, link_extensions, parts, running, unlink_extensions

LORA = FORGE / "models" / "Lora"
SD, SECOND = "rand_sd15_tiny", "zz_second_sd15"
A, C = "<lora:lg_sd15_a:1>", "<lora:lg_sd15_b:1>"
# A change of "Diffusion in Low Bits" counts at the next load of a checkpoint, so no two rows of one checkpoint are neighbours.
STORAGES = {
    "SD1.5 fp16": (SD, [], "lg_sd15_a", "Automatic"),
    "Flux bf16": ("nf_bf16", [], "nf_lora", "Automatic"),
    "SD1.5 float8-e4m3fn": (SD, [], "lg_sd15_a", "float8-e4m3fn"),
    "Flux plain fp8": ("nf_fp8", [], "nf_lora", "Automatic"),
    "Flux scaled fp8": ("nf_scaledfp8", [], "nf_lora", "Automatic"),
    "Flux nvfp4": ("nf_nvfp4", [], "nf_lora", "Automatic"),
    "Flux mxfp8": ("nf_mxfp8", [], "nf_lora", "Automatic"),
    "Flux int8": ("nf_int8_tensorwise", [], "nf_lora", "Automatic"),
    "Flux GGUF Q8_0": ("nf_q8_0", GGUF_PARTS, "nf_lora", "Automatic"),
    "Flux GGUF Q4_0": ("nf_q4_0", GGUF_PARTS, "nf_lora", "Automatic"),
    "Flux GGUF Q4_K": ("nf_q4_k", GGUF_PARTS, "nf_lora", "Automatic"),
}
STRONG, WEAK = 4, 0.2
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
INT8_LEVELS = 3
"""Neo's own int8 product is that far from one of decoded weights, with LoRAs or without."""


def storages(neo, side):
    for name, (checkpoint, modules, lora, low_bits) in STORAGES.items():
        options = {"forge_unet_storage_dtype": neo.low_bits.replace("Automatic", low_bits)}
        settings = {"modules": parts(modules), "cfg_scale": 7 if checkpoint == SD else 1, "override_settings": options}
        strong, weak = (1, 0.1) if checkpoint == SD else (STRONG, WEAK)
        prompts = {
            "without": "a cat",
            "strong": f"a cat <lora:{lora}:{strong}>",
            "weak": f"a cat <lora:{lora}:{weak}>",
            "removed": "a cat",
        }
        for case, prompt in prompts.items():
            yield (name, case), functools.partial(neo.image, checkpoint, prompt=prompt, **settings)
    plain = {"override_settings": {"forge_unet_storage_dtype": neo.low_bits}}
    yield ("back to SD1.5", "without"), functools.partial(neo.image, SD, prompt="a cat", **plain)


def kinds(neo, side):
    yield ("-", "without"), functools.partial(neo.image, SD, prompt="a cat")
    for kind in KINDS + OTHER_KINDS:
        name = f"lgk_sd15_{kind}".replace(" ", "_")
        if kind in OTHER_KINDS and side == "reference":
            name += f"_as_diff_{SD}"
        for strength in (1, 0.5) if kind not in OTHER_KINDS else (1,):
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
    start = {"init_images": [png_base64(plain[0])], "denoising_strength": 0.7, "endpoint": "img2img"}
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 255
    one = f"a cat {A}"
    shots = {
        "without": {"prompt": "a cat"},
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
        "after another checkpoint": {"prompt": one, "model": "nf_bf16", "cfg_scale": 1},
        "and back": {"prompt": one, "model": SD},
    }
    for name, settings in shots.items():
        settings = {"model": SD, **settings}
        options = {"refiner_fast_sd": False, **settings.pop("override_settings", {})}
        yield (name, ""), functools.partial(neo.image, settings.pop("model"), override_settings=options, **settings)
    yield ("and none", "removed"), functools.partial(image, prompt="a cat")


def saved(neo, side):
    """A checkpoint saved while it carries a LoRA has it in its weights."""
    folder = FORGE / "models" / "Stable-diffusion"
    for name, (checkpoint, lora, cfg) in {
        "SD1.5 fp16": (SD, "lg_sd15_a:1", 7),
        "Flux bf16": ("nf_bf16", f"nf_lora:{STRONG}", 1),
        "Flux plain fp8": ("nf_fp8", f"nf_lora:{STRONG}", 1),
    }.items():
        image = functools.partial(neo.image, prompt="a cat", cfg_scale=cfg)
        stem = f"lgn_saved_{side}_{checkpoint}"

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


TABLES = {"storages": storages, "kinds": kinds, "files": files, "paths": paths, "saved": saved}
SIDES = {
    "reference": ("reference", "Automatic"),
    "guard": ("guard", "Automatic"),
    "stock": ("stock", "Automatic"),
    "stock, (fp16 LoRA)": ("stock", "Automatic (fp16 LoRA)"),
}


def images_of(label, tables):
    """`{(table, row, case): image or error}` of one server."""
    side, low_bits = SIDES[label]
    images = {}
    with running(side, low_bits) as neo:
        neo.low_bits = low_bits
        for table in tables:
            for key, make in TABLES[table](neo, side):
                images[(table, *key)] = attempt(make)
        console = neo.console()
    return images, console


def kept(folder, label, tables):
    """The pictures of one side, from the folder if they are there: table by table."""
    if label.startswith("stock,"):
        tables = [table for table in tables if table == "storages"]
    if folder is None:
        return images_of(label, tables)
    folder.mkdir(parents=True, exist_ok=True)
    files = {table: folder / f"{label}-{table}.pickle" for table in tables}
    missing = [table for table in tables if not files[table].exists()]
    if missing:
        images, console = images_of(label, missing)
        for table in missing:
            part = {key: image for key, image in images.items() if key[0] == table}
            files[table].write_bytes(pickle.dumps((part, console)))
    found = [pickle.loads(files[table].read_bytes()) for table in tables]
    return {k: v for images, _ in found for k, v in images.items()}, "".join(console for _, console in found)


def compare(results):
    rows, wrong = [], []
    guard, reference = results["guard"][0], results["reference"][0]
    bases = {}
    for key, image in guard.items():
        table, row, case = key
        truth = reference[key]
        if case in ("without", "removed") or row == "without":
            bases[table] = truth
        base = bases.get(table)
        effect = None if base is None or base.shape != getattr(truth, "shape", None) else difference(truth, base)
        ours = difference(image, truth)
        others = [
            show(difference(images[key], truth)) if key in images else ""
            for name, (images, _) in results.items()
            if name.startswith("stock")
        ]
        rows.append([table, row, case, show(effect) if effect else "", show(ours), *others])
        limit = INT8_LEVELS if "int8" in str(row) else 1
        if ours is None or ours[0] > limit:
            wrong.append(f"{table}, {row}, {case}: {show(ours)} off: {image if isinstance(image, str) else ''}"[:300])
        if case == "removed" and (table, row, "without") in guard:
            first = guard[table, row, "without"]
            if difference(image, first) != (0, 0.0):
                wrong.append(f"{table}, {row}: removed, the picture is not the first one")
    faults = [line for line in results["guard"][1].splitlines() if "Traceback" in line]
    # Neo's start writes one when its folder has no remote.
    if len(faults) > sum("Traceback" in line for line in results["stock"][1].splitlines()):
        wrong.append(f"{len(faults)} tracebacks in the console")
    return rows, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIDES)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--keep", type=Path, help="folder in which each side's pictures stay, for another run")
    options = parser.parse_args()
    tables = options.tables.split(",")
    make_second()
    link_extensions()
    try:
        if options.only:
            images, console = images_of(options.only, tables)
            print("\n".join(line for line in console.splitlines() if "LoRA Guard" in line))
            shown = {str(k): i if isinstance(i, str) else round(float(i.mean()), 3) for k, i in images.items()}
            print(json.dumps(shown, indent=1))
            return 0
        results = {label: kept(options.keep, label, tables) for label in SIDES}
    finally:
        unlink_extensions()
        for path in LORA.glob("lgn_*"):
            path.unlink()
    rows, wrong = compare(results)
    print(markdown(["table", "what", "case", "effect", "guard", "stock", "stock (fp16 LoRA)"], rows))
    print("\n".join(wrong) or "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
