"""A Forge with a card that is not there: its `memory_management` in small, and parameters that say where they would lie.

Written after what Forge does, not after its text; see `replay.forge_memory` for the numbers. A parameter has a size and a
device and no values, so a card of a few kilobytes is enough. `Machine` counts what goes over the bus and can run out of RAM.
"""

import weakref

import torch

from lib_lora_guard.memory.out_of_memory import OutOfMemory
from support.forge_memory import MemoryManagement

CARD, RAM = torch.device("cuda", 0), torch.device("cpu")
NO_RAM = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


class Weight(torch.Tensor):
    """Has a shape and a device; `Module.to` moves it as it moves any other, one parameter at a time."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    __slots__ = ("card_bytes",)
    """Not among `vars`: hosts copy these from one parameter to the one in its place."""

    @staticmethod
    def __new__(cls, machine, shape, dtype, device=RAM):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.machine, self.size_bytes = machine, self.nelement() * self.element_size()
        self.card_bytes = self.size_bytes if self.is_cuda else 0
        return self

    @property
    def data(self):
        # There are no values to take apart from it, and the guard asks a layer's size of it all the time.
        return self

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.card_bytes = self.size_bytes if self.is_cuda else 0

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Weight(args[0].machine, args[0].shape, args[0].dtype, args[0].device)
        return NotImplemented

    def to(self, device=None, *_, **__):
        device = torch.device(device)
        if device == self.device:
            return self
        self.machine.carry(self.size_bytes, device)
        return Weight(self.machine, self.shape, self.dtype, device)


def parameter(machine, shape, dtype=torch.bfloat16, device=RAM):
    found = torch.nn.Parameter(Weight(machine, shape, dtype, device), requires_grad=False)
    found.machine = machine
    return found


class Machine:
    """A card of `total` bytes, a bus and some RAM."""

    def __init__(self, total):
        self.total, self.ballast = total, 0
        self.models = weakref.WeakSet()
        self.moved = self.peak = 0
        self.moves_to_ram = 0
        self.fails = lambda move: None
        """Given the number of a move to RAM, from 1: the error that it raises, or None."""

    def free(self):
        return self.total - self.ballast - sum(map(bytes_on_card, self.models))

    def carry(self, size, device):
        if device == RAM:
            self.moves_to_ram += 1
            error = self.fails(self.moves_to_ram)
            if error is not None:
                raise error
        else:
            free = self.free()
            if size > free:
                raise OutOfMemory[0](f"CUDA out of memory. Tried to allocate {size} bytes")
            self.peak = max(self.peak, self.total - self.ballast - free + size)
        self.moved += size


def bytes_on_card(model):
    # Asked all the time, so neither through `Module.parameters` nor of torch.
    return sum([p.card_bytes for module in model.parts for p in module._parameters.values() if p is not None])


def size_of(model):
    return sum(p.nelement() * p.element_size() for p in model.parameters())


class Layer(torch.nn.Module):
    """A layer that the host can run swapped. `size` in bytes, an eighth of it the bias."""

    def __init__(self, machine, size, cast=False):
        super().__init__()
        self.weight = parameter(machine, (size // 2 - size // 16,))
        self.bias = parameter(machine, (size // 16,)) if size >= 16 else None
        self.parameters_manual_cast = self.as_built = cast


class Norm(torch.nn.Module):
    """Cannot run swapped."""

    def __init__(self, machine, size):
        super().__init__()
        self.weight = parameter(machine, (size // 2,))


class _Model(torch.nn.Module):
    """Two stages of layers, every other one computed in another type than it is stored in."""

    def __init__(self, machine, sizes, fixed=0):
        super().__init__()
        half = len(sizes) // 2
        layers = [Layer(machine, size, cast=bool(place % 2)) for place, size in enumerate(sizes)]
        self.first, self.rest = torch.nn.ModuleList(layers[:half]), torch.nn.ModuleList(layers[half:])
        self.norm = Norm(machine, fixed)
        self.parts = (*layers, self.norm)
        self.computation_dtype = torch.bfloat16
        machine.models.add(self)

    def layers(self):
        return list(self.parts[:-1])


class Denoiser(_Model):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.diffusion_model = torch.nn.Identity()


class JointTextEncoder(_Model):
    pass


class IntegratedAutoencoderKL(_Model):
    pass


class Upscaler(_Model):
    """A model of nobody's."""


JointTextEncoder.__module__ = "backend.patcher.clip"
IntegratedAutoencoderKL.__module__ = "backend.nn.vae"


class FakeMemory(MemoryManagement):
    """Forge's memory management on a machine that is not there."""

    def __init__(self, machine, rest):
        super().__init__(rest)
        self.machine = machine

    def get_free_memory(self, dev=None, torch_free_too=False):
        free = self.machine.free() if dev in (None, CARD) else 1 << 40
        return (free, 0) if torch_free_too else free


def is_swapped(layer):
    return hasattr(layer, "prev_parameters_manual_cast")


def sides_of(layer):
    """Where a layer's parameters lie: one device, unless the host placed its bias alone."""
    return {p.device for p in layer.parameters(recurse=False)}
