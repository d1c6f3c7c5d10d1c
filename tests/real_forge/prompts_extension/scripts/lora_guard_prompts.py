"""Test-only extension: tells a test which prompts were encoded. Linked into extensions/ by tests/real_forge/prompts.py.

A prompt counts when its text encoder is asked onto the card, which is what an encoding costs. Nothing that reads a text is replaced.
"""

import os
import sys

from modules import processing, script_callbacks, scripts, shared

WANTED = bool(os.environ.get("LORA_GUARD_PROMPTS_TEST"))
ENCODED = []
DETAIL = {"prompt": ""}
"""The prompt of a second pass over the finished picture; empty for none."""


def asked_for():
    """Returns the prompts that are being encoded, with what they are."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "get_conds_with_caching" and "required_prompts" in frame.f_locals:
            prompts = frame.f_locals["required_prompts"]
            kind = "negative" if getattr(prompts, "is_negative_prompt", False) else "prompt"
            return [kind, *prompts]
        frame = frame.f_back
    return ["other"]


def count():
    from backend import memory_management

    load = memory_management.load_model_gpu

    def counted(model, *args, **kwargs):
        if model is shared.sd_model.forge_objects.clip.patcher:
            ENCODED.append(asked_for())
        return load(model, *args, **kwargs)

    memory_management.load_model_gpu = counted


def routes(_, app):
    def encoded():
        found = list(ENCODED)
        ENCODED.clear()
        return found

    def detail(body: dict):
        DETAIL.update(body)
        return {}

    app.add_api_route("/lora-guard-test/encoded", encoded, methods=["GET"])
    app.add_api_route("/lora-guard-test/detail", detail, methods=["POST"])


class Detailer(scripts.Script):
    """Makes a second pass with caches of its own, as ADetailer does."""

    def title(self):
        return "lora guard prompts"

    def show(self, is_img2img):
        return scripts.AlwaysVisible if WANTED else False

    def postprocess_image(self, p, pp, *_):
        if not DETAIL["prompt"]:
            return
        inner = processing.StableDiffusionProcessingImg2Img(
            init_images=[pp.image],
            denoising_strength=0.6,
            prompt=DETAIL["prompt"],
            negative_prompt="",
            steps=p.steps,
            width=p.width,
            height=p.height,
            cfg_scale=p.cfg_scale,
            seed=7,
            sampler_name=p.sampler_name,
            scheduler=p.scheduler,
            do_not_save_samples=True,
            do_not_save_grid=True,
            override_settings={},
        )
        inner.cached_c, inner.cached_uc = [None, None], [None, None]
        inner.scripts = inner.script_args = None
        pp.image = processing.process_images(inner).images[0]


if WANTED:
    count()
    script_callbacks.on_app_started(routes)
