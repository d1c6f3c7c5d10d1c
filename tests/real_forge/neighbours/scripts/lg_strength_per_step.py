"""As sd-webui-loractl: another strength at every step. Setting: `{"strengths": [per step], "way": "key" or "force"}`:
under a new key, or in place under the old one with `force_refresh`."""

import lg_neighbours
from modules import shared

if lg_neighbours.wanted("strength_per_step"):

    class StrengthPerStep(lg_neighbours.script_class()):
        called = "strength per step"
        setting = None

        def process(self, p, setting="", **kwargs):
            self.setting = self.read(setting)
            if self.setting:
                self.listen_to_steps()

        def each_step(self, params):
            if self.setting:
                strengths = self.setting["strengths"]
                self.set(strengths[min(params.denoiser.step, len(strengths) - 1)])

        def set(self, strength):
            lg_neighbours.work("strength per step")
            unet = shared.sd_model.forge_objects.unet
            if self.setting["way"] == "key":
                unet.lora_patches = {
                    (key[0], strength, *key[2:]): {k: [[strength, *e[1:]] for e in v] for k, v in patches.items()}
                    for key, patches in unet.lora_patches.items()
                }
                unet.refresh_loras()
                return
            for patches in unet.lora_patches.values():
                for entries in patches.values():
                    for entry in entries:
                        entry[0] = strength
            unet.lora_loader.refresh(
                lora_patches=unet.lora_patches, offload_device=unet.offload_device, force_refresh=True
            )

        def postprocess(self, p, processed, setting="", **kwargs):
            if self.setting:
                self.set(1.0)
                self.setting = {}
                shared.sd_model.current_lora_hash = None
