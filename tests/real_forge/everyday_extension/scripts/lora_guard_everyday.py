"""Test-only extension: with LORA_GUARD_EVERYDAY=1 Forge interrupts, details, counts and reloads when a test asks for it.

Linked into extensions/ by tests/real_forge/sides.py. Does nothing without the variable.
"""

import base64
import io
import os
import types

from modules import script_callbacks, scripts

WANTED = bool(os.environ.get("LORA_GUARD_EVERYDAY"))


class Everyday(scripts.Script):
    """API arguments: the prompt of a detailing second pass ("" = none), "interrupt" or "skip" ("" = none), and at which
    step of the first image."""

    def title(self):
        return "lora guard everyday"

    def show(self, is_img2img):
        return scripts.AlwaysVisible if WANTED else False

    def ui(self, is_img2img):
        import gradio

        return [gradio.Textbox("", visible=False), gradio.Textbox("", visible=False), gradio.Number(0, visible=False)]

    def process(self, p, detail="", stop="", step=0):
        p.lora_guard_stop = (stop, int(step or 0))

    def postprocess_image(self, p, pp, detail="", stop="", step=0):
        """Like ADetailer: a second pass over the finished picture, with a prompt and cond caches of its own."""
        if not detail:
            return
        from modules import processing, shared

        inner = processing.StableDiffusionProcessingImg2Img(
            init_images=[pp.image],
            denoising_strength=0.6,
            sd_model=shared.sd_model,
            prompt=detail,
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


def stop_here(params):
    from modules import shared

    p = getattr(params.denoiser, "p", None)
    stop, step = getattr(p, "lora_guard_stop", ("", 0))
    if stop and params.denoiser.step == step and getattr(p, "iteration", 0) == 0:
        p.lora_guard_stop = ("", 0)
        getattr(shared.state, stop)()


def kept():
    """What outlives a Reload UI: the counts, and whether the loader is hooked."""
    import sys

    name = "lora_guard_everyday_kept"
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].counts = {"encodes": 0, "forwards": 0}
    return sys.modules[name]


def count(sd_model):
    """Counts prompts that are encoded, and passes through the text encoders."""
    counts, encode = kept().counts, sd_model.get_learned_conditioning

    def counted(*args, **kwargs):
        counts["encodes"] += 1
        return encode(*args, **kwargs)

    def passed(*_):
        counts["forwards"] += 1

    sd_model.get_learned_conditioning = counted
    for encoder in sd_model.forge_objects.clip.cond_stage_model.children():
        getattr(encoder, "transformer", encoder).register_forward_pre_hook(passed)


def routes(demo, app):
    from modules import call_queue, processing, sd_models, shared
    from modules_forge import main_thread

    model = sd_models.model_data.sd_model
    if model is not None and hasattr(model, "forge_objects") and "get_learned_conditioning" not in vars(model):
        count(model)  # loaded before this extension was

    def tab(body: dict):
        """What a second browser tab does: the queue's lock, then the main thread."""

        def generate():
            p = processing.StableDiffusionProcessingTxt2Img(
                sd_model=shared.sd_model, do_not_save_samples=True, do_not_save_grid=True, **body
            )
            p.scripts = p.script_args = None
            return processing.process_images(p).images[0]

        with call_queue.queue_lock:
            shared.state.begin(job="tab")
            try:
                image = main_thread.run_and_wait_result(generate)
            finally:
                shared.state.end()
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return {"image": base64.b64encode(buffer.getvalue()).decode()}

    def reload_ui(body: dict):
        shared.state.request_restart()
        return {}

    app.add_api_route("/lora-guard-test/counts", lambda: kept().counts, methods=["GET"])
    app.add_api_route("/lora-guard-test/tab", tab, methods=["POST"])
    app.add_api_route("/lora-guard-test/reload-ui", reload_ui, methods=["POST"])


if WANTED:
    script_callbacks.on_cfg_denoiser(stop_here)
    script_callbacks.on_model_loaded(count)
    script_callbacks.on_app_started(routes)
