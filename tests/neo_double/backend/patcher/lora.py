import types

import torch


class WeightAdapterBase:
    name = ""

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, intermediate_dtype=None):
        raise NotImplementedError


class LoRAAdapter(WeightAdapterBase):
    name = "lora"

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, intermediate_dtype=None):
        up, down = (one.to(intermediate_dtype) for one in self.weights[:2])
        return weight.add_(function(strength * (up @ down)).to(weight.dtype))


weight_adapter = types.SimpleNamespace(WeightAdapterBase=WeightAdapterBase, LoRAAdapter=LoRAAdapter)


@torch.inference_mode()
def merge_lora_to_weight(patches, weight, key, computation_dtype=torch.float32):
    for strength, value, strength_model, offset, function, *_ in patches:
        whole, function = weight, function or (lambda delta: delta)
        if offset is not None:
            weight = weight.narrow(*offset)
        if strength_model != 1.0:
            weight *= strength_model
        if isinstance(value, WeightAdapterBase):
            weight = value.calculate_weight(weight, key, strength, strength_model, offset, function, computation_dtype)
        elif isinstance(value, tuple) and len(value) == 1:
            weight += function(strength * value[0].to(weight.dtype))
        else:
            raise ValueError(f'"{key}" is not recognized')
        weight = weight if offset is None else whole
    return weight
