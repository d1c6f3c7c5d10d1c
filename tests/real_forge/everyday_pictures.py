"""Everyday paths that make pictures; walked by everyday.py."""

import base64
import io
import threading
import time

import numpy as np
from PIL import Image

from real_forge.run import difference
from real_forge.server import png_base64
from real_forge.sides import ALL, WIDE, attempt, into

WAYS = []
way = into(WAYS)
HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "hr_second_pass_steps": 2,
    "denoising_strength": 0.6,
    "hr_upscaler": "Latent",
    "hr_additional_modules": ["Use same choices"],
}


def start_image(f):
    ramp = np.linspace(0, 255, f.model.size)
    across = np.tile(ramp, (f.model.size, 1))
    image = np.stack([(across + across.T) / 2, across, across[::-1].T], -1)
    return png_base64(image.astype(np.uint8))


def right_half(f):
    mask = np.zeros((f.model.size, f.model.size, 3), np.uint8)
    mask[:, f.model.size // 2 :] = 255
    return png_base64(mask)


# Making pictures


@way("txt2img", *ALL)
def txt2img(f):
    f.shot("one", "a cat <lora:@a:1>")
    f.shot("strength 0.5", "a cat <lora:@a:0.5>")
    f.shot("two", "a cat <lora:@a:0.7> <lora:@b:-0.6>")
    f.shot("other strength for the text encoder", "a cat <lora:@a:0.4:1>")
    f.shot("without, in between", effect=False)
    f.shot("one, again", "a cat <lora:@a:1>")


@way("img2img", *ALL)
def img2img(f):
    start = {"init_images": [start_image(f)], "denoising_strength": 0.8, "endpoint": "img2img"}
    f.shot("one", "a cat <lora:@a:1>", **start)


@way("inpaint", "Flux bf16", "Flux fp8", "SD1.5 fp16")
def inpaint(f):
    start = {"init_images": [start_image(f)], "denoising_strength": 0.9, "endpoint": "img2img"}
    f.shot("one", "a cat <lora:@a:1>", mask=right_half(f), **start)


@way("hires", *ALL)
def hires(f):
    f.shot("same LoRA", "a cat <lora:@a:1>", **HIRES)


@way("hires with other LoRAs", "Flux bf16", "Flux fp8", "SD1.5 fp16")
def hires_other(f):
    f.shot("another", "a cat <lora:@a:1>", hr_prompt="a cat <lora:@b:1>", **HIRES)
    f.shot("another text encoder too", "a cat <lora:@b:1>", hr_prompt="a cat <lora:@a:0.8>", **HIRES)
    f.shot("in the second pass only", hr_prompt="a cat <lora:@a:1>", **HIRES)
    f.shot("batch count 2", "a cat <lora:@a:1>", hr_prompt="a cat <lora:@b:1>", n_iter=2, **HIRES)


@way("refiner", "Flux bf16", "SD1.5 fp16")
def refiner(f):
    other = f.title(f"zz_second_{f.model.family}")
    second = {"refiner_checkpoint": other, "refiner_switch_at": 0.5, "steps": 4}
    f.shot("one", "a cat <lora:@a:1>", **second)


@way("batch count 2, size 2", "Flux bf16", "Flux fp8", "SD1.5 fp16")
def batch(f):
    f.shot("four pictures", "a cat <lora:@a:1>", n_iter=2, batch_size=2)


@way("X/Y/Z plot", *WIDE)
def xyz(f):
    axes = next(s for s in f.forge.call("/sdapi/v1/script-info") if s["name"] == "x/y/z plot" and not s["is_img2img"])
    search = axes["args"][0]["choices"].index("Prompt S/R")

    def grid(prompt, x, y):
        values = [search, f.named(x), [], search, f.named(y), [], 0, "", [], False, False, False, False]
        return f.image(prompt, script_name="X/Y/Z plot", script_args=[*values, False, False, False, 0, False])

    strengths = f.shot(
        "strengths and names", "a cat <lora:@a:0.25>", make=grid, x="0.25,0.75,1", y="@a,@b", effect=False
    )
    singles = [f.image(f"a cat <lora:@{name}:{s}>")[0] for name in "ab" for s in ("0.25", "0.75", "1")]
    together = np.vstack([np.hstack(singles[:3]), np.hstack(singles[3:])])[None]
    f.check(
        not isinstance(strengths, str) and difference(strengths, together) == (0, 0.0),
        "cells are not the single pictures",
    )
    apart = min(difference(a, b)[0] for i, a in enumerate(singles) for b in singles[:i])
    f.check(apart > 8, f"cells differ by {apart} only")


@way("prompt editing and AND", *WIDE)
def editing(f):
    f.shot("[a:b:0.5]", "a [cat:dog:0.5] <lora:@a:1>", steps=4)
    f.shot("[a|b]", "a [cat|dog] <lora:@a:1>", steps=4)
    if f.model.cfg > 1:
        f.shot("AND", "a cat AND a dog :0.7 <lora:@a:1>")
        f.shot("AND with two", "a cat <lora:@a:1> AND a [dog:fox:0.5] <lora:@b:0.5>", steps=4)


@way("second pass of a detailer", "Flux bf16", "Flux fp8", "SD1.5 fp16")
def detailer(f):
    def detailed(prompt, inner, **settings):
        return f.image(prompt, alwayson_scripts={"lora guard everyday": {"args": [f.named(inner), "", 0]}}, **settings)

    f.shot("another LoRA inside", "a cat <lora:@a:1>", make=detailed, inner="a face <lora:@b:1>")
    f.shot("the same inside", "a cat <lora:@a:1>", make=detailed, inner="a face <lora:@a:1>")
    f.shot("inside only", "a cat", make=detailed, inner="a face <lora:@a:1>")
    f.shot("outside only, 2 pictures", "a cat <lora:@a:1>", make=detailed, inner="a face", n_iter=2, effect=False)
    f.shot("after that", "a cat <lora:@b:1>")


@way("interrupt", "Flux bf16", "Flux fp8", "SD1.5 fp16")
def interrupt(f):
    def stopped(prompt, **settings):
        return f.image(prompt, alwayson_scripts={"lora guard everyday": {"args": ["", "interrupt", 2]}}, **settings)

    f.shot("stopped", "a cat <lora:@a:1>", make=stopped, steps=8)
    f.shot("next, another", "a cat <lora:@b:1>")
    f.shot("next, the same", "a cat <lora:@a:1>")
    f.shot("stopped in hires", "a cat <lora:@a:1>", make=stopped, hr_prompt="a cat <lora:@b:1>", effect=False, **HIRES)
    f.shot("next, two", "a cat <lora:@a:0.5> <lora:@b:0.5>")


@way("interrupt from outside", "SD1.5 fp16")
def interrupt_outside(f):
    long = threading.Thread(target=lambda: attempt(lambda: f.image("a dog <lora:@b:1>", steps=150)))
    long.start()
    time.sleep(2.5)
    f.forge.call("/sdapi/v1/interrupt", {})
    long.join()
    f.shot("next", "a cat <lora:@a:1>")


@way("skip", *WIDE)
def skip(f):
    def skipped(prompt, **settings):
        return f.image(
            prompt, alwayson_scripts={"lora guard everyday": {"args": ["", "skip", 2]}}, n_iter=2, **settings
        )

    f.shot("first of two skipped", "a cat <lora:@a:1>", make=skipped, steps=5)
    f.shot("next", "a cat <lora:@b:1>")


@way("series of 20, 3 stacks in turn", "Flux bf16", "Flux fp8", "Flux Q4_K")
def series(f):
    stacks = ["a cat <lora:@a:1>", "a dog <lora:@a:0.5> <lora:@b:0.5>", "a cat <lora:@b:1>"]
    seen = {}
    for n in range(20):
        prompt = stacks[n % 3]
        image = f.shot(f"{n % 3}", prompt) if n < 3 else f.image(prompt)
        same = seen.setdefault(prompt, image)
        f.check(difference(image, same) == (0, 0.0), f"picture {n} is not the earlier one of the same stack")


@way("two browser tabs", *WIDE)
def tabs(f):
    def in_tab(prompt):
        body = {"prompt": f.named(prompt), "steps": f.model.steps, "width": f.model.size, "height": f.model.size}
        body |= {"cfg_scale": f.model.cfg, "seed": 3, "sampler_name": "Euler", "scheduler": "Simple"}
        answer = f.forge.call("/lora-guard-test/tab", body)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"]))).convert("RGB"))[None]

    wanted = [
        ("API 1", f.image, "a cat <lora:@a:1>"),
        ("tab 1", in_tab, "a cat <lora:@b:1>"),
        ("API 2", f.image, "a cat <lora:@a:0.5>"),
        ("tab 2", in_tab, "a cat <lora:@a:0.5> <lora:@b:0.5>"),
        ("tab 3", in_tab, "a dog"),
    ]
    images = {}

    def ask(label, make, prompt):
        images[label] = attempt(lambda: make(prompt))

    threads = [threading.Thread(target=ask, args=request) for request in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for label, _, _ in wanted:
        f.keep(label, images.get(label, "no answer"))
