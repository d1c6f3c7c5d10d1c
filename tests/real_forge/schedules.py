"""Strengths that change over the steps, in a running Forge: pictures against pictures that must or must not be the same.

FORGE_ROOT=... FORGE_PYTHON=... LORA_GUARD_TEST_PORT=7914 $FORGE_PYTHON tests/real_forge/schedules.py
"""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import attempt, link_extensions
from real_forge.server import Server, png_base64

SD, FLUX = "rand_sd15_tiny", "tiny_flux_allfp8"
A, B = "lg_sd15_a", "lg_sd15_b"
CURVE = "0@0,1@0.5,0@1"
HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "hr_second_pass_steps": 4,
    "denoising_strength": 0.6,
    "hr_upscaler": "Latent",
    "hr_additional_modules": ["Use same choices"],
}


def pairs(forge):
    """`{what: (picture, picture, whether they must be the same)}`."""

    def make(prompt, **settings):
        return forge.image(prompt=f"a cat {prompt}", steps=8, **settings)

    found = {}

    def check(name, one, other, same):
        found[name] = (one, other, same)

    plain = forge.image(SD, prompt="a cat ", steps=8)
    numbers = {s: make(f"<lora:{A}:{s}>") for s in (0, 0.5, 0.7, 1)}
    curve = make(f"<lora:{A}:{CURVE}>")
    for strength, picture in numbers.items():
        check(f"a curve and strength {strength}", curve, picture, False)
    check("the image after it, without a LoRA", make(""), plain, True)
    check("the same curve again", make(f"<lora:{A}:{CURVE}>"), curve, True)
    check("first strength as a number after it", make(f"<lora:{A}:0>"), numbers[0], True)
    check("a constant schedule and its number", make(f"<lora:{A}:0.7@0,0.7@0.3,0.7@1>"), numbers[0.7], True)
    check("the extension's other name", make(f"<loractl:{A}:{CURVE}>"), curve, True)
    check("named arguments", make(f"<lora:{A}:te=0:unet={CURVE}>"), curve, True)
    check("steps by number", make(f"<lora:{A}:0@0;1@3;0@6>"), curve, True)
    check("strength 1 until step 3 and then 0", make(f"<lora:{A}:1:1@3,0@3.5>"), numbers[1], False)

    both = make(f"<lora:{A}:{CURVE}> <lora:{B}:1@0,0@1>")
    check("two schedules and one of them", both, curve, False)
    check("a broken schedule beside a good one", make(f"<lora:{A}:{CURVE}> <lora:{B}:1@0,x@1>"), curve, True)
    check("a broken schedule beside a number", make(f"<lora:{B}:1@0@2> <lora:{A}:1>"), numbers[1], True)

    count = make(f"<lora:{A}:{CURVE}>", n_iter=2, batch_size=1)
    check("first of two batches", count[:1], curve, True)
    check("second of two batches", count[1:2], make(f"<lora:{A}:{CURVE}>", seed=2), True)

    number = make(f"<lora:{A}:1>", hr_prompt=f"a cat <lora:{A}:0.5>", **HIRES)
    check("hires with hr=", make(f"<lora:{A}:1:hr=0.5>", **HIRES), number, True)
    check("hires with a schedule of its own", make(f"<lora:{A}:1:hr=0.5@0,0@1>", **HIRES), number, False)
    check("first pass after a hires pass", make(f"<lora:{A}:{CURVE}>"), curve, True)

    start = {"init_images": [png_base64(plain[0])], "denoising_strength": 0.5, "endpoint": "img2img"}
    check("img2img", make(f"<lora:{A}:{CURVE}>", **start), make(f"<lora:{A}:0>", **start), False)
    check("img2img, constant", make(f"<lora:{A}:1@0,1@1>", **start), make(f"<lora:{A}:1>", **start), True)
    for sampler in ("Heun", "DPM2", "DDIM", "UniPC", "DPM++ 2M"):
        one, two = (make(f"<lora:{A}:{s}>", sampler_name=sampler) for s in (CURVE, "0"))
        check(f"sampler {sampler}", one, two, False)
        constant = [make(f"<lora:{A}:{s}>", sampler_name=sampler) for s in ("1@0,1@1", "1")]
        check(f"sampler {sampler}, constant", *constant, True)
    for prompt in ("AND a dog", "[red:blue:0.5]"):
        one, two = (make(f"<lora:{A}:{s}> {prompt}") for s in ("1@0,1@1", "1"))
        check(f"prompt with {prompt}", one, two, True)

    interrupt(forge, f"a dog <lora:{A}:1@0,0.3@1>")
    check("after an interrupt", make(f"<lora:{A}:1>"), numbers[1], True)

    flux = {"cfg_scale": 1}
    forge.image(FLUX, prompt="a cat", steps=8, **flux)
    one, two, three = (make(f"<lora:lg_flux_a:{s}>", **flux) for s in ("0@0,1@1", "1@0,1@1", "1"))
    check("Flux fp8, a ramp", one, three, False)
    check("Flux fp8, constant", two, three, True)
    check("back on the first checkpoint", forge.image(SD, prompt="a cat ", steps=8), plain, True)
    return found


def interrupt(forge, prompt):
    thread = threading.Thread(target=lambda: attempt(lambda: forge.image(prompt=prompt, steps=150)))
    thread.start()
    time.sleep(4)
    forge.call("/sdapi/v1/interrupt", {})
    thread.join()


def infotext(forge):
    tag = f"<lora:{A}:{CURVE}:hr=0.5>"
    body = {"prompt": f"a cat {tag}", "steps": 2, "width": 64, "height": 64, "sampler_name": "Euler"}
    return tag in json.loads(forge.call("/sdapi/v1/txt2img", body)["info"])["infotexts"][0]


def milliseconds_per_step(forge, steps=20, times=3):
    """What a schedule adds to a step of the tiny SD1.5, whose LoRA has few layers: medians of whole images."""
    seconds = {}
    for strength in ["1", "1@0,0.5@1"] * times:
        started = time.perf_counter()
        forge.image(prompt=f"a cat <lora:{A}:{strength}>", steps=steps)
        seconds.setdefault(strength, []).append(time.perf_counter() - started)
    number, schedule = (float(np.median(values)) * 1000 / steps for values in seconds.values())
    return number, schedule


def main():
    link_extensions()
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "console.txt") as forge:
        found, kept = pairs(forge), infotext(forge)
        console = forge.console()
        number, schedule = milliseconds_per_step(forge)
    wrong = []
    for name, (one, other, same) in found.items():
        difference = int(np.abs(one.astype(int) - other.astype(int)).max()) if one.shape == other.shape else 255
        print(f"{name}: largest difference {difference}, {'the same' if same else 'different'} is right")
        if (difference == 0) is not same:
            wrong.append(name)
    if not kept:
        wrong.append("the tag is not in the infotext")
    named = f"{B} NOT applied: its strength '1@0,x@1' is neither a number nor a schedule"
    if named not in console or "Traceback" in console:
        wrong.append("the console does not name the broken schedule, or has a traceback")
    print(f"a step with a number {number:.1f} ms, with a schedule {schedule:.1f} ms")
    print("WRONG: " + "; ".join(wrong) if wrong else "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
