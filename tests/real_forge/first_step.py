"""Seconds from "Generate" to an image of one step in a running Forge on the CPU: what a change of LoRA, strength or prompt
costs. Stock against guard; writes the table in docs/hosts.md.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/first_step.py --model rand_sd15 [--write-docs]

The model should be of full size (forge-host's gen_sd15.py makes one of random numbers): what stock does is in proportion to it.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import link_extensions, measured_on, write_table
from real_forge.server import FORGE, Server

A, B = "<lora:lg_first_step_a:{}>", "<lora:lg_first_step_b:{}>"
EVENTS = [
    ("first LoRA", "a cat", A, 1.0),
    ("same again", "a cat", A, 1.0),
    ("strength", "a cat", A, 0.8),
    ("another LoRA", "a cat", B, 1.0),
    ("prompt", "a dog", B, 1.0),
    ("prompt of before", "a cat", B, 1.0),
    ("prompt and LoRA", "a bird", A, 1.0),
    ("removed", "a bird", "", 0.0),
]
LORAS = FORGE / "models" / "Lora"


def unet_only(source, target, sign):
    """A LoRA without text-encoder keys out of one that has some."""
    tensors = {key: value for key, value in load_file(str(source)).items() if key.startswith("lora_unet_")}
    save_file({k: sign * v if k.endswith("lora_up.weight") else v for k, v in tensors.items()}, str(target))


WAYS = {"stock": ["--lora-guard-off"], "guard": []}


def seconds(forge, options):
    """`{event: seconds}`, the best of the rounds: each event comes once a round, in order."""
    settings = {"steps": 1, "width": 64, "height": 64, "cfg_scale": options.cfg}
    forge.image(options.model, prompt="a cat", **settings)
    found = {name: [] for name, *_ in EVENTS}
    for number in range(options.rounds):
        for name, prompt, lora, strength in EVENTS:
            text = lora.format(round(strength - 0.01 * number, 2))
            started = time.perf_counter()
            forge.image(prompt=f"{prompt} {number} {text}", **settings)
            found[name].append(time.perf_counter() - started)
    return {name: min(times) for name, times in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rand_sd15")
    parser.add_argument("--lora", default="rand_lora_full", help="two LoRAs of the U-Net alone are made of it")
    parser.add_argument("--cfg", type=float, default=7.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("LORA_GUARD_TEST_PORT", "7917")
    link_extensions()
    source = LORAS / f"{options.lora}.safetensors"
    for name, sign in (("lg_first_step_a", 1), ("lg_first_step_b", -1)):
        unet_only(source, LORAS / f"{name}.safetensors", sign)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way, flags in WAYS.items():
            with Server(Path(folder) / f"{way}.log", flags) as forge:
                found[way] = seconds(forge, options)
                print(way, {name: round(value, 2) for name, value in found[way].items()}, flush=True)
    rows = [["from Generate to an image of one step", "stock s", "guard s"], ["---"] * 3]
    rows += [[name, *(f"{found[way][name]:.2f}" for way in WAYS)] for name, *_ in EVENTS]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    print(text)
    if options.write_docs:
        write_table("first step", f"{measured_on()} {options.model}, best of {options.rounds}.\n\n{text}")


if __name__ == "__main__":
    main()
