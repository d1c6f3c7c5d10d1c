"""Test-only extension for Forge Neo. Linked into extensions/ by the scripts in tests/real_neo.

With LORA_GUARD_REFERENCE=1 LoRAs are merged in fp64 into fp32 weights on every storage, and every quantised weight is held
dequantised: the reference picture comes from Neo's own pipeline. int8 weights stay, because Neo's product of them rounds the
activations, with LoRAs or without; the LoRA's difference is multiplied beside it.

With LORA_GUARD_TINY=1 Neo takes the tiny models of `make_models.py` (`real_neo/tiny.py`).

`/lora-guard-test/room` makes the CPU play a card with room for so many MB of the denoiser: for the time of a load the device
counts as a card and free memory is what was asked for. Everything else is Neo's own decision.
"""

import contextlib
import os
import sys

import torch
from backend import memory_management as memory
from backend.patcher.base import ModelPatcher
from modules import script_callbacks, scripts, sd_models

ROOM = {"megabytes": None, "taken_megabytes": None}


def merged_in_fp64():
    """Puts the reference in place of Neo's loading: the patches are Neo's own reading of the files."""
    from backend.operations_gguf import dequantize_tensor
    from backend.quant_ops import QuantizedTensor

    sys.path.append(os.environ["LORA_GUARD_TESTS"])
    from support.reference import merge_reference

    stock = ModelPatcher.partially_load
    fields = {"lora": 5, "loha": 8, "lokr": 9, "glora": 6}

    def value(patch):
        name = getattr(patch, "name", None)
        if name is None:
            return patch
        return name, (*patch.weights, *[None] * 9)[: fields[name]]

    def dense(parameter):
        if isinstance(parameter, QuantizedTensor):
            return parameter.dequantize().double()
        return dequantize_tensor(parameter).data.double()

    def layer_of(model, key):
        return model.get_submodule(key.rpartition(".")[0])

    def has_product(model, key):
        return getattr(layer_of(model, key), "quant_format", None) == "int8_tensorwise" and key.endswith(".weight")

    def beside(model, key, change):
        """Adds the product of a weight's change to that of the int8 weight."""

        def hook(layer, inputs, output):
            return output + torch.nn.functional.linear(inputs[0], change.to(inputs[0].dtype))

        return layer_of(model, key).register_forward_hook(hook)

    def put(model, key, parameter):
        layer, name = layer_of(model, key), key.rpartition(".")[2]
        # A quantised weight is held as plain numbers: then its layer knows no format either.
        vars(layer).pop("layout_type", None)
        setattr(layer, name, parameter)

    def partially_load(self, device_to, *args, **kwargs):
        model = self.model
        if not hasattr(model, "reference"):
            patches, self.patches = self.patches, {}
            stock(self, device_to, *args, **kwargs)
            self.patches = patches
            memory.bake_gguf_model(model)
            model.reference = {"originals": {}, "patches": ({}, {}), "products": []}
            with torch.inference_mode(False), torch.no_grad():
                for key, parameter in list(model.named_parameters()):
                    if isinstance(parameter, QuantizedTensor) and not has_product(model, key):
                        put(model, key, torch.nn.Parameter(dense(parameter).float(), requires_grad=False))
        reference = model.reference
        objects = {name: id(value) for name, value in self.object_patches.items()}
        wanted = {key: [(id(p[1]), p[0]) for p in entries] for key, entries in self.patches.items()}, objects
        if wanted != reference["patches"]:
            # As long as they live their ids are theirs.
            reference["held"] = [p[1] for entries in self.patches.values() for p in entries]
            with torch.inference_mode(False), torch.no_grad():
                for key, parameter in reference["originals"].items():
                    put(model, key, parameter)
                for handle in reference["products"]:
                    handle.remove()
                reference["originals"], reference["products"] = {}, []
                # Neo's own methods exchange the objects, and leave the weights alone.
                self.unpatch_model(unpatch_weights=False)
                self.patch_model(load_weights=False)
                for key, entries in self.patches.items():
                    parameter = dict(model.named_parameters())[key]
                    stack = [[e[0], value(e[1]), e[2], e[3], e[4]] for e in entries]
                    base = dense(parameter)
                    if has_product(model, key):
                        reference["products"].append(beside(model, key, merge_reference(stack, base) - base))
                        continue
                    merged = merge_reference(stack, base).float()
                    reference["originals"][key] = parameter
                    put(model, key, torch.nn.Parameter(merged, requires_grad=False))
            reference["patches"] = wanted
        return 0

    ModelPatcher.partially_load = partially_load
    # The list of a layer's functions stays empty, so nothing is merged twice.
    print("[reference] LoRAs are merged in fp64 into fp32 weights")


@contextlib.contextmanager
def a_card_with(megabytes, model, minimum):
    """Makes the device count as a card with room for so many MB of one model's weights."""
    is_cpu, state, free = memory.is_device_cpu, memory.vram_state, memory.get_free_memory
    memory.is_device_cpu = lambda device: False
    memory.vram_state = memory.VRAMState.NORMAL_VRAM
    memory.get_free_memory = lambda *_, **__: megabytes * 2**20 + minimum - model.model_loaded_weight_memory
    try:
        yield
    finally:
        memory.is_device_cpu, memory.vram_state, memory.get_free_memory = is_cpu, state, free


def take_away(megabytes):
    """Lets the loaded denoiser make room, as Neo asks it to when another model needs some."""
    for loaded in list(memory.current_loaded_models):
        if loaded.model is not None and hasattr(loaded.model.model, "diffusion_model"):
            loaded.model.partially_unload(loaded.model.offload_device, megabytes * 2**20)


def shimmed(load_models_gpu):
    def load(models, memory_required=0, force_patch_weights=False, minimum_memory_required=None, force_full_load=False):
        denoisers = [one.model for one in models if hasattr(one.model, "diffusion_model")]
        rest = (models, memory_required, force_patch_weights, minimum_memory_required, force_full_load)
        if not denoisers and ROOM["taken_megabytes"]:
            take_away(ROOM["taken_megabytes"])
        if ROOM["megabytes"] is None or not denoisers:
            return load_models_gpu(*rest)
        required = memory_required if minimum_memory_required is None else minimum_memory_required
        minimum = max(memory.minimum_inference_memory(), required + memory.extra_reserved_memory())
        with a_card_with(ROOM["megabytes"], denoisers[0], minimum):
            return load_models_gpu(*rest)

    return load


class OtherPatches(scripts.Script):
    """API argument: "merged" or "on the fly": patches of another extension on the denoiser, through Neo's own way."""

    def title(self):
        return "lora guard neo"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        import gradio

        return [gradio.Textbox("", visible=False)]

    def process_before_every_sampling(self, p, way="", **kwargs):
        if not way:
            return
        unet = p.sd_model.forge_objects.unet.clone()
        generator, patches = torch.Generator().manual_seed(3), {}
        for key, parameter in unet.model.named_parameters():
            if key.endswith("proj_out.weight"):
                patches[key] = (torch.randn(parameter.shape, generator=generator) * 0.02,)
        unet.add_patches(patches, 1.0, filename="lora guard neo", online_mode=way == "on the fly")
        p.sd_model.forge_objects.unet = unet


def add_address(_, app):
    @app.post("/lora-guard-test/room")
    def room(body: dict):
        ROOM.update(body)
        return {}

    @app.post("/lora-guard-test/save")
    def save(body: dict):
        """What the buttons in Neo's tab of checkpoints do."""
        from modules import shared

        path = os.path.join(sd_models.model_path, f"{body['name']}.safetensors")
        getattr(shared.sd_model, body["function"])(path)
        sd_models.list_models()
        return {}


if not getattr(memory, "lora_guard_test", False):
    memory.lora_guard_test = True
    memory.load_models_gpu = shimmed(memory.load_models_gpu)
    if os.environ.get("LORA_GUARD_REFERENCE"):
        merged_in_fp64()
    if os.environ.get("LORA_GUARD_TINY"):
        sys.path.append(os.environ["LORA_GUARD_TESTS"])
        from real_neo import tiny

        tiny.shrink()
script_callbacks.on_app_started(add_address)
