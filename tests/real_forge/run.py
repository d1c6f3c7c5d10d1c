"""The extension in a running Forge against Forge itself and an fp32 reference; writes the table in docs/hosts.md.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/run.py [--only guard] [--write-docs]

docs/hosts.md says what FORGE_ROOT needs. Three servers run one after the other with the same images: Forge with the
guard off and its most exact mode ("Automatic (fp16 LoRA)"), with the guard, and with a test-only patcher that merges in
fp64 into fp32 weights. Images are 64x64, 3 steps, random tiny models: what is compared is arithmetic, not beauty.
"""

import argparse
import datetime
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.server import FORGE, ROOT, ApiError, Server, png_base64

GGUF_PARTS = ["tiny_flux_vae", "tiny_clip_l", "tiny_t5"]
MODELS = {
    "SD1.5 fp16": ("rand_sd15_tiny", "sd15", []),
    "Flux bf16": ("tiny_flux_bf16", "flux", []),
    "Flux fp8 (all)": ("tiny_flux_allfp8", "flux", []),
    "Flux scaled fp8": ("tiny_flux_scaledfp8", "flux", []),
    "Flux GGUF Q8_0": ("tiny_flux_q8_0", "flux", GGUF_PARTS),
    "Flux GGUF Q4_0": ("tiny_flux_q4_0", "flux", GGUF_PARTS),
    "Flux GGUF Q4_K": ("tiny_flux_q4_k", "flux", GGUF_PARTS),
    "Flux GGUF Q6_K": ("tiny_flux_q6_k", "flux", GGUF_PARTS),
}
CASES = {
    "without": "a cat",
    "one LoRA": "a cat <lora:lg_{}_a:1>",
    "strength 0.5": "a cat <lora:lg_{}_a:0.5>",
    "two LoRAs": "a cat <lora:lg_{}_a:0.7> <lora:lg_{}_b:-0.6>",
    "text encoder only": "a cat <lora:lg_{}_text:1>",
    "norms only": "a cat <lora:lg_{}_norm:1>",
    "removed": "a cat",
}


LARGEST_GAP = 1
"""Grey levels that the guard may be off: one is the rounding of a pixel. An effect must be four times that to count."""


def link_extensions():
    """Our extension and the test-only reference one, linked into Forge under names of their own."""
    for name, target in (
        ("lora-guard", ROOT),
        ("zz_lora_guard_reference", ROOT / "tests" / "real_forge" / "extension"),
    ):
        link = FORGE / "extensions" / name
        if not link.exists():
            link.symlink_to(target, target_is_directory=True)


def parts(names):
    """Full paths of the separate VAE and text encoder files that GGUF checkpoints need."""
    folders = [FORGE / "models" / "VAE", FORGE / "models" / "text_encoder"]
    return [str(next(f for folder in folders for f in folder.glob(f"{name}.*"))) for name in names]


def attempt(make):
    try:
        return make()
    except ApiError as error:
        return str(error)


def case_images(forge):
    """`{model: {case: image or error}}`."""
    images = {}
    for label, (checkpoint, family, modules) in MODELS.items():
        settings = {"cfg_scale": 7 if family == "sd15" else 1}
        images[label] = {}
        for case, prompt in CASES.items():
            make = functools.partial(
                forge.image, checkpoint, modules=parts(modules), prompt=prompt.format(family, family), **settings
            )
            images[label][case] = attempt(make)
    return images


def everyday_images(forge):
    """What people do around a LoRA, on the tiny SD1.5; `{name: image or error}`."""
    sd = "rand_sd15_tiny"
    lora, two = "a cat <lora:lg_sd15_a:1>", "a cat <lora:lg_sd15_a:0.5> <lora:lg_sd15_b:0.5>"
    hires = {
        "enable_hr": True,
        "hr_scale": 2,
        "hr_second_pass_steps": 2,
        "denoising_strength": 0.6,
        "hr_upscaler": "Latent",
        "hr_additional_modules": ["Use same choices"],
    }
    plain = forge.image(sd)
    start = {"init_images": [png_base64(plain[0])], "denoising_strength": 0.7, "endpoint": "img2img"}
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 255
    make = {
        "plain": lambda: plain,
        "hires": lambda: forge.image(prompt=lora, **hires),
        "hires with another LoRA": lambda: forge.image(prompt=lora, hr_prompt="a cat <lora:lg_sd15_b:1>", **hires),
        "batch of 2 x 2": lambda: forge.image(prompt=lora, n_iter=2, batch_size=2),
        "img2img": lambda: forge.image(prompt=lora, **start),
        "inpaint": lambda: forge.image(prompt=lora, mask=png_base64(half), **start),
        "checkpoint switched away": lambda: forge.image(
            "tiny_flux_allfp8", prompt="a cat <lora:lg_flux_a:1>", cfg_scale=1
        ),
        "checkpoint switched back": lambda: forge.image(sd, prompt=lora),
        "after an interrupt": lambda: interrupted(forge, lora),
        "two LoRAs": lambda: forge.image(prompt=two),
        "wrong shape between two good ones": lambda: forge.image(
            prompt="a cat <lora:lg_sd15_a:0.5> <lora:lg_sd15_wrong:1> <lora:lg_sd15_b:0.5>"
        ),
        "without any, after all that": lambda: forge.image(),
    }
    return {name: attempt(image) for name, image in make.items()}


def interrupted(forge, prompt):
    """A long image is interrupted in the middle; the next one is returned."""
    thread = threading.Thread(target=lambda: attempt(lambda: forge.image(prompt="a dog <lora:lg_sd15_b:1>", steps=150)))
    thread.start()
    time.sleep(4)
    started = time.perf_counter()
    forge.call("/sdapi/v1/interrupt", {})
    thread.join()
    assert time.perf_counter() - started < 60, "the interrupt was not heard"
    return forge.image(prompt=prompt)


def run_side(side, folder):
    """All images of one server, and its console."""
    config = Path(folder) / "config.json"
    config.write_text(json.dumps({"forge_unet_storage_dtype": "Automatic (fp16 LoRA)", "sd_checkpoint_hash": ""}))
    flags = ["--ui-settings-file", str(config)] + ([] if side == "guard" else ["--lora-guard-off"])
    env = {"LORA_GUARD_REFERENCE": "1", "LORA_GUARD_TESTS": str(ROOT / "tests")} if side == "reference" else {}
    log = Path(folder) / f"{side}.log"
    with Server(log, flags, env) as forge:
        images = case_images(forge), everyday_images(forge)
        console = forge.console()
    wanted = {
        "guard": "in place of Forge's LoRA patcher",
        "stock": "switched off by --lora-guard-off",
        "reference": "merged in fp64",
    }[side]
    assert wanted in console, f"{side}: '{wanted}' is not in the console"
    return *images, console


def without_the_extension(folder):
    """Two images of a Forge in which the extension is disabled in its settings."""
    config = Path(folder) / "disabled.json"
    config.write_text(
        json.dumps({"forge_unet_storage_dtype": "Automatic (fp16 LoRA)", "disabled_extensions": ["lora-guard"]})
    )
    with Server(Path(folder) / "disabled.log", ["--ui-settings-file", str(config)]) as forge:
        images = [forge.image("rand_sd15_tiny", prompt=p) for p in ("a cat", "a cat <lora:lg_sd15_a:1>")]
        assert "[LoRA Guard]" not in forge.console()
    return images


def difference(a, b):
    """`(largest, mean)` difference in grey levels, or None where one of them is an error."""
    if isinstance(a, str) or isinstance(b, str):
        return None
    gap = np.abs(a.astype(int) - b.astype(int))
    return int(gap.max()), float(gap.mean())


def show(pair):
    return "error" if pair is None else f"{pair[0]} / {pair[1]:.3f}"


def compare(results):
    """Table rows and what is wrong with them."""
    rows, wrong = [], []
    stock, guard, reference = (results[side][0] for side in ("stock", "guard", "reference"))
    for model, cases in guard.items():
        base = reference[model]["without"]
        for case, image in cases.items():
            truth = reference[model][case]
            effect, ours, theirs = (
                difference(truth, base),
                difference(image, truth),
                difference(stock[model][case], truth),
            )
            rows.append([model, case, show(effect), show(ours), show(theirs)])
            if ours is None or ours[0] > LARGEST_GAP:
                wrong.append(
                    f"{model}, {case}: guard is {show(ours)} from the reference: {image if isinstance(image, str) else ''}"
                )
            if case not in ("without", "removed") and (effect is None or effect[0] < 4 * LARGEST_GAP):
                wrong.append(f"{model}, {case}: the LoRA changes the picture by {show(effect)} only, nothing is tested")
        if difference(cases["removed"], cases["without"]) != (0, 0.0):
            wrong.append(f"{model}: the picture after removal is not the first one")
    return rows, wrong


def compare_everyday(results):
    rows, wrong = [], []
    stock, guard, reference = (results[side][1] for side in ("stock", "guard", "reference"))
    for name, image in guard.items():
        truth = guard["two LoRAs"] if name == "wrong shape between two good ones" else reference[name]
        ours, theirs = difference(image, truth), difference(stock[name], truth)
        rows.append([name, show(ours), show(theirs) if not isinstance(stock[name], str) else stock[name][:8]])
        if ours is None or ours[0] > LARGEST_GAP:
            wrong.append(f"{name}: guard is {show(ours)} from the reference: {image if isinstance(image, str) else ''}")
    if difference(guard["plain"], guard["without any, after all that"]) != (0, 0.0):
        wrong.append("the last picture without LoRA is not the first one")
    return rows, wrong


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def commit_of(folder):
    done = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def measured_on(host=None):
    """The host (Forge's commit, where it is not given), LoRA Guard and torch that pictures were made with, as the pages say it."""
    import torch

    host = host or f"Forge {commit_of(FORGE)}"
    return f"Measured {datetime.date.today().isoformat()} on {host}, LoRA Guard {commit_of(ROOT)}, torch {torch.__version__}, CPU."


def write_table(name, text, page=ROOT / "docs" / "hosts.md"):
    """Puts `text` between the markers of the table called `name`."""
    old = page.read_text(encoding="utf-8")
    between = rf"(<!-- {name} table -->\n).*?(<!-- end of {name} table -->)"
    new, found = re.subn(between, lambda m: m[1] + text + "\n" + m[2], old, flags=re.DOTALL)
    assert found == 1, f"{page.name} has no markers for the {name} table"
    page.write_text(new, encoding="utf-8")


def write_docs(rows, everyday):
    head = [
        "model",
        "case",
        "effect of the LoRA (reference)",
        "guard from reference",
        "stock's best mode from reference",
    ]
    text = (
        f"{measured_on()} Each cell: largest / mean difference in grey levels (0-255).\n\n{markdown(head, rows)}"
        "\n\nEveryday paths, on the tiny SD1.5:\n\n"
        + markdown(["path", "guard from reference", "stock from reference"], everyday)
    )
    write_table("pixel", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run one side and print its console")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    link_extensions()
    with tempfile.TemporaryDirectory() as folder:
        if options.only:
            cases, everyday, console = run_side(options.only, folder)
            print("\n".join(line for line in console.splitlines() if "LoRA Guard" in line))
            print(
                {m: {c: i if isinstance(i, str) else i.mean().round(3) for c, i in v.items()} for m, v in cases.items()}
            )
            print({n: i if isinstance(i, str) else i.mean().round(3) for n, i in everyday.items()})
            return 0
        results = {}
        for side in ("stock", "guard", "reference"):
            started = time.perf_counter()
            results[side] = run_side(side, folder)
            print(f"{side}: {time.perf_counter() - started:.0f} s", flush=True)
        disabled = without_the_extension(folder)
    rows, wrong = compare(results)
    everyday, more = compare_everyday(results)
    stock = results["stock"][0]["SD1.5 fp16"]
    if any(difference(a, stock[c]) != (0, 0.0) for a, c in zip(disabled, ("without", "one LoRA"), strict=True)):
        wrong.append("with the extension disabled the pictures are not stock's")
    refused = [line for line in results["guard"][2].splitlines() if "NOT applied" in line]
    if not any("lg_sd15_wrong.safetensors NOT applied: made for another model" in line for line in refused):
        wrong.append("the LoRA of the wrong shape was not named in the console")
    print(markdown(["model", "case", "effect", "guard", "stock"], rows))
    print(markdown(["path", "guard", "stock"], everyday))
    print("\n".join(wrong + more) or "all as it should be")
    if options.write_docs and not (wrong + more):
        write_docs(rows, everyday)
    return bool(wrong + more)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
