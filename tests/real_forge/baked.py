"""Checkpoints that `lora-guard bake` wrote, in a running Forge: their pictures against those of the LoRA on the original.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/baked.py

Bakes the tiny models of the test Forge with a LoRA of `make_loras.py`, text encoders included, starts one Forge with the
guard, and compares `a cat` on the baked file with `a cat <lora:...>` on the original. 16-bit files must agree within one
grey level; what fp8 makes of it is shown beside the cosine that the command said. The baked files are deleted again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import GGUF_PARTS, LARGEST_GAP, difference, link_extensions, markdown, parts, show
from real_forge.server import FORGE, PYTHON, ROOT, Server

MODELS, LORAS = FORGE / "models" / "Stable-diffusion", FORGE / "models" / "Lora"
STRENGTH = 0.8
CASES = {
    "SD1.5 fp16": ("rand_sd15_tiny.safetensors", "lg_sd15_a", "keep"),
    "Flux bf16": ("tiny_flux_bf16.safetensors", "lg_flux_a", "keep"),
    "Flux fp8 -> bf16": ("tiny_flux_allfp8.safetensors", "lg_flux_a", "bf16"),
    "Flux scaled fp8 -> bf16": ("tiny_flux_scaledfp8.safetensors", "lg_flux_a", "bf16"),
    "Flux Q4_K -> bf16": ("tiny_flux_q4_k.gguf", "lg_flux_b", "keep"),  # no text encoder in either
    "Flux fp8": ("tiny_flux_allfp8.safetensors", "lg_flux_a", "keep"),
    "Flux scaled fp8": ("tiny_flux_scaledfp8.safetensors", "lg_flux_a", "keep"),
    "Flux bf16 -> fp8": ("tiny_flux_bf16.safetensors", "lg_flux_a", "fp8_e4m3fn"),
}
"""Label -> model, LoRA, --dtype."""
NOT_COMPARED = ("Flux fp8", "Flux scaled fp8", "Flux bf16 -> fp8")
"""What was rounded more coarsely than the original is."""


def baked_path(number):
    return MODELS / f"lg_baked_{number}.safetensors"


def bake(model, lora, dtype, output):
    """What the command prints as JSON."""
    command = [PYTHON, "-m", "lib_lora_guard", "bake", MODELS / model, f"{LORAS / lora}.safetensors:{STRENGTH}"]
    command += ["-o", output, "--dtype", dtype, "--force", "--json"]
    return json.loads(subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True).stdout)


def pictures(forge, number, model, lora):
    """With the LoRA on the original in the mode "Merge" (which merges 16-bit weights alone), without it, and of the baked file."""
    modules = parts(GGUF_PARTS) if model.endswith(".gguf") else []
    settings = {"modules": modules, "cfg_scale": 7 if "sd15" in model else 1}
    merged = {"override_settings": {"lora_guard_mode": "Merge"}}
    with_lora = forge.image(model, prompt=f"a cat <lora:{lora}:{STRENGTH}>", **settings, **merged)
    without = forge.image(model, prompt="a cat", **settings)
    return with_lora, without, forge.image(baked_path(number).name, prompt="a cat", **settings)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a part of the label of what is to be tried")
    options = parser.parse_args()
    cases = {label: case for label, case in CASES.items() if not options.only or options.only in label}
    link_extensions()
    rows, wrong = [], []
    try:
        said = [bake(*case, baked_path(number)) for number, case in enumerate(cases.values())]
        with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "forge.log") as forge:
            for number, (label, (model, lora, dtype)) in enumerate(cases.items()):
                with_lora, without, baked = pictures(forge, number, model, lora)
                gap, effect = difference(baked, with_lora), difference(with_lora, without)
                cosine = said[number]["cosine_by_dtype"]
                shown = ", ".join(f"{form} {value:.4f}" for form, value in cosine.items())
                rows.append([label, dtype, show(effect), show(gap), shown, f"{said[number]['seconds']:.1f}"])
                print(*rows[-1], sep=", ", flush=True)
                if effect[0] < 4 * LARGEST_GAP:
                    wrong.append(f"{label}: the LoRA changes the picture by {show(effect)} only, nothing is tested")
                if label not in NOT_COMPARED and gap[0] > LARGEST_GAP:
                    wrong.append(f"{label}: the baked file is {show(gap)} from the LoRA on the original")
    finally:
        for number in range(len(cases)):
            baked_path(number).unlink(missing_ok=True)
    print(markdown(["model", "--dtype", "effect", "baked from LoRA", "cosine", "seconds"], rows))
    print("\n".join(wrong) or "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
