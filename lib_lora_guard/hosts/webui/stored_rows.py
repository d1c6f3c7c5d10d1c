"""Decodes rows of weights that Forge and Forge Neo keep in GGUF blocks or in the 4-bit formats of bitsandbytes.

Sources: `backend/operations_gguf.py` (`ParameterGGUF`), `backend/operations_bnb.py` (`ForgeParams4bit`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeGuard

import torch

from ...patching.access import find_owner
from ...weights.bnb4 import from_quant_state
from .models import known_compute_dtype


class GgufTensor(Protocol):
    """The hosts' `ParameterGGUF`. It keeps the blocks of a tensor as `(blocks, bytes)`, row by row."""

    data: torch.Tensor
    device: torch.device
    real_shape: Sequence[int]

    def copy_with_data(self, data: torch.Tensor) -> GgufTensor: ...


class BnbTensor(Protocol):
    """A parameter that bitsandbytes has quantised to four bits."""

    data: torch.Tensor
    quant_state: Any


def is_gguf(tensor: torch.Tensor) -> TypeGuard[GgufTensor]:
    """Returns True for a parameter in GGUF blocks; plain numbers of a GGUF file have none."""
    return getattr(tensor, "gguf_cls", None) is not None


def is_bnb(tensor: torch.Tensor) -> TypeGuard[BnbTensor]:
    """Returns True for a parameter that bitsandbytes has quantised."""
    return bool(getattr(tensor, "bnb_quantized", False))


def gguf_rows(
    parameter: GgufTensor, start: int, length: int, device: torch.device, is_vector: bool = False
) -> torch.Tensor:
    """Returns rows of a GGUF parameter as the host decodes them.

    Args:
        parameter: baked.
        start: the first row.
        length: the number of rows.
        device: where they are decoded.
        is_vector: the parameter has one dimension, which counts as one row.
    """
    from backend.operations_gguf import dequantize_tensor

    shape = tuple(int(size) for size in parameter.real_shape)
    rows = 1 if is_vector else shape[0]
    per_row = parameter.data.shape[0] // rows
    part = parameter.copy_with_data(parameter.data.narrow(0, start * per_row, length * per_row).to(device))
    part.real_shape = torch.Size(shape if is_vector else (length, *shape[1:]))
    dense: torch.Tensor = dequantize_tensor(part)
    return dense


def bnb_rows(parameter: BnbTensor, start: int, length: int, device: torch.device) -> torch.Tensor:
    """Returns rows of a 4-bit parameter in fp32 on `device`.

    The hosts' own function moves the whole weight to the GPU, and needs a bitsandbytes that works there.
    """
    decoder, parts = from_quant_state(parameter.data, parameter.quant_state)
    return decoder.decode_rows({n: part.to(device) for n, part in parts.items()}, start, length, torch.float32)


def settle(model: torch.nn.Module, keys: Iterable[str]) -> None:
    """Does at once what layers of a GGUF model do in their first forward pass: their plain numbers become parameters in the
    dtype of the activations. Done later, that would take the place of what was merged into them.

    Args:
        model: the model. One that does not say in which dtype it computes is left alone.
        keys: the parameters that are about to be patched.
    """
    dtype = known_compute_dtype(model)
    for key in keys if dtype is not None else ():
        owner = find_owner(model, key)
        if owner is None:
            continue
        layer, name = owner
        parameter: torch.nn.Parameter = getattr(layer, name)
        if hasattr(parameter, "gguf_cls") and not is_gguf(parameter) and parameter.dtype != dtype and _is_linear(layer):
            setattr(layer, name, torch.nn.Parameter(parameter.data.to(dtype), requires_grad=False))


def _is_linear(layer: torch.nn.Module) -> bool:
    return any(kind.__name__ in ("Linear", "Conv2d") for kind in type(layer).__mro__)


def stored_bias(layer: torch.nn.Module) -> torch.Tensor | None:
    """Returns the bias as a layer's forward pass adds it, on any device; None if the layer has none."""
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, torch.Tensor):
        return None
    return gguf_rows(bias, 0, 1, bias.device, is_vector=True) if is_gguf(bias) else bias.data
