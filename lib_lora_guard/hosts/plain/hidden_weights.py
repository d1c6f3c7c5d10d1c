"""Weights that other libraries keep in their own way: packed, quantised, computed for each call, or elsewhere.

A library is recognised by what it has put on the layer and is never imported. Its own code decodes the weight, where the guard
needs the numbers at all (norms for a DoRA).

Sources, each by reading the installed package: bitsandbytes 0.50 `nn/modules.py`; torchao 0.18, optimum-quanto 0.2.7 and
comfy-kitchen 0.2.40 (tensors with a `dequantize` of their own); sdnq 0.2.8 `layers/__init__.py`; hqq 0.2.8 `core/quantize.py`;
accelerate 1.15 `hooks.py`; diffusers 0.42 `quantizers/gguf`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...adapters.base import Shape
from ...errors import Message
from ...weights.bnb4 import from_quant_state
from ...weights.dtype_names import dtype_name
from ...weights.storage import WIDE_DTYPES, Storage, storage_of

Decode = Callable[[int, int], torch.Tensor]
"""Returns rows of a weight, from a start and a length, as plain numbers."""


@dataclass(frozen=True, eq=False)
class HiddenWeight:
    """A weight whose numbers do not lie on the layer as they are.

    `decode` is None where they cannot be had. `obstacle` is the sentence for what needs them, if there is a better one than
    "stored as ..."; `name` the parameter that the layer keeps, if any.
    """

    format: str
    shape: Shape
    decode: Decode | None
    obstacle: Message | None = None
    name: str | None = "weight"

    def storage(self, kept: torch.Tensor | None) -> Storage:
        """Returns the storage. Never wide: nothing can be merged into it."""
        size = 0 if kept is None else _bytes_of(kept)
        return Storage(self.format, self.shape, size, wide=False)


def hidden_weight(layer: torch.nn.Module, name: str) -> HiddenWeight | None:
    """Returns the hidden weight that `layer` has under `name`; None for plain numbers, or if there is none."""
    parameter = layer._parameters.get(name)
    if name == "weight":
        found = _of_sdnq(layer) or _of_hqq(layer) or _of_quanto(layer)
        if found is not None:
            return found
        if parameter is None:
            return _computed(layer)
    if parameter is None or is_plain(parameter):
        return None
    return _of_parameter(layer, name, parameter)


_MARKS = {"sdnq_dequantizer", "weight_qtype"}
"""Attributes of a layer whose weight may look like plain numbers and is none."""


def is_plain(parameter: torch.nn.Parameter | None) -> bool:
    """Returns True for plain numbers of 16 bits and more, as far as the parameter tells; False where it takes a look."""
    return (
        type(parameter) is torch.nn.Parameter
        and parameter.dtype in WIDE_DTYPES
        and parameter.layout is torch.strided
        and not parameter.is_meta
    )


def has_no_marks(layer: torch.nn.Module) -> bool:
    """Returns True for a layer that no library has marked as its own."""
    return _MARKS.isdisjoint(layer.__dict__)


def _of_parameter(layer: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> HiddenWeight | None:
    kept, shape = parameter.data, tuple(parameter.shape)
    if kept.is_meta:
        return HiddenWeight(dtype_name(kept.dtype), shape, _offloaded(layer, name), Message("reason.elsewhere"))
    if hasattr(parameter, "quant_state") and hasattr(parameter, "quant_type"):
        state: Any = parameter.quant_state or getattr(layer, "quant_state", None)
        if state is None:
            return None
        return HiddenWeight(str(parameter.quant_type), tuple(state.shape), _four_bits(layer, parameter, state))
    if hasattr(parameter, "SCB") and parameter.dtype == torch.int8:
        return HiddenWeight("bitsandbytes int8", shape, _eight_bits(layer, parameter))
    if hasattr(parameter, "quant_shape"):
        return HiddenWeight("GGUF", tuple(parameter.quant_shape), None)
    if type(kept) is torch.Tensor and kept.layout is torch.strided and not kept.is_quantized:
        return None
    library = type(kept).__module__.partition(".")[0]
    form = f"{library} {type(kept).__name__}" if type(kept) is not torch.Tensor else str(kept.layout)
    return HiddenWeight(form, shape, _whole(lambda: _dequantised(parameter)) if _can_dequantise(kept) else None)


def _of_sdnq(layer: Any) -> HiddenWeight | None:
    dequantizer = layer.__dict__.get("sdnq_dequantizer")
    utils: Any = sys.modules.get("sdnq.utils")
    if dequantizer is None or utils is None:
        return None

    def decode() -> torch.Tensor:
        parts = utils.get_sdnq_params(layer)
        found: torch.Tensor = dequantizer(**parts, skip_quantized_matmul=dequantizer.use_quantized_matmul)
        return found

    shape = tuple(dequantizer.original_shape)
    return HiddenWeight(f"sdnq {dequantizer.weights_dtype}", shape, _whole(lambda: decode().reshape(shape)))


def _of_hqq(layer: Any) -> HiddenWeight | None:
    meta = layer.__dict__.get("meta")
    if not (type(layer).__module__.startswith("hqq.") and isinstance(meta, dict) and "shape" in meta):
        return None
    return HiddenWeight(f"hqq {meta.get('nbits')} bits", tuple(meta["shape"]), _whole(layer.dequantize), name="W_q")


def _of_quanto(layer: Any) -> HiddenWeight | None:
    """A layer of optimum-quanto, also one that quantises a plain weight anew in each call."""
    kind = layer.__dict__.get("weight_qtype")
    if kind is None or not hasattr(type(layer), "qweight"):
        return None
    shape = tuple(layer.weight.shape)
    return HiddenWeight(f"quanto {kind.name}", shape, _whole(lambda: layer.qweight.dequantize()))


def _computed(layer: torch.nn.Module) -> HiddenWeight | None:
    """A weight that torch's weight norm, spectral norm or a parametrization computes for each call."""
    if not isinstance(layer, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)):
        return None
    value = getattr(layer, "weight", None)
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or not value.is_floating_point():
        return None

    def decode(start: int, length: int) -> torch.Tensor:
        now: torch.Tensor = layer.weight
        return now.detach().narrow(0, start, length)

    return HiddenWeight("a computed weight", tuple(value.shape), decode, Message("reason.computed"), name=None)


def _whole(decode: Callable[[], torch.Tensor]) -> Decode:
    """Rows of a weight that its library decodes as a whole."""
    return lambda start, length: decode().detach().narrow(0, start, length)


def _four_bits(layer: torch.nn.Module, parameter: torch.nn.Parameter, state: Any) -> Decode:
    def decode(start: int, length: int) -> torch.Tensor:
        data, now = parameter.data, getattr(parameter, "quant_state", None) or state
        if getattr(now, "packing_format_for_cpu", False):
            unpack: Any = getattr(sys.modules.get("bitsandbytes.functional"), "_convert_weight_packed_for_cpu_inverse")  # noqa: B009
            data, now = unpack(data, now)
        decoder, parts = from_quant_state(data, now)
        return decoder.decode_rows(parts, start, length, torch.float32)

    return decode


def _eight_bits(layer: torch.nn.Module, parameter: Any) -> Decode | None:
    scales = parameter.SCB
    if scales is None:
        # The first forward pass moves them there.
        scales = getattr(getattr(layer, "state", None), "SCB", None)
    if scales is None:
        return None
    # As bitsandbytes' `int8_vectorwise_dequant`.
    return lambda start, length: (
        parameter.data.narrow(0, start, length).float() * (scales.narrow(0, start, length).float().unsqueeze(1) / 127)
    )


def _offloaded(layer: torch.nn.Module, name: str) -> Decode | None:
    """Rows of a weight that accelerate keeps elsewhere and loads for each call."""
    hooks: list[Any] = [layer.__dict__.get("_hf_hook")]
    hooks += list(getattr(hooks[0], "hooks", ()))
    where: Any = next((one.weights_map for one in hooks if getattr(one, "weights_map", None) is not None), None)
    return None if where is None else _whole(lambda: where[name])


def _can_dequantise(kept: torch.Tensor) -> bool:
    if type(kept) is torch.Tensor:
        return kept.is_quantized
    return type(kept).__dict__.get("dequantize") is not None or any(
        "dequantize" in vars(one) for one in type(kept).__mro__ if one is not torch.Tensor and one is not torch._C.TensorBase
    )  # fmt: skip


def _dequantised(parameter: torch.nn.Parameter) -> torch.Tensor:
    found: torch.Tensor = parameter.data.dequantize()
    return found


def _bytes_of(kept: torch.Tensor) -> int:
    try:
        return storage_of(kept).bytes
    except Exception:
        # A tensor of another library that does not answer: the number is for reports alone.
        return int(kept.numel()) * kept.element_size()
