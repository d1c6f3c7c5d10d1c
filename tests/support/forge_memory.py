"""Forge's `backend.memory_management` in small: the common ground of `forge_double` (the CPU alone) and `support.fake_card`.

Written after what Forge does, not after its text; see `planning.host_memory` for the numbers.
"""

import enum
import sys
import types

import torch

CPU = torch.device("cpu")


class VRAMState(enum.Enum):
    DISABLED, NO_VRAM, LOW_VRAM, NORMAL_VRAM, HIGH_VRAM = range(5)


class MemoryManagement(types.ModuleType):
    """Stands for the module. Its functions call each other by name, as a module's do, so that a hook on one of them counts."""

    VRAMState = VRAMState

    def __init__(self, rest=1 << 30):
        """`rest`: bytes that the slider leaves."""
        super().__init__("backend.memory_management")
        self.current_loaded_models = []
        self.current_inference_memory = rest
        self.vram_state, self.ALWAYS_VRAM_OFFLOAD, self.PIN_SHARED_MEMORY = VRAMState.NORMAL_VRAM, False, False
        self.signal_empty_cache = False
        self.reserved_for_test = []
        """What each `load_models_gpu` was asked to keep free."""
        self.calls = []
        """What reached the host's own `free_memory`: `(asked, free_all)`."""
        self.LoadedModel = _loaded_model_class()
        for name, function in vars(MemoryManagement).items():
            if isinstance(function, types.FunctionType) and not name.startswith("_"):
                # One object, as a function of a module is: a hook gives back what it found.
                setattr(self, name, getattr(self, name))

    def get_torch_device(self):
        # What looks at the machine's memory shall not ask a card that is not there.
        return CPU

    def minimum_inference_memory(self):
        return self.current_inference_memory

    def get_free_memory(self, dev=None, torch_free_too=False):
        return (1 << 50, 0) if torch_free_too else 1 << 50

    def module_size(self, module, exclude_device=None, include_device=None, return_split=False):
        found = _parameters_in(module)
        if exclude_device is not None or include_device is not None:
            found = [p for p in found if p.device != exclude_device and include_device in (None, p.device)]
        whole, own = _bytes(*found), module._parameters.get("weight")
        weight = _bytes(*(p for p in found if p is own)) if return_split else 0
        return (whole, weight, whole - weight) if return_split else whole

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

    def unload_all_models(self):
        self.free_memory(1e30, self.get_torch_device(), free_all=True)

    def compute_model_gpu_memory_when_using_cpu_swap(self, current_free_mem, inference_memory):
        rest = current_free_mem - inference_memory
        return int(max(0, rest / 1.3, rest - 1.25 * (1 << 30)))

    def load_models_gpu(self, models, memory_required=0, hard_memory_preservation=0):
        self.reserved_for_test.append(hard_memory_preservation)
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
            for device in {one.device for one in there} - {CPU}:
                self.free_memory(to_free, device, there)
            return
        for one in coming:
            self.unload_model_clones(one.model)
        sizes, needed = {}, {}
        for one in coming:
            outside = self.module_size(one.model.model, exclude_device=one.device)
            inside = self.module_size(one.model.model, include_device=one.device)
            sizes[id(one)] = outside, inside
            needed[one.device] = needed.get(one.device, 0) + outside + 0.25 * inside
        for device in needed.keys() - {CPU}:
            self.free_memory(needed[device] * 1.3 + to_free, device, there)
        for one in coming:
            one.model_load(self._swap_budget(one.device, *sizes[id(one)], to_leave))
            self.current_loaded_models.insert(0, one)

    def _swap_budget(self, device, outside, inside, to_leave):
        """-1: the whole model goes to its device."""
        state = VRAMState.DISABLED if device == CPU else self.vram_state
        if state == VRAMState.NO_VRAM:
            return 0
        if state not in (VRAMState.LOW_VRAM, VRAMState.NORMAL_VRAM):
            return -1
        free = self.get_free_memory(device)
        if free - to_leave >= outside:
            return -1
        return inside or self.compute_model_gpu_memory_when_using_cpu_swap(free, to_leave)


def _loaded_model_class():
    class LoadedModel:
        """A class of its own for each host: hooks are set on it."""

        def __init__(self, patcher):
            self.model, self.device, self.model_accelerated = patcher, patcher.load_device, False

        def __eq__(self, other):
            return self.model is other.model

        __hash__ = None

        def model_load(self, model_gpu_memory_when_using_cpu_swap=-1):
            budget = model_gpu_memory_when_using_cpu_swap
            self.model.model_patches_to(self.device)
            self.model.model_patches_to(self.model.model_dtype())
            try:
                self.real_model = self.model.forge_patch_model(self.device if budget < 0 else None)
                self.model.current_device = self.model.load_device
            except Exception:
                self.model.forge_unpatch_model(self.model.offload_device)
                self.model_unload()
                raise
            if budget >= 0:
                self._place(budget)
            for parameter in self.real_model.parameters():
                if getattr(parameter, "gguf_cls", None) is not None:
                    parameter.gguf_cls.bake(parameter)
            self.model.refresh_loras()
            return self.real_model

        def _place(self, budget):
            modules = list(self.real_model.modules())
            layers = [m for m in modules if hasattr(m, "parameters_manual_cast")]
            extras = [m for m in modules if hasattr(m, "weight") and not hasattr(m, "parameters_manual_cast")]
            used = sum(_bytes(*m.parameters()) for m in extras)
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
            for module in [*extras, *whole]:
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


def _bytes(*parameters):
    return sum(p.nelement() * p.element_size() for p in parameters)


def _parameters_in(module):
    """As `Module.parameters`, in another order: that takes several times as long, and sizes are asked for all the time."""
    found, left, seen = {}, [module], set()
    while left:
        one = left.pop()
        if id(one) not in seen:
            seen.add(id(one))
            found.update((id(p), p) for p in one._parameters.values() if p is not None)
            left.extend(child for child in one._modules.values() if child is not None)
    return list(found.values())


def _weight_bytes(layer):
    return _bytes(layer.weight)


def _bias_bytes(layer):
    return 0 if layer.bias is None else _bytes(layer.bias)
