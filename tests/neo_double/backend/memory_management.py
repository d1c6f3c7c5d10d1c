import torch

current_loaded_models = []
NUM_STREAMS = 1
unpinned, asked = [], []


def get_torch_device():
    return torch.device("cpu")


def get_total_memory(dev=None):
    return 1 << 30


def get_free_memory(dev=None):
    return 1 << 30


def minimum_inference_memory():
    return 1 << 20


def unpin_memory(tensor):
    unpinned.append(tensor)
    return False


def module_size(module):
    return sum(t.nelement() * t.element_size() for t in module.state_dict().values())


def bake_gguf_model(model):
    if getattr(model, "gguf_baked", False):
        return None
    for parameter in model.parameters():
        if getattr(parameter, "gguf_cls", None) is not None:
            parameter.gguf_cls.bake(parameter)
    model.gguf_baked = True
    return model


class LoadedModel:
    def __init__(self, patcher):
        self.model = patcher


def load_models_gpu(models, memory_required=0, force_patch_weights=False, minimum_memory_required=None):
    asked.append((memory_required, minimum_memory_required))
    for patcher in models:
        current_loaded_models[:] = [one for one in current_loaded_models if one.model.model is not patcher.model]
        patcher.partially_load(patcher.load_device, 1e32, force_patch_weights=force_patch_weights)
        bake_gguf_model(patcher.model)
        current_loaded_models.insert(0, LoadedModel(patcher))
