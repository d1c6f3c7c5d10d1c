"""Puts the weights of a model file into a module as they are stored: GGUF blocks, fp8, bitsandbytes' four bits.

Nothing is made dense. Each linear layer becomes a StoredLinear over the file's own bytes. It decodes them for every forward
pass, and the guard patches it without writing into them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from ...errors import FileFormatError
from ...files import FileHeader, TensorEntry, open_header, read_bytes, read_tensors, shown
from ...files.safetensors_file import FORMATS
from ...weights import GGUF_DECODERS, PlainCodec, ScaledFp8Codec, StoredLinear
from ...weights.bnb4 import from_file_parts
from ...weights.bnb4_layout import Part
from ...weights.codec import Decoder, Parts
from ...weights.dtype_names import dtype_name
from ...weights.scale_names import ScaleNames
from ...weights.storage import FP8_DTYPES, WIDE_DTYPES


def load_stored(model: torch.nn.Module, path: str | Path, prefix: str = "") -> list[str]:
    """Replaces every linear layer that the file has a weight for, and fills the other parameters.

    Args:
        model: The module.
        path: A safetensors or GGUF file.
        prefix: Stands before the names of modules in the file ("model.diffusion_model.").

    Returns:
        The names in the file that the model has no place for. They are not read.

    Raises:
        FileFormatError: The file cannot be read, or a tensor does not fit; with file, key, expected and found. The model may
            then have some of the new layers.
    """
    file = _StoredFile(open_header(Path(path)), prefix)
    layers = dict(model.named_modules())
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)}
    weights = {name: layer for name, layer in linear.items() if file.has(f"{name}.weight")}
    others = {
        name: p for name, p in model.named_parameters() if file.has(name) and name.rpartition(".")[0] not in weights
    }
    file.read(weights, others)
    for name, layer in weights.items():
        wanted = layer.out_features, layer.in_features
        decoder, parts = file.weight(name)
        file.check_shape(f"{name}.weight", wanted, file.shape_of(name, decoder, parts))
        bias = None if layer.bias is None else layer.bias.data
        if file.has(f"{name}.bias"):
            bias = file.plain(f"{name}.bias")
            file.check_shape(f"{name}.bias", (layer.out_features,), tuple(bias.shape))
        stored = StoredLinear.from_parts(decoder, parts, wanted, bias)
        owner, _, child = name.rpartition(".")
        setattr(layers[owner] if owner else model, child, stored)
    for name, parameter in others.items():
        value = file.plain(name)
        file.check_shape(name, tuple(parameter.shape), tuple(value.shape))
        parameter.data = value
    return file.left()


class _StoredFile:
    """The tensors of one file, by the names that the model has for them."""

    def __init__(self, header: FileHeader, prefix: str) -> None:
        self.header, self.prefix = header, prefix
        self._scales = ScaleNames(
            {name: _part(entry) for name, entry in header.tensors.items()},
            lambda name: read_bytes(header, [name])[name],
        )
        self._scale_of: dict[str, str | None] = {}
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.header.tensors

    def read(self, weights: Mapping[str, torch.nn.Module], others: Mapping[str, torch.nn.Parameter]) -> None:
        """Judges what the model has a place for by the header, then reads it."""
        for name in weights:
            key = f"{self.prefix}{name}.weight"
            if not self._is_bnb(key):
                self._scale_of[key] = self._named(self._scales.of, key)
            self._used |= {key, *self._scales.beside(key)}
            if self.has(f"{name}.bias"):
                self._used.add(f"{self.prefix}{name}.bias")
        for name in others:
            key = f"{self.prefix}{name}"
            if scale := self._named(self._scales.of, key):
                raise self._refused(
                    scale, "expected scales beside the weights of linear layers alone, found one of another layer"
                )
            self._used.add(key)
        self._tensors = read_tensors(self.header, [name for name in self.header.tensors if name in self._used])

    def weight(self, name: str) -> tuple[Decoder, Parts]:
        """Returns the decoder and the parts of one weight."""
        key = f"{self.prefix}{name}.weight"
        tensor, stored_as = self._tensors[key], self.header.tensors[key].format
        if self.header.container == "gguf":
            if stored_as not in GGUF_DECODERS:
                raise self._refused(key, f"expected one of {', '.join(GGUF_DECODERS)}, found {stored_as}")
            return GGUF_DECODERS[stored_as], {"data": tensor.view(torch.uint8) if tensor.dim() == 2 else tensor}
        if self._is_bnb(key):
            return self._named(lambda key: from_file_parts(self._tensors, key), key)
        scale_key = self._scale_of[key]
        scale = None if scale_key is None else self._scale(scale_key, tensor)
        if tensor.dtype in FP8_DTYPES:
            return ScaledFp8Codec(), {"data": tensor} if scale is None else {"data": tensor, "scale": scale}
        tensor = self.plain(f"{name}.weight")
        if scale is not None:
            # Multiplied here: in 16 bits the product would be rounded.
            tensor = tensor.float() * scale.float()
        return PlainCodec(tensor.dtype, dtype_name(tensor.dtype)), {"data": tensor}

    def _scale(self, key: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns the scale of a weight: one number, or `(rows, 1)`. Anything else would broadcast to other numbers in silence."""
        scale = self._tensors[key]
        if weight.dim() != 2:
            raise self._refused(key, f"expected the scale of a matrix, found a weight of {list(weight.shape)}")
        rows = weight.shape[0]
        if not scale.is_floating_point():
            raise self._refused(key, f"expected floating-point scales, found {self.header.tensors[key].format}")
        if scale.numel() != 1 and scale.shape != (rows, *(1 for _ in scale.shape[1:])):
            raise self._refused(key, f"expected one scale or {rows}, one a row, found {list(scale.shape)}")
        if not torch.isfinite(scale.float()).all():
            raise self._refused(key, "expected finite scales, found others")
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(rows, 1)

    def plain(self, name: str) -> torch.Tensor:
        """Returns a tensor of floating-point numbers."""
        key = f"{self.prefix}{name}"
        tensor = self._tensors[key]
        if tensor.dtype not in (*WIDE_DTYPES, *FP8_DTYPES):
            raise self._refused(key, f"expected plain floating-point numbers, found {self.header.tensors[key].format}")
        return tensor

    def shape_of(self, name: str, decoder: Decoder, parts: Parts) -> tuple[int, int]:
        """Returns the shape of a weight as its format has it."""
        return self._named(lambda key: decoder.shape_of(parts), f"{self.prefix}{name}.weight")

    def check_shape(self, name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
        if found != wanted:
            raise FileFormatError(
                f"{shown(self.header.path.name)}: {shown(self.prefix + name)}: expected {list(wanted)}, found {list(found)}; "
                "this file is for another model"
            )

    def left(self) -> list[str]:
        return [name for name in self.header.tensors if name not in self._used]

    def _is_bnb(self, key: str) -> bool:
        return f"{key}.absmax" in self.header.tensors

    def _named(self, ask: Callable[[str], _Answer], key: str) -> _Answer:
        try:
            return ask(key)
        except FileFormatError as error:
            raise FileFormatError(f"{shown(self.header.path.name)}: {shown(str(error), 300)}") from None

    def _refused(self, key: str, text: str) -> FileFormatError:
        return FileFormatError(
            f"{shown(self.header.path.name)}: {shown(key)}: {text}; use another quantisation of this model"
        )


_Answer = TypeVar("_Answer")


def _part(entry: TensorEntry) -> Part:
    # GGUF has formats of its own.
    return Part(entry.shape, dtype_name(FORMATS.get(entry.format, (0, None))[1] or entry.format), entry.bytes)
