"""The stored weights that one pass can read: raw tensors on one device, with the facts that give their bytes a meaning.

A weight's values come out bit for bit as the host's dequantisation gives them, so each class says in which dtype the host
calculates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..cached_property import cached_property
from ..weights import kitchen
from ..weights.dtype_names import dtype_name

BLOCKS = {
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q5_0": (32, 22),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""Values and bytes of a block in the file, by GGUF format."""
BAKED_BYTES = {"Q4_K": 160}
"""Bytes of a block after Forge has laid it out anew, where they are others than in the file."""
REORDERED = frozenset({"Q8_0", "Q4_0", "Q4_K"})
"""The formats that Forge lays out anew when it loads a model: scales in its dtype, nibbles in the weight's order."""
_FP8_FORMS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight `(out, in)` as it lies on one device.

    Attributes:
        data: Its bytes or numbers, contiguous.
        values: The dtype that the host's dequantisation returns, before it casts to the layer's; None if that is the layer's.
    """

    data: torch.Tensor
    values: torch.dtype | None

    @property
    def shape(self) -> tuple[int, int]:
        """The real shape `(out, in)`."""
        raise NotImplementedError

    @cached_property
    def kind(self) -> str:
        """The kind of kernel that reads it, as text for the log: one kernel is chosen or refused for all weights of a kind."""
        return " ".join([*self._words(), *([] if self.values is None else [f"by {dtype_name(self.values)}"])])

    def _words(self) -> list[str]:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class _Scaled(Stored):
    """A matrix of small numbers; weight = data * scale, multiplied in fp32 and rounded once.

    Attributes:
        data: `(out, in)`.
        scale: None, one value or `(out,)` or `(out, 1)`. Where the host rounds the scale first (Forge: to the layer's dtype), so
            must the caller. fp32 spares a conversion in each call.
    """

    data: torch.Tensor
    values: torch.dtype | None = None
    scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    def _form(self) -> str:
        raise NotImplementedError

    def _words(self) -> list[str]:
        return [
            self._form(),
            *([] if self.scale is None else ["scaled"]),
            *(["odd"] if self.data.shape[1] % 16 else []),
        ]


@dataclass(frozen=True, eq=False)
class Fp8(_Scaled):
    """float8_e4m3fn or float8_e5m2."""

    def _form(self) -> str:
        return f"fp8 {_FP8_FORMS.get(self.data.dtype, dtype_name(self.data.dtype))}"


@dataclass(frozen=True, eq=False)
class Int8(_Scaled):
    """int8 with one scale for all, or one a row. Not for weights that are stored rotated."""

    def _form(self) -> str:
        return "int8"


@dataclass(frozen=True, eq=False)
class Nested:
    """The scales of bitsandbytes' scales: absmax = code[absmax] * scales[its block] + offset.

    Attributes:
        code: `(256,)` fp32.
        scales: One fp32 for every `block` values of absmax.
        offset: One fp32.
        block: Values of absmax that share a scale.
    """

    code: torch.Tensor
    scales: torch.Tensor
    offset: torch.Tensor
    block: int = 256


@dataclass(frozen=True, eq=False)
class Bnb4(Stored):
    """bitsandbytes' four bits, the earlier value in the high nibble. A block may cross rows.

    Attributes:
        data: The packed bytes in any shape and dtype.
        values: The dtype of its quant state.
        absmax: One fp32 a block; uint8 where `nested` is given. In the order of the weight's blocks.
        out_in: The shape.
        form: "nf4" or "fp4".
        block: Values of the weight that share an absmax.
    """

    data: torch.Tensor
    values: torch.dtype | None
    absmax: torch.Tensor
    out_in: tuple[int, int]
    form: str = "nf4"
    block: int = 64
    nested: Nested | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_in

    @property
    def is_crossing(self) -> bool:
        """True where a block crosses rows, or a row is no multiple of 32 values."""
        return bool(self.out_in[1] % self.block or self.out_in[1] % 32)

    def _words(self) -> list[str]:
        nested = [] if self.nested is None else [f"nested{self.nested.block}"]
        return [self.form, str(self.block), *nested, *(["crossing"] if self.is_crossing else [])]


@dataclass(frozen=True, eq=False)
class Gguf(Stored):
    """Blocks of GGUF, as the file has them or as Forge and Neo lay them out when they load a model.

    Attributes:
        data: The blocks' bytes, in any shape and dtype of one byte.
        values: The dtype in which the host calculates, each step rounded to it. None: in fp32, rounded once.
        form: A key of BLOCKS.
        out_in: The shape. `in` is a multiple of the block.
        baked: True for Forge's layout, whose scales are in `values`.
    """

    data: torch.Tensor
    values: torch.dtype | None
    form: str
    out_in: tuple[int, int]
    baked: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_in

    @property
    def is_reordered(self) -> bool:
        """True where Forge's layout differs from the file's."""
        return self.baked and self.form in REORDERED

    @property
    def block_bytes(self) -> int:
        """Bytes of a block as it lies here."""
        return BAKED_BYTES.get(self.form, BLOCKS[self.form][1]) if self.is_reordered else BLOCKS[self.form][1]

    def _words(self) -> list[str]:
        return [self.form, *(["baked"] if self.is_reordered else [])]


def stored_weight(
    parameter: torch.Tensor, scale: torch.Tensor | None = None, is_laid_out: bool = True
) -> Stored | None:
    """Returns a layer's weight as one pass can read it, without a copy of it; None for a storage that has no such pass.

    Args:
        parameter: The layer's weight `(out, in)`: fp8, bitsandbytes' four bits, GGUF of Forge or Neo, or a tensor of comfy_kitchen.
        scale: What the host multiplies a plain fp8 weight by, as it does so: Forge casts `scale_weight` to the layer's dtype.
        is_laid_out: False to see GGUF that Forge has not laid out yet as it will be then. Its bytes are not to be read.
    """
    any_parameter: Any = parameter
    if kitchen.is_quantized(parameter):
        return _of_kitchen(parameter)
    if hasattr(parameter, "gguf_cls"):
        return _of_gguf(any_parameter, is_laid_out)
    if hasattr(parameter, "bnb_quantized"):
        return _of_bnb(any_parameter) if any_parameter.bnb_quantized else None
    if parameter.dim() != 2 or parameter.dtype not in _FP8_FORMS or not parameter.is_contiguous():
        return None
    return Fp8(parameter.data, scale=_in_fp32(scale))


def _of_kitchen(tensor: kitchen.QuantizedTensor) -> Stored | None:
    params: Any = tensor._params
    rotated = getattr(params, "convrot", False) or getattr(params, "transposed", False)
    if rotated or len(tensor.shape) != 2 or tuple(tensor._qdata.shape) != tuple(tensor.shape):
        return None
    data, values = tensor._qdata.data, params.orig_dtype
    if not data.is_contiguous():
        return None
    form = kitchen.FORMATS.get(tensor._layout_cls)
    if form == "fp8" and data.dtype in _FP8_FORMS:
        # The library rounds the scale to the dtype that it returns.
        return Fp8(data, values, _in_fp32(params.scale.to(values)))
    if form == "int8" and params.scale.numel() in (1, data.shape[0]):
        return Int8(data, values, _in_fp32(params.scale))
    return None


def _of_gguf(parameter: Any, is_laid_out: bool) -> Stored | None:
    form = getattr(parameter.gguf_cls, "__name__", "")
    shape = tuple(int(size) for size in parameter.real_shape)
    data = parameter.data
    if form not in BLOCKS or len(shape) != 2 or shape[1] % BLOCKS[form][0] or not data.is_contiguous():
        return None
    if is_laid_out and not parameter.baked:  # the host refuses to decode it
        return None
    return Gguf(data, parameter.computation_dtype, form, (shape[0], shape[1]), baked=True)


def _of_bnb(parameter: Any) -> Stored | None:
    state = parameter.quant_state
    shape = tuple(int(size) for size in state.shape)
    if len(shape) != 2 or getattr(state, "packing_format_for_cpu", False) or state.absmax.dim() > 1:
        return None
    nested = None
    if state.nested:
        second = state.state2
        nested = Nested(
            second.code, second.absmax, torch.as_tensor(state.offset, device=state.absmax.device), second.blocksize
        )
    return Bnb4(
        parameter.data, state.dtype, state.absmax, (shape[0], shape[1]), state.quant_type, state.blocksize, nested
    )


def _in_fp32(scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if scale is None else scale.float()
