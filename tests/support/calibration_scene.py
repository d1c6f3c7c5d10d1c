"""The takeover as it is in Forge, on a card that is not there, with models that take VRAM and an allocator that counts it."""

import contextlib
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch

from lib_lora_guard.hosts.forge.takeover import ForgeTakeover
from lib_lora_guard.memory.calibration import FILE_NAME, HIGHEST, LOWEST
from lib_lora_guard.memory.calibration_file import CalibrationFile
from lib_lora_guard.memory.calibration_peaks import Count, Peaks
from lib_lora_guard.planning import activations
from lib_lora_guard.planning.tokens import Picture, tokens_for
from lib_lora_guard.runtime.corrections import Corrections
from support.fake_card import CARD, RAM, FakeMemory, IntegratedAutoencoderKL, JointTextEncoder, Machine, parameter
from support.fake_models import flux_shapes

MB, GB = 1 << 20, 1 << 30

LATENT = (1, 16, 128, 128)
"""A picture of 1024 x 1024."""

DECODE_ASKED = 2178 * 128 * 128 * 64 * 2

FORGES = {"cond_or_uncond": [0], "sigmas": 1, "cond_mark": 2, "cond_indices": [0], "uncond_indices": []}


def flux_step(rows=1):
    """What a step of Flux uses and holds at that size, by the formula alone."""
    tokens = replace(tokens_for("Flux", Picture(1024, 1024)), rows=rows)
    return activations.step(tokens, Picture(1024, 1024, rows), {"a": (3072, 3072)}, 2)


def used_by_decode():
    return int(DECODE_ASKED * activations.DECODE_WHERE_FORGE_HAS)


def corrected(predicted, error_bytes):
    """What `Calibration` makes of it, in what is held."""
    used = predicted.used_bytes
    bounded = min(max(error_bytes, -int(-LOWEST * used)), int(HIGHEST * used))
    return predicted.held_bytes + bounded * predicted.held_bytes // used


def kinds_in(folder):
    """How often each kind was measured, from the file."""
    found = {}
    for name, entry in CalibrationFile(folder / FILE_NAME).read().items():
        found[name[2]] = found.get(name[2], 0) + entry.count
    return found


def folder_of(scene):
    return scene.guard.calibration.corrections.folder


class Allocator:
    """Counts as torch's does, with the weights on the fake card."""

    def __init__(self, machine):
        self.machine = machine
        self.extra = self.top = 0

    def now(self):
        return self.machine.total - self.machine.free() + self.extra

    def pass_by(self, size):
        self.top = max(self.top, self.now() + size)

    def keep(self, size):
        self.extra += size
        self.pass_by(0)

    def read(self, device):
        peak = max(self.top, self.machine.peak + self.extra, self.now())
        return Count(self.now(), peak, peak, peak)

    def reset(self, device):
        self.top, self.machine.peak = self.now(), 0


class Latent(torch.Tensor):
    """A tensor of `shape` on the card, without one."""

    @staticmethod
    def __new__(cls, shape, device=CARD):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device=device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


class Holder(torch.nn.Module):
    pass


class KModel(torch.nn.Module):
    """Flux with two blocks of each kind in its own width; `takes` and `leaves` are bytes of one call."""

    def __init__(self, scene, shapes):
        super().__init__()
        self.scene, self.takes, self.leaves = [scene], 0, 0
        self.computation_dtype, self.storage_dtype = torch.bfloat16, "nf4"
        self.diffusion_model = Holder()
        self.parts = [self.diffusion_model]
        for number, (name, shape) in enumerate(shapes.items()):
            holder = self.diffusion_model
            *owners, leaf = name.split(".")
            for owner in owners:
                if not hasattr(holder, owner):
                    holder.add_module(owner, Holder())
                holder = getattr(holder, owner)
            holder.register_parameter(leaf, parameter(scene.machine, shape))
            self.parts += [holder] if number else []
        self.parts = list(dict.fromkeys(self.parts))
        scene.machine.models.add(self)

    def apply_model(self, x, t, **kwargs):
        allocator = self.scene[0].allocator
        allocator.pass_by(self.takes)
        allocator.keep(self.leaves)
        self.leaves = 0
        return x

    def memory_required(self, input_shape):
        rows, _, height, width = input_shape
        return 1.28 * rows * height * width * 2 * 16384


class VAE:
    """`takes`: bytes that decoding one picture takes."""

    def __init__(self, scene):
        self.scene, self.device, self.vae_dtype, self.takes = scene, CARD, torch.bfloat16, 0
        self.first_stage_model = IntegratedAutoencoderKL(scene.machine, [20 * MB] * 8)
        self.patcher = scene.patcher(self.first_stage_model)
        self.fails = False

    def memory_used_decode(self, shape, dtype):
        return 2178 * shape[2] * shape[3] * 64 * 2

    def decode_inner(self, samples_in):
        asked = self.memory_used_decode(samples_in.shape, self.vae_dtype)
        self.scene.memory.load_models_gpu([self.patcher], memory_required=asked)
        self.free = self.scene.machine.free()
        self.scene.allocator.pass_by(self.takes)
        return self.decode_tiled_(samples_in) if self.fails else "picture"

    def decode_tiled_(self, samples):
        return "tiled"


class MemUsageMonitor:
    def __init__(self, allocator):
        self.run_flag, self.allocator, self.data = threading.Event(), allocator, {}

    def monitor(self):
        self.run_flag.set()

    def read(self):
        count = self.allocator.read(CARD)
        self.data.update(active_peak=count.active_peak, reserved_peak=count.reserved_peak, free=1)
        return self.data


def modules():
    """Forge's modules of which classes are hooked, as fresh classes."""
    made = {}
    for module, kind in (
        ("backend.modules.k_model", KModel),
        ("backend.patcher.vae", VAE),
        ("modules.memmon", MemUsageMonitor),
    ):
        made[module] = types.ModuleType(module)
        setattr(made[module], kind.__name__, type(kind.__name__, (kind,), dict(kind.__dict__)))
    return made


class Scene:
    def __init__(self, parts, monkeypatch, folder, total=24 * GB, device=CARD, shapes=None):
        self.machine = Machine(total)
        self.memory = FakeMemory(self.machine, 1 * GB)
        self.device, self.parts_of_host = device, parts
        self.allocator = Allocator(self.machine)
        guard = self.guard = ForgeTakeover(replace(parts, memory=self.memory), corrections=Corrections(folder))
        guard.calibration.peaks = Peaks(self.allocator)
        guard.memory.total_bytes = lambda device: self.machine.total
        guard.preflight.room_bytes = lambda: None
        guard.control.refresh = self.refresh
        self.factor_bytes, self.applied = 0, lambda: None
        guard.loras.factor_bytes = lambda patcher: self.factor_bytes if patcher is self.unet else 0
        self.modules = modules()
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        guard.install()
        guard.install_loaded(sys.modules)
        self.model = self.modules["backend.modules.k_model"].KModel(
            self, shapes or flux_shapes(hidden=3072, double=2, single=2)
        )
        self.unet = self.patcher(self.model)
        self.text = self.patcher(JointTextEncoder(self.machine, [100 * MB] * 10))
        self.vae = self.modules["backend.patcher.vae"].VAE(self)
        self.vae.device = device
        self.model.takes, self.vae.takes = flux_step().used_bytes, used_by_decode()

    def patcher(self, model):
        return self.parts_of_host.base.ModelPatcher(model, load_device=self.device, offload_device=RAM)

    def refresh(self, original, loader, *args, **kwargs):
        loader.loaded_hash = "as wished"
        self.applied()

    def needs(self, rows=1):
        """Of a step, as Forge asks in each."""
        return self.model.memory_required([rows, *LATENT[1:]])

    def sample(self, steps=4, rows=1, **kwargs):
        required = self.unet.memory_required([2, *LATENT[1:]])
        self.memory.load_models_gpu([self.unet], memory_required=required)
        for _ in range(steps):
            x = Latent((rows, *LATENT[1:]), self.device)
            self.model.apply_model(x, 1, **{"transformer_options": dict(FORGES), **kwargs})

    def decode(self, pictures=1):
        return self.vae.decode_inner(Latent((pictures, *LATENT[1:]), self.device))

    def picture(self, **kwargs):
        self.memory.load_models_gpu([self.text])
        self.sample(**kwargs)
        self.decode()

    def close(self):
        self.memory.current_loaded_models.clear()
        self.guard.uninstall()


@contextlib.contextmanager
def scene_of(parts, folder, **settings):
    with pytest.MonkeyPatch.context() as patch:
        scene = Scene(parts, patch, folder, **settings)
        try:
            yield scene
        finally:
            scene.close()
