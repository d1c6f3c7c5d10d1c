"""As LayerDiffuse: a clone of the U-Net for each pass gets patches through `load_frozen_patcher`, whose values are lists
of 16, mostly None. Setting: `{"strength": number}`."""

import lg_neighbours
import torch

if lg_neighbours.wanted("frozen"):

    class Frozen(lg_neighbours.script_class()):
        called = "frozen patcher"

        def process_before_every_sampling(self, p, setting="", **kwargs):
            setting = self.read(setting)
            if not setting:
                return
            lg_neighbours.work("frozen patcher")
            unet = p.sd_model.forge_objects.unet.clone()
            unet.load_frozen_patcher("layer_xl_transparent.safetensors", state_dict(unet.model), setting["strength"])
            p.sd_model.forge_objects.unet = unet


def state_dict(model):
    """Low-rank patches on every third linear weight, a full difference on two others."""
    generator = torch.Generator().manual_seed(21)
    weights = {k: p.shape for k, p in model.named_parameters() if k.endswith(".weight") and p.dim() == 2}
    picked = sorted(weights)[::3]
    state = {}
    for key in picked:
        rows, columns = weights[key]
        up = torch.randn(rows, 4, generator=generator) * 0.2
        state |= {f"{key}::lora::0": up, f"{key}::lora::1": torch.randn(4, columns, generator=generator) / columns**0.5}
    for key in sorted(set(weights) - set(picked))[:2]:
        rows, columns = weights[key]
        state[f"{key}::diff::0"] = torch.randn(rows, columns, generator=generator) / columns**0.5 * 0.3
    return state
