"""As sd-webui-lora-block-weight: other strengths per block, written into `lora_patches` under a key of its own, and a
start and a stop step in mid-sampling, for which the key gets the time until `refresh_loras()` is done.

Setting: `{"blocks": {"part of a key": factor}, "start": step, "stop": step}`.
"""

import time

import lg_neighbours
from modules import shared

LOW_RANK = ("lora", "loha", "lokr")

if lg_neighbours.wanted("block_weight"):

    class BlockWeight(lg_neighbours.script_class()):
        called = "block weight"
        setting = None

        def before_process_batch(self, p, setting="", **kwargs):
            if setting or self.setting is not None:
                forget()  # from its first image on, in images without it too

        def process_batch(self, p, setting="", **kwargs):
            self.setting = self.read(setting)
            if not self.setting:
                return
            after = shared.sd_model.forge_objects_after_applying_lora
            starts = self.setting.get("start") in (None, 0)
            for patches in (after.unet.lora_patches, after.clip.patcher.lora_patches):
                for key in list(patches):
                    weighed = (key[0], f"1,{self.setting['blocks']}", *key[2:])
                    patches[weighed] = self.weighed(patches.pop(key), starts)
            self.listen_to_steps()

        def weighed(self, patches, on):
            for key, entries in patches.items():
                factor = next((f for part, f in self.setting["blocks"].items() if part in key), 1.0)
                kept = [entry for entry in entries if entry[1][0] in LOW_RANK]
                patches[key] = [(entry[0] * factor if on is True else 0, *entry[1:]) for entry in kept]
                for new, old in zip(patches[key], kept, strict=True):
                    STRENGTHS.setdefault(id(new[1]), old[0] * factor)
            return patches

        def each_step(self, params):
            step = params.denoiser.step
            if not self.setting or step not in (self.setting.get("start"), self.setting.get("stop")) or step == 0:
                return
            lg_neighbours.work("block weight in mid-sampling")
            unet = shared.sd_model.forge_objects.unet
            patches, stamped = unet.lora_patches, {}
            for key in list(patches):
                on = step == self.setting.get("start")
                for name, entries in patches[key].items():
                    patches[key][name] = [(STRENGTHS[id(e[1])] if on else 0, *e[1:]) for e in entries]
                stamped[key] = (f"{key[0]}_{time.time()}", *key[1:])
                patches[stamped[key]] = patches.pop(key)
            unet.refresh_loras()
            for key, new in stamped.items():
                patches[key] = patches.pop(new)

        def postprocess(self, p, processed, setting="", **kwargs):
            if self.read(setting):
                self.setting = {}
                STRENGTHS.clear()
                forget()


STRENGTHS = {}
"""Strength of a patch value when its block is on."""


def forget():
    """The next image builds its stack anew."""
    model = shared.sd_model
    if not hasattr(model, "forge_objects_after_applying_lora"):
        return
    model.current_lora_hash = None
    model.forge_objects_after_applying_lora.unet.forge_unpatch_model()
    model.forge_objects_after_applying_lora.clip.patcher.forge_unpatch_model()
