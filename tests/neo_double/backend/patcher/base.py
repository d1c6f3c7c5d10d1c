import collections
import copy
import uuid

import torch

from backend import memory_management, utils
from backend.patcher.lora import merge_lora_to_weight

ONLINE_AS_FUNCTIONS = False
"""As in Neo since September 2026: LoRAs on the fly are functions of the patcher, which each load puts on the layers."""
Backup = collections.namedtuple("Backup", ["weight"])


def wipe_lowvram_weight(layer):
    if hasattr(layer, "prev_parameters_manual_cast"):
        layer.parameters_manual_cast = layer.prev_parameters_manual_cast
        del layer.prev_parameters_manual_cast
    if hasattr(layer, "weight_function"):
        layer.weight_function = []
    if hasattr(layer, "bias_function"):
        layer.bias_function = []


class LowVramPatch:
    def __init__(self, key, patches):
        self.key, self.patches = key, patches

    def __call__(self, weight):
        return merge_lora_to_weight(self.patches[self.key], weight, self.key, computation_dtype=weight.dtype)


class OnlineLoRAPatch:
    def __init__(self, key, patch):
        self.key, self.patch = key, [patch]

    def __call__(self, weight):
        return merge_lora_to_weight(self.patch, weight, self.key, computation_dtype=weight.dtype)


class ModelPatcher:
    def __init__(self, model, load_device, offload_device, size=0, *, current_device=None, weight_inplace_update=False):
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        model.device = current_device
        self.patches, self.backup, self.object_patches, self.object_patches_backup = {}, {}, {}, {}
        self.model_options = {"transformer_options": {}}
        self.patches_uuid, self.parent, self.pinned = uuid.uuid4(), None, set()
        self.weight_wrapper_patches = {}
        for name, value in (
            ("model_loaded_weight_memory", 0),
            ("model_lowvram", False),
            ("current_weight_patches_uuid", None),
        ):
            if not hasattr(model, name):
                setattr(model, name, value)

    @property
    def current_device(self):
        return self.model.device

    def model_size(self):
        self.size = self.size or memory_management.module_size(self.model)
        return self.size

    def clone(self):
        made = self.__class__(
            self.model, self.load_device, self.offload_device, self.model_size(), current_device=self.current_device
        )
        made.patches = {key: list(value) for key, value in self.patches.items()}
        made.patches_uuid, made.parent = self.patches_uuid, self
        made.weight_wrapper_patches = self.weight_wrapper_patches.copy()
        made.object_patches, made.model_options = dict(self.object_patches), copy.deepcopy(self.model_options)
        made.backup, made.object_patches_backup, made.pinned = self.backup, self.object_patches_backup, self.pinned
        return made

    def is_clone(self, other):
        return self.model is getattr(other, "model", None)

    def memory_required(self, input_shape):
        return self.model.memory_required(input_shape=input_shape)

    def add_object_patch(self, name, value):
        self.object_patches[name] = value

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0, *, filename=None, online_mode=None):
        known, used = self.model.state_dict(), []
        for address, value in patches.items():
            key, offset, function = (address, None, None) if isinstance(address, str) else (*address, None)[:3]
            if key in known:
                used.append(address)
                entry = (strength_patch, value, strength_model, offset, function)
                if online_mode and ONLINE_AS_FUNCTIONS:
                    self.add_weight_wrapper(key, OnlineLoRAPatch(key, entry))
                    continue
                entry = entry if ONLINE_AS_FUNCTIONS else (*entry, online_mode)
                self.patches[key] = [*self.patches.get(key, []), entry]
        self.patches_uuid = uuid.uuid4()
        return used

    def add_weight_wrapper(self, name, function):
        self.weight_wrapper_patches[name] = [*self.weight_wrapper_patches.get(name, []), function]

    def has_online_lora(self):
        return bool(self.weight_wrapper_patches) or any(
            patch[-1] for patches in self.patches.values() for patch in patches
        )

    def _is_online(self, key):
        return not ONLINE_AS_FUNCTIONS and any(patch[-1] for patch in self.patches.get(key, ()))

    def unpin_weight(self, key):
        self.pinned.discard(key)

    def _merge(self, key):
        if key not in self.patches:
            return
        weight = utils.get_attr(self.model, key)
        self.backup.setdefault(key, Backup(weight))
        merged = merge_lora_to_weight(self.patches[key], weight.to(torch.float32, copy=True), key)
        utils.set_attr(self.model, key, merged.to(weight.dtype))

    def _layers(self):
        layers = []
        for name, layer in self.model.named_modules():
            own = dict(layer.named_parameters(recurse=False))
            inner = any(key not in own for key, _ in layer.named_parameters())
            if own and (not inner or hasattr(layer, "parameters_manual_cast")):
                layers.append((memory_management.module_size(layer), name, layer, own))
        return sorted(layers, key=lambda one: one[:2], reverse=True)

    def _function(self, layer, key, parameter):
        setattr(layer, f"{parameter}_function", [LowVramPatch(key, self.patches)])

    def _wrap(self, layer, keys):
        for parameter, key in keys.items():
            getattr(layer, f"{parameter}_function", []).extend(self.weight_wrapper_patches.get(key, ()))

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        placed, lowvram = 0, False
        coming = []
        for size, name, layer, own in self._layers():
            keys = {parameter: f"{name}.{parameter}" for parameter in own}
            is_neos = hasattr(layer, "parameters_manual_cast")
            if not full_load and is_neos and placed + size > lowvram_model_memory:
                lowvram = True
                if hasattr(layer, "prev_parameters_manual_cast"):
                    continue
                layer.weight_function, layer.bias_function = [], []
                for parameter, key in keys.items():
                    if key in self.patches:
                        self._function(layer, key, parameter)
                layer.prev_parameters_manual_cast, layer.parameters_manual_cast = layer.parameters_manual_cast, True
                self._wrap(layer, keys)
                continue
            if is_neos:
                wipe_lowvram_weight(layer)
                self._wrap(layer, keys)
            placed += size
            coming.append((layer, keys, is_neos))
        for layer, keys, is_neos in coming:
            if getattr(layer, "forge_patched_weights", False):
                continue
            for parameter, key in keys.items():
                if self._is_online(key):
                    self._function(layer, key, parameter)
                    if is_neos:
                        layer.prev_parameters_manual_cast = layer.parameters_manual_cast
                        layer.parameters_manual_cast = True
                else:
                    self.unpin_weight(key)
                    self._merge(key)
            layer.forge_patched_weights = True
        for layer, *_ in coming:
            layer.to(device_to)
        self.model.model_lowvram, self.model.device = lowvram, device_to
        self.model.model_loaded_weight_memory = self.model_size() if full_load else placed
        self.model.current_weight_patches_uuid = self.patches_uuid

    def patch_model(self, device_to=None, lowvram_model_memory=0, load_weights=True, force_patch_weights=False):
        for key, value in self.object_patches.items():
            old = utils.set_attr_raw(self.model, key, value)
            self.object_patches_backup.setdefault(key, old)
        if load_weights:
            self.load(device_to, lowvram_model_memory, force_patch_weights, full_load=lowvram_model_memory == 0)
        return self.model

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            if self.model.model_lowvram or ONLINE_AS_FUNCTIONS:
                for layer in self.model.modules():
                    wipe_lowvram_weight(layer)
                self.model.model_lowvram = False
            for key, backup in self.backup.items():
                utils.set_attr(self.model, key, backup.weight)
            self.backup.clear()
            self.model.current_weight_patches_uuid = None
            if device_to is not None:
                self.model.to(device_to)
                self.model.device = device_to
            self.model.model_loaded_weight_memory = 0
            for layer in self.model.modules():
                vars(layer).pop("forge_patched_weights", None)
        for key, value in self.object_patches_backup.items():
            utils.set_attr_raw(self.model, key, value)
        self.object_patches_backup.clear()

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        freed = 0
        for size, name, layer, own in reversed(self._layers()):
            if freed > memory_to_free:
                break
            if not getattr(layer, "forge_patched_weights", False) or not hasattr(layer, "parameters_manual_cast"):
                continue
            for parameter in own:
                key = f"{name}.{parameter}"
                if key in self.backup:
                    utils.set_attr(self.model, key, self.backup.pop(key).weight)
                if key in self.patches:
                    getattr(layer, f"{parameter}_function").append(LowVramPatch(key, self.patches))
            layer.to(device_to)
            layer.prev_parameters_manual_cast, layer.parameters_manual_cast = layer.parameters_manual_cast, True
            layer.forge_patched_weights = False
            freed += size
        self.model.model_lowvram = True
        self.model.model_loaded_weight_memory -= freed
        return freed

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        model = self.model
        unpatch = model.current_weight_patches_uuid not in (None, self.patches_uuid) or (
            model.current_weight_patches_uuid is not None and force_patch_weights
        )
        used = model.model_loaded_weight_memory
        self.unpatch_model(self.offload_device, unpatch_weights=unpatch)
        if unpatch:
            extra_memory += used - model.model_loaded_weight_memory
        self.patch_model(load_weights=False)
        if extra_memory < 0 and not unpatch:
            self.partially_unload(self.offload_device, -extra_memory, force_patch_weights=force_patch_weights)
            return 0
        if not model.model_lowvram and model.model_loaded_weight_memory > 0:
            return 0
        before = model.model_loaded_weight_memory
        try:
            self.load(
                device_to,
                lowvram_model_memory=before + extra_memory,
                force_patch_weights=force_patch_weights,
                full_load=before + extra_memory > self.model_size(),
            )
        except Exception:
            self.detach()
            raise
        return model.model_loaded_weight_memory - before

    def detach(self, unpatch_all=True):
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=unpatch_all)
        return self.model

    def __del__(self):
        self.detach(unpatch_all=False)
