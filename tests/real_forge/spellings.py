"""LoRA files as trainers spell them in a running Forge: the guard's picture against the one of the difference they come to.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/spellings.py [--write-docs]

`make_spellings.py` writes the files. Two servers: the guard with a file as its trainer wrote it, and the reference, which
merges the difference in fp64. Every file that has to be refused stands between two good ones in a prompt.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import (
    LARGEST_GAP,
    attempt,
    difference,
    link_extensions,
    markdown,
    measured_on,
    show,
    write_table,
)
from real_forge.server import FORGE, ROOT, Server

MODELS = {"flux": ("tiny_flux_bf16", {"cfg_scale": 1}), "sd15": ("rand_sd15_tiny", {"cfg_scale": 7})}
GOOD = "<lora:lg_flux_a:0.7>", "<lora:lg_flux_b:-0.6>"
LORAS = FORGE / "models" / "Lora"


def files_of(family):
    """Names of the files without their twins."""
    found = sorted(path.stem for path in LORAS.glob(f"lgs_{family}_*.safetensors"))
    return [name for name in found if not name.endswith("_twin")]


def images_of(forge, side):
    """`{(family, file): image or error}`; file None: without a LoRA, "good": the two that stand around a bad one."""
    images = {}
    for family, (checkpoint, settings) in MODELS.items():
        make = functools.partial(forge.image, checkpoint, **settings)
        images[family, None] = attempt(functools.partial(make, prompt="a cat"))
        for name in files_of(family):
            written = name if side == "guard" else f"{name}_twin"
            images[family, name] = attempt(functools.partial(make, prompt=f"a cat <lora:{written}:1>"))
    checkpoint, settings = MODELS["flux"]
    make = functools.partial(forge.image, checkpoint, **settings)
    images["bad", "good"] = attempt(functools.partial(make, prompt=f"a cat {GOOD[0]} {GOOD[1]}"))
    if side == "guard":
        for name in files_of("bad"):
            images["bad", name] = attempt(functools.partial(make, prompt=f"a cat {GOOD[0]} <lora:{name}:1> {GOOD[1]}"))
    return images


def run_side(side, folder):
    config = Path(folder) / f"{side}.json"
    config.write_text(json.dumps({"forge_unet_storage_dtype": "Automatic (fp16 LoRA)"}))
    flags = ["--ui-settings-file", str(config)] + ([] if side == "guard" else ["--lora-guard-off"])
    env = {"LORA_GUARD_REFERENCE": "1", "LORA_GUARD_TESTS": str(ROOT / "tests")} if side == "reference" else {}
    with Server(Path(folder) / f"{side}.log", flags, env) as forge:
        return images_of(forge, side), forge.console()


def compare(guard, reference, console):
    rows, wrong = [], []
    for (family, name), image in guard.items():
        if family == "bad":
            gap = difference(image, guard["bad", "good"])
            is_named = name == "good" or f"{name}.safetensors" in console
            rows.append([family, name, "", show(gap)])
            if gap is None or gap[0] > 0 or not is_named:
                wrong.append(f"{name} between two good files: {show(gap)}, named: {is_named}")
            if not (name == "good" or (LORAS / f"{name}.safetensors").exists()):
                wrong.append(f"{name}: the file was renamed")
            continue
        effect = difference(reference[family, name], reference[family, None])
        gap = difference(image, reference[family, name])
        if name is not None:
            rows.append([family, name, show(effect), show(gap)])
            if effect is None or effect[0] < 4 * LARGEST_GAP:
                wrong.append(f"{name}: changes the picture by {show(effect)} only, nothing is tested")
        if gap is None or gap[0] > LARGEST_GAP:
            wrong.append(f"{name}: {show(gap)} from the reference: {image if isinstance(image, str) else ''}")
    return rows, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    link_extensions()
    with tempfile.TemporaryDirectory() as folder:
        (guard, console), (reference, _) = (run_side(side, folder) for side in ("guard", "reference"))
    rows, wrong = compare(guard, reference, console)
    head = ["model", "file", "effect (reference)", "guard from reference"]
    print(markdown(head, rows))
    print("\n".join(line for line in console.splitlines() if "lgs_bad" in line))
    print("\n".join(wrong) or "all as it should be")
    if options.write_docs and not wrong:
        text = f"{measured_on()} Largest / mean difference in grey levels (0-255).\n\n{markdown(head, rows)}"
        write_table("spellings", text)
    return bool(wrong)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
