"""How many prompts a running Forge, or Forge Neo, encodes from one image to the next: the guard against what each image needs.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/prompts.py [--only-count]

After make_loras.py. LoRAs A and B have nothing for a text encoder, "text" has. Every picture must be that of a guard which leaves
conditionings to the host (LORA_GUARD_PROMPTS=0), bit for bit.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from real_neo.neo import NEO_SETTINGS, Neo

from real_forge.server import FORGE, ROOT, Server, png_base64

MODEL, OTHER = "rand_sd15_tiny", "zz_prompts_sd15"
IS_NEO = (FORGE / "modules_forge" / "packages").exists()
CLIP_SKIP = 2 if IS_NEO else 1
"""The host's usual setting."""
LORAS = FORGE / "models" / "Lora"
TEXT = "a lighthouse on a cliff"
A, WEAK, B = "<lora:lgp_a:1>", "<lora:lgp_a:0.5>", "<lora:lgp_b:1>"
ON_TEXT, WEAK_ON_TEXT = "<lora:lg_sd15_text:1>", "<lora:lg_sd15_text:0.5>"
HIRES = {
    "enable_hr": True,
    "hr_cfg": 7,
    "hr_scale": 1.25,
    "hr_second_pass_steps": 1,
    "denoising_strength": 0.6,
    "hr_upscaler": "None",
    "hr_additional_modules": ["Use same choices"],
}
IMG2IMG = {
    "endpoint": "img2img",
    "init_images": [png_base64(np.full((64, 64, 3), 90, np.uint8))],
    "denoising_strength": 0.6,
}
REFINER = {"refiner_checkpoint": OTHER, "refiner_switch_at": 5 if IS_NEO else 0.5, "steps": 4}
"""Neo's switch is a noise level."""
SCHEDULE = "a [cat:dog:0.5] here"
CHECKPOINTS = ("sd_model_checkpoint", "refiner_checkpoint", "hr_checkpoint_name")
DAY = (
    ("first image", 2, {}),
    ("the same", 0, {}),
    ("A", 0, {"prompt": f"{TEXT} {A}"}),
    ("A again", 0, {"prompt": f"{TEXT} {A}"}),
    ("A, other strength", 0, {"prompt": f"{TEXT} {WEAK}"}),
    ("B", 0, {"prompt": f"{TEXT} {B}"}),
    ("A and B, before the text", 0, {"prompt": f"{A}{B} {TEXT}"}),
    ("removed", 0, {}),
    ("text", 2, {"prompt": f"{TEXT} {ON_TEXT}"}),
    ("text, other strength", 2, {"prompt": f"{TEXT} {WEAK_ON_TEXT}"}),
    ("text, first strength", 0, {"prompt": f"{TEXT} {ON_TEXT}"}),
    ("A in its place", 0, {"prompt": f"{TEXT} {A}"}),
    ("new prompt", 1, {"prompt": f"two horses {A}"}),
    ("new negative prompt", 1, {"negative_prompt": "blurred"}),
    ("first negative prompt, B", 0, {"prompt": f"{TEXT} {B}"}),
    ("prompt and negative prompt change places", 2, {"prompt": f"blurred {A}", "negative_prompt": TEXT}),
    ("prompt with a schedule", 1, {"prompt": SCHEDULE}),
    ("prompt with a schedule, A", 0, {"prompt": f"{SCHEDULE} {A}"}),
    ("another schedule, A", 1, {"prompt": f"a [cat:dog:0.7] here {A}"}),
    ("CFG 1, A", 0, {"prompt": f"{TEXT} {A}", "cfg_scale": 1}),
    ("two batches of A", 0, {"prompt": f"{TEXT} {A}", "n_iter": 2}),
    ("two images at once", 2, {"prompt": f"{TEXT} {A}", "batch_size": 2}),
    ("two images at once, B", 0, {"prompt": f"{TEXT} {B}", "batch_size": 2}),
    ("img2img, A", 2 if IS_NEO else 0, {"prompt": f"{TEXT} {A}", **IMG2IMG}),  # no "Hires Distilled CFG Scale" in Neo
    ("img2img, B", 0, {"prompt": f"{TEXT} {B}", **IMG2IMG}),
    ("hires", 0 if IS_NEO else 2, HIRES),  # Forge's key tells the two passes apart
    ("hires, A", 0, {"prompt": f"{TEXT} {A}", **HIRES}),
    ("hires, B in the second pass", 0, {"prompt": f"{TEXT} {A}", "hr_prompt": f"{TEXT} {B}", **HIRES}),
    (
        "hires, text in the second pass",
        0 if IS_NEO else 2,
        {"prompt": f"{TEXT} {A}", "hr_prompt": f"{TEXT} {ON_TEXT}", **HIRES},
    ),
    (
        "hires, another prompt there",
        0 if IS_NEO else 1,
        {"prompt": f"{TEXT} {A}", "hr_prompt": f"two horses {A}", **HIRES},
    ),
    ("clip skip, A", 2, {"prompt": f"{TEXT} {A}", "options": {"CLIP_stop_at_last_layers": 3}}),
    ("first clip skip, B", 0, {"prompt": f"{TEXT} {B}", "options": {"CLIP_stop_at_last_layers": CLIP_SKIP}}),
    ("another emphasis, A", 2, {"prompt": f"{TEXT} {A}", "options": {"emphasis": "No norm"}}),
    # The tokenizers read as before until something is encoded: texts that differ in blanks cannot be compared.
    ("first emphasis, B", 1, {"prompt": f"{TEXT} {B}", "options": {"emphasis": "Original"}}),
    ("detailed with a prompt of its own", 2, {"prompt": f"{TEXT} {B}", "detail": f"a face {A}"}),
    ("A after the detailer", 0, {"prompt": f"{TEXT} {A}"}),
    ("four steps, A", 0, {"prompt": f"{TEXT} {A}", "steps": 4}),
    ("four steps and a schedule of two", 1, {"prompt": f"{SCHEDULE} {A}", "steps": 4}),
    # Neo gives a refiner the conditionings of the checkpoint before it: a Wan 2.2 has one text encoder for both.
    ("refiner, A: its own", 0 if IS_NEO else 2, {"prompt": f"{TEXT} {A}", **REFINER}),
    ("refiner, B", 0, {"prompt": f"{TEXT} {B}", **REFINER}),
    ("hires by another checkpoint, A", 2, {"prompt": f"{TEXT} {A}", **HIRES, "hr_checkpoint_name": OTHER}),
    ("hires by another checkpoint, B", 0, {"prompt": f"{TEXT} {B}", **HIRES, "hr_checkpoint_name": OTHER}),
    ("another checkpoint, A", 2, {"prompt": f"{TEXT} {A}", "options": {"sd_model_checkpoint": OTHER}}),
    ("another checkpoint, B", 0, {"prompt": f"{TEXT} {B}"}),
    ("first checkpoint, A", 2, {"prompt": f"{TEXT} {A}", "options": {"sd_model_checkpoint": MODEL}}),
    ("first checkpoint, B", 0, {"prompt": f"{TEXT} {B}"}),
    ("nothing shall be kept from now on", 0, {"prompt": f"{TEXT} {A}", "options": {"persistent_cond_cache": False}}),
    ("nothing was kept", 2, {"prompt": f"{TEXT} {A}"}),
    ("keep again", 2, {"prompt": f"{TEXT} {B}", "options": {"persistent_cond_cache": True}}),
    ("kept again, A", 0, {"prompt": f"{TEXT} {A}"}),
)
"""What is asked for, the prompts that have to be encoded for it, and the settings of the image."""

HOST_IS_WRONG = {"hires by another checkpoint, A"} if IS_NEO else set()
"""Neo's key names the first checkpoint in both passes: a hires pass takes the negative prompt that was encoded for that one. The
next image has it right, and is compared."""


def make_loras():
    """Writes A and B: LoRAs of make_loras.py without what they have for the text encoder."""
    from safetensors.torch import load_file, save_file

    for letter in "ab":
        tensors = load_file(str(LORAS / f"lg_sd15_{letter}.safetensors"))
        kept = {key: value for key, value in tensors.items() if key.startswith("lora_unet")}
        save_file(kept, str(LORAS / f"lgp_{letter}.safetensors"))


def make_other():
    """Writes the second checkpoint: the first one with other values, in the text encoder too."""
    import torch
    from safetensors.torch import load_file, save_file

    models = FORGE / "models" / "Stable-diffusion"
    path = models / f"{OTHER}.safetensors"
    if path.exists():
        return
    generator = torch.Generator().manual_seed(12)
    tensors = load_file(str(models / f"{MODEL}.safetensors"))
    for key, value in tensors.items():
        if value.is_floating_point() and value.dim() > 1:
            noise = torch.randn(value.shape, generator=generator) * value.float().std() * 0.3
            tensors[key] = (value.float() + noise).to(value.dtype)
    save_file(tensors, str(path.with_suffix(".part")))
    path.with_suffix(".part").replace(path)


@contextlib.contextmanager
def in_place(links):
    """Puts links into the host's folder, and puts back those that were there."""
    before = {FORGE / name: (FORGE / name).readlink() if (FORGE / name).is_symlink() else None for name in links}

    def put(targets):
        for path, target in targets.items():
            path.unlink(missing_ok=True)
            if target is not None:
                path.symlink_to(target)

    put({FORGE / name: target for name, target in links.items()})
    try:
        yield
    finally:
        put(before)


def day(guard, environment):
    """Makes the images of the day in a fresh host; yields for each the prompts that were encoded, with what they were, and its pictures.

    Args:
        guard: The extension's folder.
        environment: Variables for the host.
    """
    links = {
        "extensions/lora-guard": guard,
        "extensions/zz_lora_guard_prompts": ROOT / "tests" / "real_forge" / "prompts_extension",
    }
    log = Path(tempfile.mkdtemp()) / "console.log"
    print("console:", log, flush=True)
    config = log.with_name("config.json")
    config.write_text(json.dumps(NEO_SETTINGS if IS_NEO else {}), encoding="utf-8")
    with (
        in_place(links),
        (Neo if IS_NEO else Server)(
            log, ["--ui-settings-file", str(config)], {**environment, "LORA_GUARD_PROMPTS_TEST": "1"}
        ) as host,
    ):
        title = {name: host.checkpoint(name) for name in (MODEL, OTHER)}
        host.call("/sdapi/v1/options", {"sd_model_checkpoint": title[MODEL]})
        for _, _, wanted in DAY:
            settings = {"prompt": TEXT, "steps": 2, **wanted}
            settings |= {name: title[settings[name]] for name in CHECKPOINTS if name in settings}
            if options := settings.pop("options", {}):
                chosen = {name: title[options[name]] for name in CHECKPOINTS if name in options}
                host.call("/sdapi/v1/options", {**options, **chosen})
            host.call("/lora-guard-test/detail", {"prompt": settings.pop("detail", "")})
            pictures = host.image(**settings)
            yield host.call("/lora-guard-test/encoded"), pictures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only-count", action="store_true", help="without the pictures of the host's own conditionings"
    )
    parser.add_argument("--guard", type=Path, default=ROOT, help="the extension's folder, for an older version")
    options = parser.parse_args()
    make_loras()
    make_other()
    by_host = [None] * len(DAY) if options.only_count else list(day(ROOT, {"LORA_GUARD_PROMPTS": "0"}))
    wrong = 0
    print("| image | needed | guard | host |", flush=True)
    for (name, needed, _), (found, pictures), host in zip(DAY, day(options.guard, {}), by_host, strict=True):
        faults = [] if len(found) == needed else [f"encoded: {found}"]
        if host and name not in HOST_IS_WRONG and not np.array_equal(pictures, host[1]):
            faults.append("another picture than with the host's conditioning")
        wrong += bool(faults)
        told = f" WRONG: {'; '.join(faults)}" if faults else ""
        print(f"| {name} | {needed} | {len(found)} | {len(host[0]) if host else '-'} |{told}", flush=True)
    print(f"{wrong} wrong" if wrong else "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
