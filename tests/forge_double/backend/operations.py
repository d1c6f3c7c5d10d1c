import contextlib

import torch

from backend import utils
from backend.operations_gguf import dequantize_tensor
from backend.patcher.lora import merge_lora_to_weight

current_device, current_dtype, current_manual_cast_enabled, current_bnb_dtype = None, None, False, None


def get_weight_and_bias(layer, weight_args=None, bias_args=None, weight_fn=None, bias_fn=None):
    patches = getattr(layer, "forge_online_loras", {})
    results = []
    for name, args, fn in (("weight", weight_args, weight_fn), ("bias", bias_args, bias_fn)):
        value = getattr(layer, name)
        if value is not None:
            if fn is not None:
                value = fn(value)
            if args is not None:
                value = value.to(**args)
            if name == "weight" and getattr(layer, "scale_weight", None) is not None:
                value = value * layer.scale_weight.to(value)
            if patches.get(name) is not None:
                value = merge_lora_to_weight(
                    patches=patches[name], weight=value, key=f"online {name} lora", computation_dtype=value.dtype
                )
        results.append(value)
    return results


def weights_manual_cast(layer, x, skip_bias_dtype=False, weight_fn=None):
    bias_args = {"device": x.device} if skip_bias_dtype else {"device": x.device, "dtype": x.dtype}
    return get_weight_and_bias(layer, {"device": x.device, "dtype": x.dtype}, bias_args, weight_fn=weight_fn)


class _Loading(torch.nn.Module):
    """Layers that take their parameters from the state dict as they are."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.dummy = torch.nn.Parameter(torch.empty(1, device=current_device, dtype=current_dtype))
        self.weight = self.bias = None
        self.scale_weight = None
        self.parameters_manual_cast = current_manual_cast_enabled


def _conv_forward(layer, x):
    weight, bias = weights_manual_cast(layer, x) if layer.parameters_manual_cast else get_weight_and_bias(layer)
    return layer._conv_forward(x, weight, bias)


class ForgeOperations:
    class Linear(_Loading):
        def __init__(self, in_features, out_features, *args, **kwargs):
            super().__init__()
            self.in_features, self.out_features = in_features, out_features

        def _load_from_state_dict(self, state_dict, prefix, *args):
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    setattr(
                        self, name, torch.nn.Parameter(state_dict[prefix + name].to(self.dummy), requires_grad=False)
                    )
            if prefix + "scale_weight" in state_dict:
                self.scale_weight = torch.nn.Parameter(state_dict[prefix + "scale_weight"], requires_grad=False)
            del self.dummy

        def forward(self, x):
            weight, bias = weights_manual_cast(self, x) if self.parameters_manual_cast else get_weight_and_bias(self)
            return torch.nn.functional.linear(x, weight, bias)

    class Conv2d(torch.nn.Conv2d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "device": current_device, "dtype": current_dtype})
            self.parameters_manual_cast = current_manual_cast_enabled

        def reset_parameters(self):
            pass

        def forward(self, x):
            return _conv_forward(self, x)

    class Conv1d(torch.nn.Conv1d):
        def forward(self, x):
            return _conv_forward(self, x)

    class Conv3d(torch.nn.Conv3d):
        def forward(self, x):
            return _conv_forward(self, x)

    class ConvTranspose1d(torch.nn.ConvTranspose1d):
        pass

    class ConvTranspose2d(torch.nn.ConvTranspose2d):
        pass

    class ConvTranspose3d(torch.nn.ConvTranspose3d):
        pass

    class LayerNorm(torch.nn.LayerNorm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "device": current_device, "dtype": current_dtype})
            self.parameters_manual_cast = current_manual_cast_enabled

        def reset_parameters(self):
            pass

        def forward(self, x):
            if not self.parameters_manual_cast:
                return super().forward(x)
            weight, bias = weights_manual_cast(self, x)
            return torch.nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class ForgeOperationsGGUF(ForgeOperations):
    class Linear(_Loading):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            dtype = self.dummy.dtype if self.dummy.dtype in (torch.float16, torch.bfloat16) else torch.float16
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    value = state_dict[prefix + name]
                    value.computation_dtype = dtype
                    setattr(self, name, value)
            del self.dummy

        def _apply(self, fn, recurse=True):
            for name, parameter in list(self.named_parameters(recurse=False)):
                setattr(self, name, utils.tensor2parameter(fn(parameter)))
            return self

        def forward(self, x):
            if self.bias is not None and self.bias.dtype != x.dtype:
                self.bias = utils.tensor2parameter(dequantize_tensor(self.bias).to(x.dtype))
            weight, bias = weights_manual_cast(self, x, skip_bias_dtype=True, weight_fn=dequantize_tensor)
            return torch.nn.functional.linear(x, weight, bias)


@contextlib.contextmanager
def using_forge_operations(operations=None, device=None, dtype=None, manual_cast_enabled=False, bnb_dtype=None):
    global current_device, current_dtype, current_manual_cast_enabled, current_bnb_dtype
    current_device, current_dtype, current_manual_cast_enabled, current_bnb_dtype = (
        device,
        dtype,
        manual_cast_enabled,
        bnb_dtype,
    )
    operations = operations or (ForgeOperationsGGUF if bnb_dtype == "gguf" else ForgeOperations)
    names = ["Linear", "Conv1d", "Conv2d", "Conv3d", "LayerNorm"]
    before = {name: getattr(torch.nn, name) for name in names}
    try:
        for name in names:
            setattr(torch.nn, name, getattr(operations, name))
        yield
    finally:
        for name, value in before.items():
            setattr(torch.nn, name, value)
