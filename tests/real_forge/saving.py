"""Save UNet and Save Checkpoint in a running Forge, with the guard and without: what is in the files, what they take.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/saving.py

A picture with LoRAs, the model saved, the saved model loaded, a picture of it without LoRAs: both must be the same within
one grey level. The files of both sides must hold the same tensors. A save asked for while an image is made must wait.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("LORA_GUARD_TEST_PORT", "7912")
os.environ.setdefault("PYTHONUNBUFFERED", "1")
import torch
from safetensors import safe_open

from real_forge.run import LARGEST_GAP, difference, link_extensions, markdown, show
from real_forge.server import FORGE, Server

FOLDER = FORGE / "models" / "Stable-diffusion"
EXTENSION = Path(__file__).resolve().parent / "saving_extension"
MODELS = {
    "SD1.5 fp16": ("rand_sd15_tiny", "<lora:lg_sd15_a:1> <lora:lg_sd15_text:1>", 7),
    "Flux bf16": ("tiny_flux_bf16", "<lora:lg_flux_a:1> <lora:lg_flux_text:1>", 1),
    "Flux fp8": ("tiny_flux_allfp8", "<lora:lg_flux_a:1> <lora:lg_flux_norm:1>", 1),
}


def saved_name(side, checkpoint, what):
    # Not the checkpoint's own name: servers are asked for checkpoints by a part of it.
    number = [about[0] for about in MODELS.values()].index(checkpoint)
    return f"lg_saved_{side}_{number}_{what}.safetensors"


def press(forge, what, name):
    return forge.call("/lora-guard-test/save", {"what": what, "name": name})


def waits_for_an_image(forge, name):
    """Seconds from the end of the image that was running to the end of the save: the save must not come first."""
    ends = {}

    def image():
        forge.image(prompt="a cat <lora:lg_sd15_a:1>", steps=20)
        ends["image"] = time.perf_counter()

    thread = threading.Thread(target=image)
    thread.start()
    time.sleep(2)
    answer = press(forge, "unet", name)
    ends["save"] = time.perf_counter()
    thread.join()
    assert not answer["error"], answer["error"]
    return ends["save"] - ends["image"]


def run_side(side, models, folder):
    flags = [] if side == "guard" else ["--lora-guard-off"]
    config = Path(folder) / f"{side}.json"
    config.write_text('{"forge_unet_storage_dtype": "Automatic"}')
    results = {}
    log = Path(folder) / f"{side}.log"
    with Server(log, ["--ui-settings-file", str(config), *flags], {"LORA_GUARD_SAVING": "1"}) as forge:
        for label, (checkpoint, loras, cfg) in models.items():
            found = results[label] = {"plain": forge.image(checkpoint, prompt="a cat", cfg_scale=cfg)}
            found["with LoRAs"] = forge.image(checkpoint, prompt=f"a cat {loras}", cfg_scale=cfg)
            for what in ("unet", "checkpoint"):
                found[what] = press(forge, what, saved_name(side, checkpoint, what))
            found["after saving"] = forge.image(checkpoint, prompt=f"a cat {loras}", cfg_scale=cfg)
        forge.call("/sdapi/v1/refresh-checkpoints", {})
        for label, (checkpoint, _, cfg) in models.items():
            name = saved_name(side, checkpoint, "checkpoint")
            results[label]["saved"] = forge.image(name, prompt="a cat", cfg_scale=cfg)
        if side == "guard":
            forge.image("rand_sd15_tiny", steps=1)
            results["waited"] = waits_for_an_image(forge, "lg_saved_waited.safetensors")
            refused = press(forge, "unet", "no/such/folder/model.safetensors")
            results["refused"] = refused["error"]
        return results, forge.console()


def file_differences(ours, theirs):
    """What is wrong with our file, and the largest difference in steps of a tensor's own rounding at its largest value."""
    wrong, largest = [], 0.0
    with safe_open(str(ours), "pt") as a, safe_open(str(theirs), "pt") as b:
        if set(a.keys()) != set(b.keys()):
            wrong.append(f"other names: {sorted(set(a.keys()) ^ set(b.keys()))[:4]}")
        for key in set(a.keys()) & set(b.keys()):
            x, y = a.get_tensor(key), b.get_tensor(key)
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                wrong.append(f"{key}: {x.dtype} {list(x.shape)}, stock {y.dtype} {list(y.shape)}")
            elif not x.is_floating_point():
                wrong += [] if torch.equal(x, y) else [f"{key}: other values"]
            else:
                x, y, step = x.double(), y.double(), torch.finfo(x.dtype).eps
                gap = ((x - y).abs() / (step * y.abs().clamp_min(float(y.abs().max()) / 64))).max()
                largest = max(largest, float(gap))
    if largest > 1.01:
        wrong.append(f"off by {largest:.2f} steps of its own rounding")
    return wrong, largest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, help="one model")
    only = parser.parse_args().only
    models = {label: about for label, about in MODELS.items() if only in (None, label)}
    link_extensions()
    link = FORGE / "extensions" / "zz_lora_guard_saving"
    if not link.exists():
        link.symlink_to(EXTENSION, target_is_directory=True)
    rows, wrong = [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            (stock, _), (guard, console) = run_side("stock", models, folder), run_side("guard", models, folder)
        for label, (checkpoint, *_) in models.items():
            files = {}
            for what in ("unet", "checkpoint"):
                paths = [FOLDER / saved_name(side, checkpoint, what) for side in ("guard", "stock")]
                for side, found in (("guard", guard[label]), ("stock", stock[label])):
                    if found[what]["error"]:
                        wrong.append(f"{side}, {label}, {what}: {found[what]['error']}")
                files[what], steps = file_differences(*paths)
                wrong += [f"{label}, {what}: {line}" for line in files[what]]
                sizes = [f"{found[what]['grown_bytes'] / 2**20:.0f}" for found in (stock[label], guard[label])]
                times = [f"{found[what]['seconds']:.2f}" for found in (stock[label], guard[label])]
                rows.append([label, what, f"{paths[0].stat().st_size / 2**20:.0f}", *sizes, *times, f"{steps:.2f}"])
            for side, found in (("stock", stock[label]), ("guard", guard[label])):
                effect = difference(found["with LoRAs"], found["plain"])
                same = difference(found["saved"], found["with LoRAs"])
                print(f"{label}, {side}: LoRAs change {show(effect)}, saved against with LoRAs {show(same)}")
                if side == "guard" and label != "Flux fp8" and same[0] > LARGEST_GAP:
                    wrong.append(f"{label}: the saved model's picture is {show(same)} from the one with LoRAs")
                if effect[0] < 4 * LARGEST_GAP:
                    wrong.append(f"{label}: the LoRAs change nothing, so nothing is tested")
            if difference(guard[label]["saved"], stock[label]["saved"])[0] > LARGEST_GAP:
                wrong.append(f"{label}: the guard's saved model makes another picture than stock's")
            if difference(guard[label]["after saving"], guard[label]["with LoRAs"]) != (0, 0.0):
                wrong.append(f"{label}: saving changed the model")
    finally:
        link.unlink()
        for path in FOLDER.glob("lg_saved_*"):
            path.unlink()
    head = ["model", "saved", "file MB", "stock grows by MB", "guard", "stock s", "guard s", "steps apart"]
    print(markdown(head, rows))
    print("\n".join(line for line in console.splitlines() if "lg_saved" in line and "LoRA Guard" in line))
    print(f"a save during an image ended {guard['waited']:.2f} s after it; no folder: {guard['refused']}")
    if guard["waited"] < 0:
        wrong.append("a save did not wait for the image")
    if "no such folder" not in guard["refused"]:
        wrong.append("saving into no folder was not refused")
    print("\n".join(wrong) or "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
