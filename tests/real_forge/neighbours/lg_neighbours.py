"""The common parts of the re-created neighbours, in Forge and in Neo. They are written from the facts in forge-facts.md; nothing is copied.

LORA_GUARD_NEIGHBOURS names those that are there: `block_weight,wrap_refresh@before`. This folder is linked into extensions/
under a name after lora-guard's, before/ under one before it.
"""

import collections
import json
import os
import sys
import types


def wanted(name):
    return name in os.environ.get("LORA_GUARD_NEIGHBOURS", "").split(",")


def work(name=None):
    """Counts what the neighbours really did, so that a test can see that they were there; outlives a Reload UI."""
    module = sys.modules.setdefault("lg_neighbours_work", types.ModuleType("lg_neighbours_work"))
    if not hasattr(module, "done"):
        module.done = collections.Counter()
    if name is not None:
        module.done[name] += 1
    return module.done


def wrap_refresh(name, force):
    """Replaces `LoraLoader.refresh` by a wrapper; `force` applies everything at every call."""
    from backend.patcher.lora import LoraLoader

    inner = LoraLoader.refresh

    def refresh(self, *args, **kwargs):
        work(name)
        if force:
            kwargs["force_refresh"] = True
        return inner(self, *args, **kwargs)

    LoraLoader.refresh = refresh


def half_the_factors(name):
    """Replaces `networks.load_lora_state_dict` by a function that hands out changed tensors."""
    import networks

    inner = networks.load_lora_state_dict

    def load(filename):
        work(name)
        return {k: v * 0.5 if "lora_up" in k or k.endswith(".lora_B.weight") else v for k, v in inner(filename).items()}

    networks.load_lora_state_dict = load


def script_class():
    """The base of the neighbours that are switched by API arguments. Made late: before/preload.py imports this file when Forge's scripts are not there yet.
    The one argument is JSON text; empty means that the neighbour is not active in this image."""
    from modules import script_callbacks, scripts

    class Neighbour(scripts.Script):
        called = ""

        def title(self):
            return f"lg {self.called}"

        def show(self, is_img2img):
            return scripts.AlwaysVisible

        def ui(self, is_img2img):
            import gradio

            return [gradio.Textbox("", visible=False)]

        @staticmethod
        def read(setting):
            return json.loads(setting) if setting else {}

        def listen_to_steps(self):
            """From now on `each_step` is called before every step, in images that do not ask for it too."""
            if not hasattr(self, "listens"):
                self.listens = script_callbacks.on_cfg_denoiser(self.each_step)

    return Neighbour
