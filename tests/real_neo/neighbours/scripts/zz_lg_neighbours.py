"""Other extensions on the guard's ground in Forge Neo, re-created from what they do; nothing is copied.

Each rests in an image that does not ask for it, by JSON text as its API argument.
"""

import sys
from pathlib import Path

import torch
from backend import memory_management
from backend.args import dynamic_args
from backend.patcher.base import ModelPatcher
from backend.sampling.sampling_function import sampling_prepare
from modules import shared
from modules_forge.packages.comfy.weight_adapter.lora import LoRAAdapter

# This folder is linked into Neo's extensions, so that the path leads to Forge's neighbours.
_shared = str(Path(__file__).resolve().parents[3] / "real_forge" / "neighbours")
if _shared not in sys.path:
    sys.path.append(_shared)
import lg_neighbours  # noqa: E402

Neighbour = lg_neighbours.script_class()


def differences(model, seed, share, count=None):
    """A full difference on linear weights of a denoiser, as Neo's own merge takes it."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for key, parameter in sorted(model.named_parameters()):
        if key.endswith(".weight") and len(parameter.shape) == 2 and (count is None or len(found) < count):
            rows, columns = parameter.shape
            found[key] = torch.randn(rows, columns, generator=generator) * share / columns**0.5
    return found


class BlockWeight(Neighbour):
    """As LoRA Mixer, which reads its weights in the prompt's tags: `load_lora_for_models` and `add_patches` wrapped, which stay so; each block's keys are added at a strength
    of their own. Setting: `{part of a key: factor}`."""

    called = "block weight"
    weights, at_work = {}, False

    def process(self, p, setting="", **kwargs):
        wanted = self.read(setting)
        if wanted != BlockWeight.weights:
            # What is loaded does not know of weights.
            shared.sd_model.current_lora_hash = None
        BlockWeight.weights = wanted
        if wanted:
            self.wrap()

    def wrap(self):
        networks = sys.modules["networks"]
        if getattr(networks.load_lora_for_models, "weighs", False):
            return
        load, add = networks.load_lora_for_models, ModelPatcher.add_patches

        def load_lora_for_models(*args, **kwargs):
            BlockWeight.at_work = True
            try:
                return load(*args, **kwargs)
            finally:
                BlockWeight.at_work = False

        def add_patches(patcher, patches, strength_patch=1.0, *args, **kwargs):
            if not (BlockWeight.at_work and BlockWeight.weights):
                return add(patcher, patches, strength_patch, *args, **kwargs)
            groups = {}
            for key, value in patches.items():
                name = key if isinstance(key, str) else key[0]
                factor = next((factor for part, factor in BlockWeight.weights.items() if part in name), 1.0)
                groups.setdefault(factor, {})[key] = value
            used = list(groups.pop(0, {}))
            for factor, group in groups.items():
                used += add(patcher, group, strength_patch * factor, *args, **kwargs)
            return used

        load_lora_for_models.weighs = True
        networks.load_lora_for_models, ModelPatcher.add_patches = load_lora_for_models, add_patches


class StrengthPerStep(Neighbour):
    """As loractl: the denoiser gets its LoRA anew before each step, from Neo's own functions.

    Setting: `{"file": path, "strengths": [one for each step]}`."""

    called = "strength per step"
    setting = None

    def process(self, p, setting="", **kwargs):
        self.setting = self.read(setting)
        if self.setting:
            self.listen_to_steps()

    def each_step(self, params):
        if not self.setting:
            return
        networks, model = sys.modules["networks"], shared.sd_model
        strength = self.setting["strengths"][params.denoiser.step]
        unet, path = model.forge_objects_original.unet, self.setting["file"]
        state = networks.load_lora_state_dict(path)
        # As Neo's own loading does: it never merges into GGUF.
        online = dynamic_args.online_lora
        unet, _ = networks.load_lora_for_models(unet, None, state, strength, 0.0, filename=path, online_mode=online)
        model.forge_objects.unet = unet
        sampling_prepare(unet, params.x)

    def postprocess(self, p, processed, setting="", **kwargs):
        self.setting = None


class Frozen(Neighbour):
    """As LayerDiffuse: a clone for each pass with patches of its own, low-rank ones and full differences.

    They go through `add_patches`: what `load_frozen_patcher` makes of a file, Neo's merge refuses. Setting: `{"strength": number, "first": before LoRAs of the prompt,
    "online": in each forward pass}`."""

    called = "frozen patcher"

    def process_before_every_sampling(self, p, setting="", **kwargs):
        setting = self.read(setting)
        if not setting:
            return
        unet = p.sd_model.forge_objects.unet.clone()
        patches, generator = {}, torch.Generator().manual_seed(21)
        for place, (key, value) in enumerate(differences(unet.model, 21, 0.3).items()):
            up, down = torch.randn(value.shape[0], 4, generator=generator) * 0.15, value[:4].clone()
            patches[key] = LoRAAdapter(set(), (up, down, None, None, None, None)) if place % 2 else (value,)
        online = setting.get("online", False)
        unet.add_patches(patches, setting["strength"], filename="layers.safetensors", online_mode=online)
        if setting.get("first"):
            for key in patches:
                unet.patches[key].insert(0, unet.patches[key].pop())
        p.sd_model.forge_objects.unet = unet


class ObjectPatch(Neighbour):
    """A clone for one pass in which one layer of the denoiser is another object. Setting: `{"layer": its name}`."""

    called = "object patch"

    def process_before_every_sampling(self, p, setting="", **kwargs):
        setting = self.read(setting)
        if not setting:
            return
        unet = p.sd_model.forge_objects.unet.clone()
        own = unet.get_model_object(setting["layer"])
        generator = torch.Generator().manual_seed(23)
        layer = torch.nn.Conv2d(own.in_channels, own.out_channels, own.kernel_size, padding=own.padding)
        layer.weight = torch.nn.Parameter(
            torch.randn(own.weight.shape, generator=generator) / own.in_channels**0.5, requires_grad=False
        )
        layer.bias = torch.nn.Parameter(torch.zeros(own.out_channels), requires_grad=False)
        unet.add_object_patch(setting["layer"], layer)
        p.sd_model.forge_objects.unet = unet


class Clones(Neighbour):
    """As FreeU and ControlNet: a new clone for every pass, with a module that is loaded beside it; and as Fooocus inpaint: two
    clones, one with patches, take turns in mid-sampling. Setting: `{"clones": number}` or `{"turns": true}`."""

    called = "clones"

    def process_before_every_sampling(self, p, setting="", **kwargs):
        setting = self.read(setting)
        for _ in range(setting.get("clones", 0)):
            unet = p.sd_model.forge_objects.unet.clone()
            unet.add_extra_torch_module_during_sampling(torch.nn.Linear(8, 8), cast_to_unet_dtype=False)
            unet.set_model_unet_function_wrapper(lambda apply, params: apply(params["input"] * 1.2, params["timestep"], **params["c"]))  # fmt: skip
            p.sd_model.forge_objects.unet = unet
        if setting.get("turns"):
            p.sd_model.forge_objects.unet = turning(p.sd_model.forge_objects.unet)


def turning(unet):
    plain, patched = unet.clone(), unet.clone()
    changes = {key: (value,) for key, value in differences(patched.model, 22, 0.4, 12).items()}
    patched.add_patches(changes, 1.0, filename="inpaint.patch", online_mode=False)
    turn = [0]

    def modifier(model, x, *rest):
        turn[0] += 1
        target = patched if turn[0] % 2 else plain
        if all(one.model is not target for one in memory_management.current_loaded_models):
            sampling_prepare(target, x)
        return (target.model, x, *rest)

    plain.add_conditioning_modifier(modifier)
    return plain
