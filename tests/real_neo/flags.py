"""What users start Neo with, and its torch.compile extension: pictures with LoRAs in a running Neo on the CPU.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/flags.py [--only streams,fp8,compiled]

- streams: `--cuda-stream 2 --pin-shared-memory`, with a CPU that plays a card with little room; hires fix and the refiner.
- fp8: `--fast-fp8` on a plain fp8 file. The products round the activations, so the pictures are held against the distance that the
  one without LoRAs has.
- compiled: each preset of the extension, with a stack that changes. Needs triton, or the extension hides.

A CPU has neither streams nor pinned memory: what it shows is what Neo plans with these flags.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import difference, markdown, show

from real_neo.everyday import HIRES, SD, make_second, refiner
from real_neo.neo import attempt, link_extensions, running, unlink_extensions

A, B, GLORA = "<lora:lg_sd15_a:1>", "<lora:lg_sd15_b:1>", "<lora:lgk_sd15_glora:1>"
FLUX, FLUX_B, FLUX_NORM = "<lora:lg_nf_a:1>", "<lora:lg_nf_b:1>", "<lora:lg_nf_norm:1>"
STACKS = {"without": "", "A": FLUX, "A, weak": "<lora:lg_nf_a:0.4>", "A and B": f"{FLUX} {FLUX_B}", "norms": FLUX_NORM}
PRESETS = ("guard_filter_fn", "dynamic", "max-autotune-no-cudagraphs")
COMPILER = "torch"
"""A part of the title of Neo's extension."""


def streams(neo, side, _):
    """`(what, picture)`, with less and less room for the model."""
    one = {"model": SD, "prompt": f"a cat {A}", "override_settings": {"refiner_fast_sd": False}}
    shots = [
        ("without", None, {"prompt": "a cat"}),
        ("A", 60, {}),
        ("A, a little less room", 58, {}),
        ("A, all of it", None, {}),
        ("B", 38, {"prompt": f"a cat {B}"}),
        ("GLoRA and A, on the fly", 60, {"prompt": f"a cat {GLORA} {A}"}),
        ("hires fix", 60, HIRES),
        ("refiner", 60, {"steps": 4, **refiner(neo, fast=False)}),
        ("refiner, read into the same model", 60, {"steps": 4, **refiner(neo, fast=side != "reference")}),
        ("A again", 60, {}),
        ("without again", 60, {"prompt": "a cat"}),
    ]
    for what, room, settings in shots:
        neo.room(None if side == "reference" else room)
        yield what, neo.image(**{**one, **settings})


def fp8(neo, side, _):
    for what, stack in [*STACKS.items(), ("without again", "")]:
        yield what, neo.image("nf_fp8", prompt=f"a cat {stack}", cfg_scale=1)


def compiled(neo, side, preset):
    settings = {"cfg_scale": 1, "steps": 2}
    if side != "reference":
        name = next(title for title in neo.call("/sdapi/v1/scripts")["txt2img"] if COMPILER in title)
        settings["alwayson_scripts"] = {name: {"args": [preset]}}
    for what, stack in [*STACKS.items(), ("B alone", FLUX_B), ("without again", "")]:
        yield what, neo.image("nf_bf16", prompt=f"a cat {stack}", **settings)


CASES = {
    "streams": (streams, ["--cuda-stream", "2", "--pin-shared-memory"], {}, [""]),
    "fp8": (fp8, ["--fast-fp8", "--fp8_e4m3fn-unet"], {"LORA_GUARD_FAST_FP8": "1"}, [""]),
    "compiled": (compiled, [], {}, PRESETS),
}


def images_of(name, side, variant):
    """`{what: picture or error}`, the console, and what was compiled."""
    make, flags, env, _ = CASES[name]
    if side == "reference":
        flags, env = [], {}
    with running(side, flags=flags, env=env) as neo:
        made, images = make(neo, side, variant), {}
        while True:
            step = attempt(lambda made=made: next(made, None))
            if step is None:
                break
            if isinstance(step, str):
                images["an error"] = step
                break
            images[step[0]] = step[1]
        return images, neo.console(), neo.call("/lora-guard-test/compiled")


def effect(image, base):
    """How far a picture is from the one without LoRAs; nothing where they are of different sizes."""
    return show(difference(image, base)) if image.shape == base.shape else ""


def faults(name, images, reference, console, counted):
    """Sentences; `images` are the guard's."""
    wrong = [f"{what}: {image}" for what, image in images.items() if isinstance(image, str)]
    off = {what: difference(image, reference.get(what)) for what, image in images.items() if not isinstance(image, str)}
    limit = 1 if name != "fp8" else 2 * off["without"][0]
    wrong += [f"{what}: {show(pair)} off" for what, pair in off.items() if pair is None or pair[0] > limit]
    if difference(images["without"], images.get("without again", "")) != (0, 0.0):
        wrong.append("without LoRAs again: another picture")
    if "Error during fp8_fast" in console:
        wrong.append(f"{console.count('Error during fp8_fast')} fp8 products failed")
    if name == "compiled" and not counted["graphs"]:
        wrong.append("nothing was compiled")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--stock", action="store_true", help="stock's distance too, with the same flags")
    options = parser.parse_args()
    make_second()
    link_extensions()
    wrong = []
    try:
        for name in options.only.split(","):
            reference = images_of(name, "reference", "")[0]
            for variant in CASES[name][3]:
                images, console, counted = images_of(name, "guard", variant)
                stock = images_of(name, "stock", variant)[0] if options.stock else {}
                rows = [
                    [
                        what,
                        effect(truth, reference["without"]),
                        show(difference(images.get(what, "not made"), truth)),
                        show(difference(stock.get(what, "not made"), truth)) if stock else "",
                    ]
                    for what, truth in reference.items()
                ]
                print(f"\n{name} {variant} {counted if name == 'compiled' else ''}\n")
                print(markdown(["what", "effect", "guard", "Neo"], rows), flush=True)
                wrong += [f"{name} {variant}: {what}" for what in faults(name, images, reference, console, counted)]
    finally:
        unlink_extensions()
    print("\n".join(wrong) or "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
