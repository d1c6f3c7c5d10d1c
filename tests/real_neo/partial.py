"""LoRAs on partly loaded models in a running Forge Neo, on a CPU that plays a card with little room.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/partial.py [--only SIDE]

Each line: the room in MB, and the picture's distance from the reference, as the largest and the mean difference in grey levels;
stock's beside it. Every sequence ends without LoRAs, and with the first picture bit for bit.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import difference, markdown, show

from real_neo.neo import GGUF_PARTS, SIDES, attempt, link_extensions, parts, running, unlink_extensions

FP16_LORA, AUTOMATIC = "Automatic (fp16 LoRA)", "Automatic"
HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "hr_second_pass_steps": 2,
    "denoising_strength": 0.6,
    "hr_upscaler": "None",
    "hr_additional_modules": ["Use same choices"],
}
A, C = "a cat <lora:lg_sd15_a:1>", "a cat <lora:lg_sd15_b:1>"
FULL, GLORA, DORA = (f"a cat <lora:lgk_sd15_{kind}:1>" for kind in ("full", "glora", "dora_out"))
FLUX = "a cat <lora:nf_lora:4>"
SD, GGUF, NVFP4 = ("rand_sd15_tiny", []), ("nf_q4_0", GGUF_PARTS), ("nf_nvfp4", [])
SEQUENCES = {
    "room for 60 of 98 MB": (SD, [(60, A), (60, A), (60, "a dog"), (60, A)]),
    "all of it, then none without": (SD, [(None, A), (40, "a cat"), (38, C), (None, "a cat")]),
    "another LoRA with less room": (SD, [(None, A), (38, C), (90, A), (None, A)]),
    "a little less each time": (SD, [(60, A), (59, A), (58, A), (57, A), (60, A), (75, A), (70, A), (66, A)]),
    "a difference, merged": (SD, [(60, FULL), (58, FULL), (None, FULL), (40, FULL), (None, "a cat")]),
    "on the fly": (SD, [(60, GLORA), (58, GLORA), (None, GLORA), (40, GLORA), (40, DORA), (60, DORA)]),
    "hires fix": (SD, [(60, (A, HIRES)), (60, (A, HIRES))]),
    "GGUF Q4_0": (GGUF, [(4.0, FLUX), (4.0, FLUX), (3.9, FLUX), (None, FLUX), (2.0, "a cat"), (2.0, FLUX)]),
    "nvfp4": (NVFP4, [(3.0, FLUX), (3.0, FLUX), (2.9, FLUX), (None, FLUX), (2.0, "a cat"), (2.0, FLUX)]),
}


def images_of(side):
    """`{(setting, sequence): [image or error]}`; each ends with the picture without LoRAs."""
    images = {}
    for setting in (AUTOMATIC, FP16_LORA) if side != "reference" else (AUTOMATIC,):
        with running(side, setting) as neo:
            for name, ((checkpoint, modules), shots) in SEQUENCES.items():
                settings = {"modules": parts(modules), "cfg_scale": 7 if checkpoint == SD[0] else 1}

                def shot(room, prompt, checkpoint=checkpoint, settings=settings, neo=neo):
                    prompt, more = (prompt, {}) if isinstance(prompt, str) else prompt
                    neo.room(room if side != "reference" else None)
                    return attempt(lambda: neo.image(checkpoint, prompt=prompt, **settings, **more))

                images[setting, name] = [shot(None, "a cat"), *(shot(*one) for one in shots), shot(None, "a cat")]
    return images


def compare(results):
    rows, wrong = [], []
    for (setting, name), pictures in results["guard"].items():
        truths, shots = results["reference"][AUTOMATIC, name], SEQUENCES[name][1]
        stock = results["stock"][setting, name]
        for place, (room, prompt) in enumerate(shots, start=1):
            effect = difference(truths[place], truths[0]) if isinstance(prompt, str) else None
            ours, theirs = (difference(side[place], truths[place]) for side in (pictures, stock))
            text = prompt if isinstance(prompt, str) else f"{prompt[0]} (hires)"
            rows.append([setting, name, room or "all", text, show(effect) if effect else "", show(ours), show(theirs)])
            if ours is None or ours[0] > 1:
                wrong.append(f"{setting}, {name}, {place}: {show(ours)} off: {pictures[place] if ours is None else ''}")
        if difference(pictures[-1], pictures[0]) != (0, 0.0):
            wrong.append(f"{setting}, {name}: the last picture without LoRA is not the first one")
    return rows, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIDES)
    options = parser.parse_args()
    link_extensions()
    try:
        if options.only:
            for key, pictures in images_of(options.only).items():
                print(key, [p if isinstance(p, str) else show(difference(p, pictures[0])) for p in pictures])
            return 0
        results = {side: images_of(side) for side in ("reference", "guard", "stock")}
    finally:
        unlink_extensions()
    rows, wrong = compare(results)
    print(markdown(["setting", "sequence", "room, MB", "prompt", "effect", "guard", "stock"], rows))
    print("\n".join(wrong) or "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
