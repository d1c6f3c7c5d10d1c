"""Every model that Forge Neo loads, in small, with a LoRA in its most published spelling; writes the table in docs/neo.md.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/make_models.py
    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/models.py [--only SIDE] [--models NAME,...] [--write-docs]

Two servers: Neo with the guard off, which also loads the references (checkpoints that have the LoRA's difference in their
weights), and Neo with the guard. Each cell is the largest and the mean difference in grey levels.
"""

import argparse
import functools
import os
import pickle
import sys
from pathlib import Path

import numpy as np

os.environ["LORA_GUARD_TINY"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import difference, markdown, show

from real_neo.neo import attempt, link_extensions, running, write_docs
from real_neo.tiny import MODELS

ENOUGH_LEVELS = 4
"""An effect must be that large to say anything."""
SPELLINGS = {
    "kohya, U-Net": "kohya: `lora_unet_`, diffusers' blocks",
    "kohya": "kohya: `lora_unet_`",
    "diffusers, Flux": "diffusers: `transformer.`, query, key and value apart",
    "ai-toolkit": "ComfyUI, ai-toolkit: `diffusion_model.`",
    "ai-toolkit, Z-Image": "ai-toolkit: `diffusion_model.`, query, key and value apart",
}


def shots(name, side):
    """`(case, checkpoint, prompt)` of one model on one side."""
    tag, words = f"lgm_{name}", MODELS[name].prompt
    has_text = bool(MODELS[name].text_spelling)
    yield "without", tag, words
    yield "LoRA", tag, f"{words} <lora:{tag}:1>"
    if has_text:
        yield "text", tag, f"{words} <lora:{tag}_text:1>"
    yield "removed", tag, words
    if side == "stock":
        yield "reference", f"{tag}_reference", words
        if has_text:
            yield "text reference", f"{tag}_text_reference", words


def pictures(side, names, folder):
    """`{(model, case): image or error}`, kept in the folder model by model."""
    images = {}
    with running(side, folder=folder, flags=["--fp32-text-enc"]) as neo:
        for name in names:
            for case, checkpoint, prompt in shots(name, side):
                make = functools.partial(neo.image, f"{checkpoint}.safetensors", prompt=prompt, **MODELS[name].settings)
                images[name, case] = attempt(make)
            kept = Path(folder) / f"{side}-{name}.pickle"
            kept.write_bytes(pickle.dumps({key: image for key, image in images.items() if key[0] == name}))
            print(side, name, {case: str(i)[:90] if isinstance(i, str) else i.shape for (n, case), i in images.items() if n == name}, flush=True)  # fmt: skip


def rows_of(folder, names):
    """The table's rows, and a sentence for each fault."""
    rows, wrong = [], []
    for name in names:
        model, ours, stock = MODELS[name], {}, {}
        for side, images in (("guard", ours), ("stock", stock)):
            kept = Path(folder) / f"{side}-{name}.pickle"
            if kept.exists():
                images.update({case: image for (_, case), image in pickle.loads(kept.read_bytes()).items()})
        row = [model.title, SPELLINGS[model.spelling]]
        base = stock.get("without")
        if not isinstance(base, np.ndarray) or not isinstance(stock.get("reference"), np.ndarray):
            wrong.append(f"{model.title}: no picture: {base if isinstance(base, str) else ''}")
            rows.append([*row, "names only", *[""] * 5])
            continue
        for case, reference in (("LoRA", "reference"), ("text", "text reference")):
            if reference not in stock:
                row += ["", "", ""]
                continue
            effect = difference(stock[reference], base)
            off = difference(ours.get(case, "not made"), stock[reference])
            row += [show(effect), show(difference(stock.get(case, "not made"), stock[reference])), show(off)]
            if effect is None or effect[0] < ENOUGH_LEVELS:
                wrong.append(f"{model.title}, {case}: the effect is too small: {show(effect)}")
            if off is None or off[0] > 1:
                wrong.append(f"{model.title}, {case}: the guard is {show(off)} off")
        if difference(ours.get("removed", ""), ours.get("without", "")) != (0, 0.0):
            wrong.append(f"{model.title}: removed, the picture is not the first one")
        rows.append(row)
    return rows, wrong


HEAD = [
    "model",
    "spelling of the LoRA",
    "effect",
    "Neo",
    "guard",
    "text encoder: effect",
    "Neo",
    "guard",
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--only", choices=["stock", "guard", "none"], help="one server; none: the table of kept pictures"
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--keep", required=True, help="folder for the pictures and the consoles")
    parser.add_argument("--write-docs", action="store_true")
    args = parser.parse_args()
    names = args.models.split(",")
    Path(args.keep).mkdir(parents=True, exist_ok=True)
    link_extensions()
    for side in ("stock", "guard"):
        if args.only in (None, side):
            pictures(side, names, args.keep)
    rows, wrong = rows_of(args.keep, MODELS if args.only == "none" else names)
    table = markdown(HEAD, rows)
    print(table, *wrong, sep="\n")
    if args.write_docs:
        write_docs("models", table)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
