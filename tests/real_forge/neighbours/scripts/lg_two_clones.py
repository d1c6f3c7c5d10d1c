"""As Fooocus inpaint: two clones of one U-Net, one with patches of an own kind, take turns in mid-sampling; and as
ControlNet, FreeU and others: a new clone for every pass, with a module that must be loaded beside it.

Setting: `{"turns": true}` or `{"clones": number}`.
"""

import lg_neighbours
import torch
from backend import memory_management
from backend.patcher import lora
from backend.sampling.sampling_function import sampling_prepare

KIND = "lg_inpaint"


def calculate(weight, strength, value):
    """Eight-bit differences with their range."""
    quantised, low, high = (v.to(weight.device, torch.float32) for v in value)
    return weight + (strength * (quantised / 255 * (high - low) + low)).to(weight.dtype)


if lg_neighbours.wanted("two_clones"):
    lora.extra_weight_calculators[KIND] = calculate

    class TwoClones(lg_neighbours.script_class()):
        called = "two clones"

        def process_before_every_sampling(self, p, setting="", **kwargs):
            setting = self.read(setting)
            for _ in range(setting.get("clones", 0)):
                lg_neighbours.work("clone")
                unet = p.sd_model.forge_objects.unet.clone()
                unet.add_extra_torch_module_during_sampling(torch.nn.Linear(8, 8), cast_to_unet_dtype=False)
                p.sd_model.forge_objects.unet = unet
            if setting.get("turns"):
                p.sd_model.forge_objects.unet = self.turning(p.sd_model.forge_objects.unet)

        def turning(self, unet):
            plain, patched = unet.clone(), unet.clone()
            patched.add_patches(filename="inpaint.patch", patches=patches(patched.model))
            turn = [0]

            def modifier(model, x, *rest):
                turn[0] += 1
                target = patched if turn[0] % 2 else plain
                if all(loaded.model is not target for loaded in memory_management.current_loaded_models):
                    lg_neighbours.work("turn")
                    sampling_prepare(target, x)
                return (target.model, x, *rest)

            patched.add_conditioning_modifier(modifier)
            return patched


def patches(model):
    generator = torch.Generator().manual_seed(22)
    found = {}
    for key, p in sorted(model.named_parameters()):
        shape = getattr(p, "shape", None)
        if key.endswith(".weight") and len(shape) == 2 and len(found) < 12:
            steps = torch.randint(0, 256, tuple(shape), generator=generator, dtype=torch.uint8)
            found[key] = (KIND, (steps, torch.tensor(-0.5 / shape[1] ** 0.5), torch.tensor(0.5 / shape[1] ** 0.5)))
    return found
