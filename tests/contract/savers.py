"""Models, engines and LoRAs for the tests of what is saved."""

import importlib
import types

import safetensors.torch
import torch
from support.live_memory import LiveMemory
from support.make import Net, host_value, rand
from support.reference import merge_reference

from contract.host import REAL
from lib_lora_guard.patching.deferred import DeferredTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
WIDTH = 32
UNET = "model.diffusion_model."


class Whole(torch.nn.Module):
    """A model as the host's patcher holds it: what is saved is a part of it."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model


class TextModel(torch.nn.Module):
    """One block of a CLIP, by the names that converters look for."""

    def __init__(self, width=WIDTH):
        super().__init__()
        layer = torch.nn.Module()
        layer.self_attn = torch.nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(layer.self_attn, name, torch.nn.Linear(width, width))
        layer.layer_norm1 = torch.nn.LayerNorm(width)
        text_model = torch.nn.Module()
        text_model.encoder = torch.nn.Module()
        text_model.encoder.layers = torch.nn.ModuleList([layer])
        self.clip_g = torch.nn.Module()
        self.clip_g.transformer = torch.nn.Module()
        self.clip_g.transformer.text_model = text_model
        self.clip_g.transformer.text_projection = torch.nn.Linear(width, width, bias=False)


def filled(model, dtype, seed):
    state = {k: rand(*v.shape, seed=seed + n, scale=0.2) for n, (k, v) in enumerate(model.state_dict().items())}
    return {k: v.to(dtype) for k, v in state.items()}


def made(host, make, state, dtype):
    with host.operations.using_forge_operations(dtype=dtype, manual_cast_enabled=dtype != torch.float32):
        model = make()
    model.load_state_dict(state)
    for key, parameter in model.named_parameters():
        # Raw parameters do not take the layers' dtype.
        parameter.data = parameter.data.to(dtype) if dtype != torch.float8_e4m3fn else state[key].clone()
    return model.requires_grad_(False)


def patcher_of(host, model):
    cpu = torch.device("cpu")
    return host.base.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class Sdxl:
    """What a converter for files does to a text encoder: renames, a transposed weight, q, k and v in one."""

    @staticmethod
    def for_saving(state):
        if REAL:
            from huggingface_guess import model_list

            return model_list.SDXLRefiner.process_clip_state_dict_for_saving(None, state)
        saved = {}
        start = "clip_g.transformer.text_model.encoder.layers.0."
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{start}self_attn.{n}_proj.{leaf}") for n in "qkv"]
            assert None not in parts
            joined = torch.empty((3 * WIDTH, *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device)
            for n, part in enumerate(parts):
                joined[n * WIDTH : (n + 1) * WIDTH] = part
            saved[f"conditioner.attn.in_proj_{leaf}"] = joined
        projection = state.pop("clip_g.transformer.text_projection.weight")
        saved["conditioner.text_projection"] = projection.transpose(0, 1).contiguous()
        return saved | {k.replace("clip_g.transformer", "conditioner"): v for k, v in state.items()}


def engine_class():
    """The host's engine, saving as its SDXL does: a function of a module that imports these two."""
    base = importlib.import_module("backend.diffusion_engine.base")
    code = (
        "def save_checkpoint(self, filename):\n"
        "    o, read = self.forge_objects, utils.get_state_dict_after_quant\n"
        "    sd = dict(read(o.unet.model.diffusion_model, prefix='model.diffusion_model.'))\n"
        "    sd.update(for_saving(read(o.clip.cond_stage_model, prefix='')))\n"
        "    sd.update(read(o.vae.first_stage_model, prefix='first_stage_model.'))\n"
        "    sf.save_file(sd, filename)\n"
        "    return filename\n"
    )
    utils = importlib.import_module("backend.utils")
    names = {"utils": utils, "sf": safetensors.torch, "for_saving": Sdxl.for_saving}
    exec(code, names)
    functions = {"__init__": lambda self: None, "save_checkpoint": names["save_checkpoint"]}
    return type("Engine", (base.ForgeDiffusionEngine,), functions)


def engine_of(host, unet, text=None, vae=None):
    engine = host.engine_class()
    engine.forge_objects = types.SimpleNamespace(
        unet=unet,
        clip=types.SimpleNamespace(cond_stage_model=text),
        vae=types.SimpleNamespace(first_stage_model=vae),
    )
    return engine


class LiveTensors(LiveMemory):
    """A deferred tensor has a storage that says its size and takes no memory."""

    def _note(self, tensor, is_new):
        if not isinstance(tensor, DeferredTensor):
            super()._note(tensor, is_new)


def patches_on(model, seed, prefix="diffusion_model."):
    """LoRAs on everything: whole weights, slices of the fused ones, a DoRA, a whole difference, norms and biases."""
    patches = {}
    for n, (key, parameter) in enumerate(model.named_parameters()):
        shape, key = tuple(parameter.shape), prefix + key
        if key.endswith("qkv.weight"):
            for i in range(3):
                patches[key, (0, i * WIDTH, WIDTH)] = host_value("lora", (WIDTH, WIDTH), seed + n + i)
        elif len(shape) == 2:
            patches[key] = host_value("lora", shape, seed + n, dora="output" if n % 2 else None)
        elif len(shape) == 4:
            patches[key] = host_value("lora", shape, seed + n)
        else:
            patches[key] = (rand(*shape, seed=seed + n, scale=0.05),)
    return patches


LORAS = (("a.safetensors", 0.8, 1), ("b.safetensors", -0.4, 40))


def with_loras(host, patcher, part, prefix="diffusion_model.", names=LORAS):
    clone = patcher.clone()
    for filename, strength, seed in names:
        clone.add_patches(filename=filename, patches=patches_on(part, seed, prefix), strength_patch=strength)
    return host.load(clone)


def truth(state, model, prefix="diffusion_model.", names=LORAS):
    values = {k: v.to(torch.float64) for k, v in state.items()}
    for _, strength, seed in names:
        for address, value in patches_on(model, seed, prefix).items():
            key, offset = (address, None) if isinstance(address, str) else address
            key = key.removeprefix(prefix)
            values[key] = merge_reference([[strength, value, 1.0, offset, None]], values[key])
    return values


def close_to(value, wanted, dtype):
    """Largest error in units of the storage's own rounding: half a step is right, one step is stock's neighbour."""
    wanted = wanted.double()
    step = torch.finfo(dtype).eps * wanted.abs().clamp_min(torch.finfo(dtype).tiny)
    if dtype == torch.float32:
        # fp32 sums of a few products of numbers near one.
        step = step.clamp_min(4e-7)
    return float(((value.double() - wanted).abs() / step).max())


class Setup:
    """A UNet, a text encoder and a VAE in the host's layers, and their engine."""

    def __init__(self, host, storage="bf16", width=WIDTH, depth=2):
        dtype = DTYPES[storage]
        self.host, self.dtype = host, dtype
        self.states = [filled(make(), dtype, s) for make, s in ((lambda: Net(width, depth), 1), (TextModel, 300))]
        net = made(host, lambda: Net(width, depth), self.states[0], dtype)
        text = made(host, TextModel, self.states[1], dtype)
        vae = made(host, lambda: Net(8, 1), filled(Net(8, 1), torch.float32, 9), torch.float32)
        self.net, self.text = net, text
        self.unet = host.load(patcher_of(host, Whole(net)))
        self.clip = host.load(patcher_of(host, text))
        self.engine = engine_of(host, self.unet, text, vae)

    def apply(self, names=LORAS):
        self.unet_with = with_loras(self.host, self.unet, self.net, names=names)
        self.clip_with = with_loras(self.host, self.clip, self.text, "", names=names)
        self.engine.forge_objects.unet = self.unet_with
        return self
