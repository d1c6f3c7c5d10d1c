import contextlib
import json

import torch

from backend import utils
from backend.operations_gguf import dequantize_tensor
from backend.quant_ops import QuantizedTensor

current_device, current_dtype, current_manual_cast_enabled = None, None, False


FUNCTIONS_GET_COPIES = False
"""As in Neo since September 2026: without manual cast too, functions get a copy of the parameter."""


def get_weight_and_bias(layer):
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if FUNCTIONS_GET_COPIES and layer.weight_function:
        weight = weight.clone()
    if FUNCTIONS_GET_COPIES and layer.bias_function:
        bias = None if bias is None else bias.clone()
    for function in layer.weight_function:
        weight = function(weight)
    for function in layer.bias_function:
        bias = function(bias)
    return weight, bias


def _cast(value, functions, x, decode, skip_dtype):
    """The functions get a copy, in the dtype of `x`."""
    if value is None:
        return None
    if not functions and decode is None:
        return value.to(device=x.device) if skip_dtype else value.to(device=x.device, dtype=x.dtype)
    value = value.dequantize() if isinstance(value, QuantizedTensor) else value
    value = decode(value) if decode is not None else value.clone()
    value = value if skip_dtype else value.to(x.dtype)
    for function in functions:
        value = function(value)
    return value


def weights_manual_cast(layer, x, *, weight_fn=None, skip_bias_dtype=False):
    weight = _cast(layer.weight, layer.weight_function, x, weight_fn, False)
    return weight, _cast(layer.bias, layer.bias_function, x, None, skip_bias_dtype), None


class ForgeWeights:
    parameters_manual_cast = False
    weight_function = []
    bias_function = []


def _weights_of(layer, x):
    return weights_manual_cast(layer, x)[:2] if layer.parameters_manual_cast else get_weight_and_bias(layer)


def _made(base):
    class Made(base, ForgeWeights):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "device": current_device, "dtype": current_dtype})
            self.parameters_manual_cast = current_manual_cast_enabled

        def reset_parameters(self):
            return None

    Made.__name__ = base.__name__
    return Made


class ForgeOperations:
    class Linear(_made(torch.nn.Linear)):
        def forward(self, x):
            return torch.nn.functional.linear(x, *_weights_of(self, x))

    class Conv1d(_made(torch.nn.Conv1d)):
        def forward(self, x):
            return self._conv_forward(x, *_weights_of(self, x))

    class Conv2d(_made(torch.nn.Conv2d)):
        def forward(self, x):
            return self._conv_forward(x, *_weights_of(self, x))

    class Conv3d(_made(torch.nn.Conv3d)):
        def forward(self, x):
            return self._conv_forward(x, *_weights_of(self, x))

    class LayerNorm(_made(torch.nn.LayerNorm)):
        def forward(self, x):
            if not self.parameters_manual_cast:
                return super().forward(x)
            weight, bias, _ = weights_manual_cast(self, x)
            return torch.nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class ForgeOperationsGGUF(ForgeOperations):
    class Linear(torch.nn.Module, ForgeWeights):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    value = state_dict[prefix + name]
                    value.computation_dtype = current_dtype
                    setattr(self, name, value)

        def _apply(self, fn, recurse=True):
            for name, parameter in list(self.named_parameters(recurse=False)):
                setattr(self, name, utils.tensor2parameter(fn(parameter)))
            return self

        def forward(self, x):
            if self.bias is not None and self.bias.dtype != x.dtype:
                self.bias = utils.tensor2parameter(dequantize_tensor(self.bias).to(x.dtype))
            weight, bias, _ = weights_manual_cast(self, x, weight_fn=dequantize_tensor, skip_bias_dtype=True)
            return torch.nn.functional.linear(x, weight, bias)


class ForgeOperationsFP8(ForgeOperations):
    class Linear(ForgeOperations.Linear):
        errors = 0

        def forward(self, x):
            weight, bias, _ = weights_manual_cast(self, x)
            if self.weight_function:
                type(self).errors += 1
            return torch.nn.functional.linear(x, weight, bias)


def mixed_precision_ops(quant_config, compute_dtype):
    class MixedPrecisionOps(ForgeOperations):
        class Linear(torch.nn.Module, ForgeWeights):
            products = 0
            """How often the product of quantised weights was used."""

            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                super().__init__()
                self.in_features, self.out_features = in_features, out_features
                self.bias = torch.nn.Parameter(torch.empty(out_features, dtype=compute_dtype)) if bias else None

            def reset_parameters(self):
                return None

            def _load_from_state_dict(self, state_dict, prefix, *args):
                weight = state_dict.pop(prefix + "weight")
                if isinstance(weight, QuantizedTensor):
                    self.layout_type = weight._layout_cls
                else:
                    weight = weight.to(compute_dtype)
                self.weight = torch.nn.Parameter(weight, requires_grad=False)
                super()._load_from_state_dict(state_dict, prefix, *args)

            def forward(self, x):
                if getattr(self, "layout_type", None) and not self.weight_function and not self.bias_function:
                    type(self).products += 1
                weight, bias, _ = weights_manual_cast(self, x)
                return torch.nn.functional.linear(x, weight, bias)

            def _apply(self, fn, recurse=True):
                for key, parameter in self._parameters.items():
                    if parameter is not None:
                        self.register_parameter(key, torch.nn.Parameter(fn(parameter), requires_grad=False))
                return self

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                found = {} if destination is None else destination
                if self.bias is not None:
                    found[prefix + "bias"] = self.bias
                weight = self.weight
                if isinstance(weight, QuantizedTensor):
                    found[prefix + "weight"] = weight._qdata
                    found[prefix + "weight_scale"] = weight._params.scale
                    found[prefix + "comfy_quant"] = torch.tensor(list(json.dumps({}).encode()), dtype=torch.uint8)
                else:
                    found[prefix + "weight"] = weight
                return found

    return MixedPrecisionOps


@contextlib.contextmanager
def using_forge_operations(operations=None, device=None, dtype=None, manual_cast_enabled=False, bnb_dtype=None):
    global current_device, current_dtype, current_manual_cast_enabled
    current_device, current_dtype, current_manual_cast_enabled = device, dtype, manual_cast_enabled
    if isinstance(bnb_dtype, dict):
        operations = mixed_precision_ops(bnb_dtype, torch.float32)
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
