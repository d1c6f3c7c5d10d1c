"""A Forge with a card that is not there: its `memory_management` in small, and parameters that say where they would lie.

Written after what Forge does, not after its text; see `replay.forge_memory` for the numbers. A parameter has a size and a
device and no values, so a card of a few kilobytes is enough. `Machine` counts what goes over the bus and can run out of RAM.
"""

import enum
import sys
import weakref

import torch

from lib_lora_guard.memory.out_of_memory import OutOfMemory

CARD, RAM = torch.device("cuda", 0), torch.device("cpu")
NO_RAM = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


class Weight(torch.Tensor):
    """Has a shape and a device; `Module.to` moves it as it moves any other, one parameter at a time."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, machine, shape, dtype, device=RAM):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.machine = machine
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Weight(args[0].machine, args[0].shape, args[0].dtype, args[0].device)
        return NotImplemented

    def to(self, device=None, *_, **__):
        device = torch.device(device)
        if device == self.device:
            return self
        self.machine.carry(self.nelement() * self.element_size(), device)
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
        elif size > self.free():
            raise OutOfMemory[0](f"CUDA out of memory. Tried to allocate {size} bytes")
        else:
            self.peak = max(self.peak, self.total - self.ballast - self.free() + size)
        self.moved += size


def bytes_on_card(model):
    # Asked all the time, so not through `Module.parameters`.
    lying = (p for module in model.parts for p in module._parameters.values() if p is not None)
    return sum(p.nelement() * p.element_size() for p in lying if p.device == CARD)


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
    """Always runs where the model runs."""

    def __init__(self, machine, size):
        super().__init__()
        self.scale = parameter(machine, (size // 2,))


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


class VRAMState(enum.Enum):
    DISABLED, NO_VRAM, LOW_VRAM, NORMAL_VRAM, HIGH_VRAM = range(5)


class FakeMemory:
    """What the guard sees of Forge's `backend.memory_management`. Its functions call each other by name, as a module's do."""

    __name__ = "backend.memory_management"
    VRAMState = VRAMState

    def __init__(self, machine, rest):
        self.machine = machine
        self.current_loaded_models = []
        self.current_inference_memory = rest
        self.vram_state, self.ALWAYS_VRAM_OFFLOAD, self.PIN_SHARED_MEMORY = VRAMState.NORMAL_VRAM, False, False
        self.calls = []
        """What reached the host's own `free_memory`: `(asked, free_all)`."""
        self.LoadedModel = _loaded_model_class(self)

    def get_torch_device(self):
        # What looks at the machine's memory shall not ask a card that is not there.
        return RAM

    def minimum_inference_memory(self):
        return self.current_inference_memory

    def get_free_memory(self, dev=None, torch_free_too=False):
        free = self.machine.free() if dev in (None, CARD) else 1 << 40
        return (free, 0) if torch_free_too else free

    def module_size(self, module, exclude_device=None, include_device=None, return_split=False):
        return sum(
            p.nelement() * p.element_size()
            for p in module.parameters()
            if p.device != exclude_device and include_device in (None, p.device)
        )

    def soft_empty_cache(self, force=False):
        pass

    def unload_model_clones(self, model):
        for old in [one for one in self.current_loaded_models if model.is_clone(one.model)]:
            self.current_loaded_models.remove(old)
            old.model_unload(avoid_model_moving=True)

    def free_memory(self, memory_required, device, keep_loaded=[], free_all=False):  # noqa: B006  # the host's signature
        self.calls.append((memory_required, free_all))
        loaded = self.current_loaded_models
        for place in range(len(loaded) - 1, -1, -1):
            if sys.getrefcount(loaded[place].model) <= 2:
                loaded.pop(place).model_unload(avoid_model_moving=True)
        wanted = 1e30 if free_all else memory_required
        unloads_all = self.ALWAYS_VRAM_OFFLOAD or self.vram_state == VRAMState.NO_VRAM
        for one in reversed(list(loaded)):
            if not unloads_all and self.get_free_memory(device) > wanted:
                break
            if one.device == device and one not in keep_loaded:
                loaded.remove(one)
                one.model_unload()

    def compute_model_gpu_memory_when_using_cpu_swap(self, current_free_mem, inference_memory):
        return int(max(0, (current_free_mem - inference_memory) / 1.3))

    def load_models_gpu(self, models, memory_required=0, hard_memory_preservation=0):
        to_free = max(self.minimum_inference_memory(), memory_required) + hard_memory_preservation
        to_leave = self.minimum_inference_memory() + hard_memory_preservation
        coming, there = [], []
        for patcher in models:
            one = self.LoadedModel(patcher)
            (there if one in self.current_loaded_models else coming).append(one)
        for one in there:
            place = self.current_loaded_models.index(one)
            self.current_loaded_models.insert(0, self.current_loaded_models.pop(place))
        if not coming:
            self.free_memory(to_free, CARD, there)
            return
        for one in coming:
            self.unload_model_clones(one.model)
        sizes = {}
        for one in coming:
            outside = self.module_size(one.model.model, exclude_device=one.device)
            inside = self.module_size(one.model.model, include_device=one.device)
            sizes[id(one)] = outside, inside
        needed = sum(outside + 0.25 * inside for outside, inside in sizes.values())
        self.free_memory(needed * 1.3 + to_free, CARD, there)
        for one in coming:
            outside, inside = sizes[id(one)]
            budget = -1
            if self.vram_state in (VRAMState.LOW_VRAM, VRAMState.NORMAL_VRAM):
                room = self.get_free_memory(CARD) - to_leave
                if room < outside:
                    free = self.get_free_memory(CARD)
                    budget = inside or self.compute_model_gpu_memory_when_using_cpu_swap(free, to_leave)
            if self.vram_state == VRAMState.NO_VRAM:
                budget = 0
            one.model_load(budget)
            self.current_loaded_models.insert(0, one)


def _loaded_model_class(memory):
    class LoadedModel:
        """A class of its own for each host: hooks are set on it."""

        def __init__(self, patcher):
            self.model, self.device, self.model_accelerated = patcher, patcher.load_device, False

        def __eq__(self, other):
            return self.model is other.model

        __hash__ = None

        def model_load(self, model_gpu_memory_when_using_cpu_swap=-1):
            budget = model_gpu_memory_when_using_cpu_swap
            try:
                self.real_model = self.model.forge_patch_model(self.device if budget < 0 else None)
                self.model.current_device = self.model.load_device
            except Exception:
                self.model.forge_unpatch_model(self.model.offload_device)
                self.model_unload()
                raise
            if budget >= 0:
                self._place(budget)
            self.model.refresh_loras()

        def _place(self, budget):
            norms = [m for m in self.real_model.modules() if isinstance(m, Norm)]
            layers = [m for m in self.real_model.modules() if hasattr(m, "parameters_manual_cast")]
            used = sum(map(size_of, norms))
            swapped, with_bias, whole = [], [], []
            for layer in sorted(layers, key=_bias_bytes):
                fits = used + _bias_bytes(layer) < budget
                (with_bias if fits else swapped).append(layer)
                used += _bias_bytes(layer) if fits else 0
            for layer in sorted(with_bias, key=_weight_bytes):
                if used + _weight_bytes(layer) < budget:
                    whole.append(layer)
                    used += _weight_bytes(layer)
            half = [layer for layer in with_bias if layer not in whole]
            # What leaves goes first here, so that a model that lies on the card in part never needs room twice.
            for layer in [*swapped, *half]:
                layer.prev_parameters_manual_cast = layer.parameters_manual_cast
                layer.parameters_manual_cast = True
            for layer in swapped:
                layer.to(self.model.offload_device)
            for layer in half:
                layer.weight = torch.nn.Parameter(layer.weight.to(self.model.offload_device), requires_grad=False)
            for layer in half:
                if layer.bias is not None:
                    layer.bias = torch.nn.Parameter(layer.bias.to(self.device), requires_grad=False)
            for module in [*norms, *whole]:
                module.to(self.device)
            self.model_accelerated = True

        def model_unload(self, avoid_model_moving=False):
            if self.model_accelerated:
                for layer in self.real_model.modules():
                    if hasattr(layer, "prev_parameters_manual_cast"):
                        layer.parameters_manual_cast = layer.prev_parameters_manual_cast
                        del layer.prev_parameters_manual_cast
                self.model_accelerated = False
            self.model.forge_unpatch_model(None if avoid_model_moving else self.model.offload_device)

    return LoadedModel


def _weight_bytes(layer):
    return layer.weight.nelement() * layer.weight.element_size()


def _bias_bytes(layer):
    return 0 if layer.bias is None else layer.bias.nelement() * layer.bias.element_size()


def is_swapped(layer):
    return hasattr(layer, "prev_parameters_manual_cast")


def sides_of(layer):
    """Where a layer's parameters lie: one device, unless the host placed its bias alone."""
    return {p.device for p in layer.parameters(recurse=False)}
