import sys

import torch

signal_empty_cache = False
current_loaded_models = []
reserved_for_test = []
"""What each load_models_gpu call was asked to keep free; the contract suite reads it on the double only."""


class LoadedModel:
    def __init__(self, model):
        self.model = model
        self.device = model.load_device

    def model_load(self, model_gpu_memory_when_using_cpu_swap=-1):
        self.model.model_patches_to(self.device)
        self.real_model = self.model.forge_patch_model(self.device)
        for parameter in self.real_model.parameters():
            if getattr(parameter, "gguf_cls", None) is not None:
                parameter.gguf_cls.bake(parameter)
        self.model.refresh_loras()
        return self.real_model

    def model_unload(self, avoid_model_moving=False):
        self.model.forge_unpatch_model(None if avoid_model_moving else self.model.offload_device)

    def __eq__(self, other):
        return self.model is other.model


def get_torch_device():
    return torch.device("cpu")


def minimum_inference_memory():
    return 1024 * 1024 * 1024


def get_free_memory(dev=None, torch_free_too=False):
    return 1 << 50


def module_size(module, exclude_device=None, include_device=None, return_split=False):
    sizes = [
        p.numel() * p.element_size()
        for p in module.parameters()
        if p.device != exclude_device and (include_device is None or p.device == include_device)
    ]
    return sum(sizes)


def unload_model_clones(model):
    for old in [m for m in current_loaded_models if model.is_clone(m.model)]:
        current_loaded_models.remove(old)
        old.model_unload(avoid_model_moving=True)


def load_models_gpu(models, memory_required=0, hard_memory_preservation=0):
    reserved_for_test.append(hard_memory_preservation)
    for patcher in models:
        loaded = LoadedModel(patcher)
        if loaded in current_loaded_models:
            continue
        unload_model_clones(patcher)
        loaded.model_load()
        current_loaded_models.insert(0, loaded)


def free_memory(memory_required, device, keep_loaded=(), free_all=False):
    for place in range(len(current_loaded_models) - 1, -1, -1):
        if sys.getrefcount(current_loaded_models[place].model) <= 2:
            current_loaded_models.pop(place).model_unload(avoid_model_moving=True)
    if memory_required < get_free_memory(device):
        return
    for loaded in list(current_loaded_models):
        current_loaded_models.remove(loaded)
        loaded.model_unload()


def unload_all_models():
    free_memory(1e30, get_torch_device(), free_all=True)
