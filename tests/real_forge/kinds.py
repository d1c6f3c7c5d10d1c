"""Every kind of adapter in a running Forge: the guard against an fp64 merge, and against stock where Forge has the kind.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/kinds.py [--write-docs]

`make_kinds.py` writes the files. A kind that Forge has not is compared with the picture of the difference that LyCORIS
makes of the weights. Three servers, as in `run.py`.
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
    parts,
    show,
    write_table,
)
from real_forge.server import ROOT, Server

MODELS = {
    "SD1.5 fp16": ("rand_sd15_tiny", "sd15", []),
    "Flux bf16": ("tiny_flux_bf16", "flux", []),
    "Flux fp8": ("tiny_flux_allfp8", "flux", []),
    "Flux Q4_K": ("tiny_flux_q4_k", "flux", ["tiny_flux_vae", "tiny_clip_l", "tiny_t5"]),
}
FORGE_KINDS = ["locon", "tucker", "loha", "loha r16", "loha tucker", "lokr", "lokr factored", "glora", "full", "dora out", "dora in", "dora loha", "dora lokr"]  # fmt: skip
OTHER_KINDS = ["oft", "oft bounded", "boft", "ia3 out", "ia3 in", "rslora"]


def images_of(forge, side):
    """`{(model, kind): image or error}`; kind None is the picture without LoRA."""
    images = {}
    for label, (checkpoint, family, modules) in MODELS.items():
        settings = {"modules": parts(modules), "cfg_scale": 7 if family == "sd15" else 1}
        images[label, None] = attempt(functools.partial(forge.image, checkpoint, prompt="a cat", **settings))
        for kind in FORGE_KINDS + OTHER_KINDS:
            name = f"lgk_{family}_{kind}".replace(" ", "_")
            if kind in OTHER_KINDS and (modules or side == "stock"):
                continue
            if kind in OTHER_KINDS and side == "reference":
                name += f"_as_diff_{checkpoint}"
            prompt = f"a cat <lora:{name}:1>"
            images[label, kind] = attempt(functools.partial(forge.image, checkpoint, prompt=prompt, **settings))
        images[label, "removed"] = attempt(functools.partial(forge.image, checkpoint, prompt="a cat", **settings))
    return images


def run_side(side, folder):
    config = Path(folder) / f"{side}.json"
    # Stock merges in fp32 where the storage is wide: its most exact way for these models is "Automatic".
    config.write_text(json.dumps({"forge_unet_storage_dtype": "Automatic (fp16 LoRA)"}))
    flags = ["--ui-settings-file", str(config)] + ([] if side == "guard" else ["--lora-guard-off"])
    env = {"LORA_GUARD_REFERENCE": "1", "LORA_GUARD_TESTS": str(ROOT / "tests")} if side == "reference" else {}
    with Server(Path(folder) / f"{side}.log", flags, env) as forge:
        return images_of(forge, side), forge.console()


def compare(stock, guard, reference):
    rows, wrong = [], []
    for (model, kind), image in guard.items():
        truth, base = reference[model, kind], reference[model, None]
        ours, effect = difference(image, truth), difference(truth, base)
        theirs = difference(stock[model, kind], truth) if (model, kind) in stock else None
        if kind not in (None, "removed"):
            rows.append([model, kind, show(effect), show(ours), show(theirs) if theirs else "not in Forge" if kind in OTHER_KINDS else "error"])  # fmt: skip
            if effect is None or effect[0] < 4 * LARGEST_GAP:
                wrong.append(f"{model}, {kind}: changes the picture by {show(effect)} only, nothing is tested")
        if ours is None or ours[0] > LARGEST_GAP:
            wrong.append(f"{model}, {kind}: guard is {show(ours)} from the reference: {image if isinstance(image, str) else ''}")  # fmt: skip
    return rows, wrong


def write_docs(rows):
    head = ["model", "kind", "effect (reference)", "guard from reference", "stock's best mode from reference"]
    write_table("kinds", f"{measured_on()} Largest / mean difference in grey levels (0-255).\n\n{markdown(head, rows)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("--only", help="run one side and print its console")
    options = parser.parse_args()
    link_extensions()
    with tempfile.TemporaryDirectory() as folder:
        if options.only:
            images, console = run_side(options.only, folder)
            print("\n".join(line for line in console.splitlines() if "LoRA Guard" in line or "rror" in line))
            print({k: i if isinstance(i, str) else i.mean().round(3) for k, i in images.items()})
            return 0
        results = [run_side(side, folder)[0] for side in ("stock", "guard", "reference")]
    rows, wrong = compare(*results)
    print(markdown(["model", "kind", "effect", "guard", "stock"], rows))
    print("\n".join(wrong) or "all as it should be")
    if options.write_docs and not wrong:
        write_docs(rows)
    return bool(wrong)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
