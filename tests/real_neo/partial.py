"""LoRAs on partly loaded models in a running Forge Neo, on a CPU that plays a card with little room; a table in docs/neo.md.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/partial.py --keep FOLDER [--write-docs]

Each line: the room in MB, and the picture's distance from the reference, as the largest and the mean difference in grey levels;
stock's beside it. Every sequence ends without LoRAs, and with the first picture bit for bit.
"""

import argparse
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import difference, markdown, show

from real_neo.everyday import HIRES
from real_neo.neo import GGUF_PARTS, attempt, linked, parts, running, write_docs
from real_neo.tables import AUTOMATIC, FP16_LORA

A, C = "a cat <lora:lg_sd15_a:1>", "a cat <lora:lg_sd15_b:1>"
FULL, GLORA, DORA = (f"a cat <lora:lgk_sd15_{kind}:1>" for kind in ("full", "glora", "dora_out"))
DOG, BIRD = A.replace("cat", "dog"), A.replace("cat", "bird")
FLUX = "a cat <lora:nf_lora:4>"
SD = ("rand_sd15_tiny", [])
IN_TURNS = [(4.0, FLUX), (4.0, FLUX), (3.9, FLUX), (None, FLUX), (2.0, "a cat"), (2.0, FLUX)]
"""Of a small Flux of about 4 MB in four bits."""
TAKEN = {"taken_megabytes": 20}
SEQUENCES = {
    "room for 60 of 98 MB": (SD, [(60, A), (60, A), (60, "a dog"), (60, A)]),
    "all of it, then none without": (SD, [(None, A), (40, "a cat"), (38, C), (None, "a cat")]),
    "another LoRA with less room": (SD, [(None, A), (38, C), (90, A), (None, A)]),
    "a little less each time": (SD, [(60, A), (59, A), (58, A), (57, A), (60, A), (75, A), (70, A), (66, A)]),
    "a difference, merged": (SD, [(60, FULL), (58, FULL), (None, FULL), (40, FULL), (None, "a cat")]),
    "on the fly": (SD, [(60, GLORA), (58, GLORA), (None, GLORA), (40, GLORA), (40, DORA), (60, DORA)]),
    "hires fix": (SD, [(60, (A, HIRES)), (60, (A, HIRES))]),
    "20 MB taken for the text encoder": (SD, [(90, A), (90, (DOG, TAKEN)), (90, (BIRD, TAKEN)), (None, A)]),
    "the same, a difference": (SD, [(90, FULL), (90, (FULL.replace("cat", "cow"), TAKEN)), (None, FULL)]),
    "GGUF Q4_0": (("nf_q4_0.gguf", GGUF_PARTS), IN_TURNS),
    "GGUF Q4_0, all of it first": (("nf_q4_0.gguf", GGUF_PARTS), [(None, FLUX), (2.0, "a cat"), (2.0, FLUX)]),
    "GGUF Q4_K": (("nf_q4_k.gguf", GGUF_PARTS), IN_TURNS),
    "nvfp4": (("nf_nvfp4.safetensors", []), [(3.0, FLUX), (3.0, FLUX), (2.9, FLUX), *IN_TURNS[3:]]),
    "scaled fp8": (("nf_scaledfp8.safetensors", []), IN_TURNS),
    "int8, rotated": (("nf_int8_rotated.safetensors", []), IN_TURNS),
}


def images_of(side, setting, folder, names):
    """`{sequence: [image or error]}` of one server; each ends with the picture without LoRAs."""
    images = {}
    with linked(), running(side, setting, folder) as neo:
        for name in names:
            (checkpoint, modules), shots = SEQUENCES[name]
            settings = {"modules": parts(modules), "cfg_scale": 7 if checkpoint == SD[0] else 1}

            def shot(room, prompt, checkpoint=checkpoint, settings=settings):
                prompt, more = (prompt, {}) if isinstance(prompt, str) else prompt
                more = dict(more)
                taken = more.pop("taken_megabytes", None)
                if side != "reference":
                    neo.room(room, taken)
                return attempt(lambda: neo.image(checkpoint, prompt=prompt, **settings, **more))

            images[name] = [shot(None, "a cat"), *(shot(*one) for one in shots), shot(None, "a cat")]
        return images


def kept(side, setting, folder):
    """The pictures of one server; the sequences that are not in the folder are made."""
    path = folder / f"{side}-partial-{setting}.pickle"
    found = pickle.loads(path.read_bytes()) if path.exists() else {}
    missing = [name for name in SEQUENCES if name not in found]
    if missing:
        (folder / "partial").mkdir(exist_ok=True)
        found |= images_of(side, setting, folder / "partial", missing)
        path.write_bytes(pickle.dumps(found))
        print(f"made: {side}, {setting}", flush=True)
    return found


def compare(truths, results):
    """The table's rows, and a sentence for each fault.

    Args:
        truths: the reference's pictures.
        results: `{(side, setting): pictures}` of the others.
    """
    rows, wrong = [], []
    for name, (_, shots) in SEQUENCES.items():
        for place, (room, prompt) in enumerate(shots, start=1):
            text, more = (prompt, {}) if isinstance(prompt, str) else prompt
            cells = [name if place == 1 else "", "all" if room is None else room, _said(text, more)]
            has_base = truths[name][place].shape == truths[name][0].shape and "<lora" in text
            cells.append(show(difference(truths[name][place], truths[name][0])) if has_base else "")
            for setting in (AUTOMATIC, FP16_LORA):
                for side in ("stock", "guard"):
                    off = difference(results[side, setting][name][place], truths[name][place])
                    cells.append(show(off))
                    if side == "guard" and (off is None or off[0] > 1):
                        wrong.append(f"{setting}, {name}, {place}: {show(off)} off")
            rows.append(cells)
        for setting in (AUTOMATIC, FP16_LORA):
            pictures = results["guard", setting][name]
            if difference(pictures[-1], pictures[0]) != (0, 0.0):
                wrong.append(f"{setting}, {name}: the last picture without LoRA is not the first one")
    return rows, wrong


def _said(prompt, more):
    words = prompt.replace("<lora:", "").replace(">", "").replace("lg_sd15_", "").replace("lgk_sd15_", "")
    return words + (", hires fix" if "enable_hr" in more else ", 20 MB taken" if more else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, help="folder in which pictures and consoles stay")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    truths = kept("reference", AUTOMATIC, options.keep)
    results = {
        (side, setting): kept(side, setting, options.keep)
        for side in ("guard", "stock")
        for setting in (AUTOMATIC, FP16_LORA)
    }
    rows, wrong = compare(truths, results)
    head = ["sequence", "room, MB", "prompt", "effect", "Neo", "guard", "Neo, (fp16 LoRA)", "guard, (fp16 LoRA)"]
    print(markdown(head, rows))
    print("\n".join(wrong) or "all as it should be")
    if options.write_docs:
        write_docs("partial", markdown(head, rows))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
