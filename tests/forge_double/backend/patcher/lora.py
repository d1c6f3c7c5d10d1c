import torch
from support.reference import merge_reference

from backend import memory_management, utils

extra_weight_calculators = {}


def model_lora_keys_unet(model, key_map={}):  # noqa: B006  # the real one shares its default dict too: that is what is tested
    for name, _ in model.named_parameters():
        if name.endswith(".weight"):
            key_map["lora_unet_" + name[: -len(".weight")].replace(".", "_")] = name
    return key_map


def model_lora_keys_clip(model, key_map={}):  # noqa: B006  # as above
    for name, _ in model.named_parameters():
        if name.endswith(".weight"):
            key_map["lora_te_" + name[: -len(".weight")].replace(".", "_")] = name
    return key_map


@torch.inference_mode()
def merge_lora_to_weight(patches, weight, key="online_lora", computation_dtype=torch.float32):
    return merge_reference(patches, weight.to(computation_dtype), extra_weight_calculators).to(weight.dtype)


from backend import operations  # noqa: E402  # the real module has the same circle


class LoraLoader:
    def __init__(self, model):
        self.model = model
        self.backup = {}
        self.online_backup = []
        self.loaded_hash = str([])

    @torch.inference_mode()
    def refresh(self, lora_patches, offload_device=torch.device("cpu"), force_refresh=False):  # noqa: B008  # the host's signature
        hashes = str(list(lora_patches.keys()))
        if hashes == self.loaded_hash and not force_refresh:
            return
        stack = {}
        for (_, _, _, online), patches in lora_patches.items():
            for key, entries in patches.items():
                stack.setdefault((key, online), []).extend(entries)
        memory_management.signal_empty_cache = True
        devices = {key: parameter.device for key, parameter in self.model.named_parameters()}
        for layer in set(self.online_backup):
            del layer.forge_online_loras
        self.online_backup = []
        for key, weight in self.backup.items():
            utils.set_attr_raw(self.model, key, utils.tensor2parameter(weight))
        self.backup = {}
        self._bring_back(devices)
        for (key, online), entries in stack.items():
            try:
                layer, name, weight = utils.get_attr_with_parent(self.model, key)
            except AttributeError:
                raise ValueError(f"Wrong LoRA Key: {key}") from None
            if online:
                if not hasattr(layer, "forge_online_loras"):
                    layer.forge_online_loras = {}
                layer.forge_online_loras[name] = entries
                self.online_backup.append(layer)
                continue
            self.backup.setdefault(key, weight.to(device=offload_device))
            gguf_parameter = weight if getattr(weight, "gguf_cls", None) is not None else None
            dense = operations.dequantize_tensor(weight) if gguf_parameter is not None else weight
            merged = merge_lora_to_weight(entries, dense, key, torch.float32)
            if gguf_parameter is not None:
                gguf_parameter.gguf_cls.quantize_pytorch(merged, gguf_parameter)
            else:
                utils.set_attr_raw(self.model, key, torch.nn.Parameter(merged, requires_grad=False))
        self._bring_back(devices)
        self.loaded_hash = hashes

    def _bring_back(self, devices):
        for key, device in devices.items():
            parameter = utils.get_attr_with_parent(self.model, key)[2]
            if parameter.device != device:
                utils.set_attr_raw(self.model, key, utils.tensor2parameter(parameter.to(device=device)))
