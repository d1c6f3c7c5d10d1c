"""Puts the weights of a model file into a module as they are stored: GGUF blocks, fp8, bitsandbytes' four bits.

Nothing is made dense. Each linear layer becomes a StoredLinear over the file's own bytes. It decodes them for every forward
pass, and the guard patches it without writing into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import FileFormatError
from ...files import FileHeader, open_header, read_tensors, shown
from ...weights import GGUF_DECODERS, PlainCodec, ScaledFp8Codec, StoredLinear
from ...weights.bnb4 import from_file_parts
from ...weights.codec import Decoder, Parts
from ...weights.dtype_names import dtype_name
from ...weights.storage import FP8_DTYPES, WIDE_DTYPES


def load_stored(model: torch.nn.Module, path: str | Path, prefix: str = "") -> list[str]:
    """Replaces every linear layer that the file has a weight for, and fills the other parameters.

    Args:
        model: The module.
        path: A safetensors or GGUF file.
        prefix: Stands before the names of modules in the file ("model.diffusion_model.").

    Returns:
        The names in the file that the model has no place for.

    Raises:
        FileFormatError: The file cannot be read, or a tensor does not fit; with file, key, expected and found. The model may
            then have some of the new layers.
    """
    header = open_header(Path(path))
    tensors = read_tensors(header)
    used: set[str] = set()
    layers = dict(model.named_modules())
    for name, layer in layers.items():
        key = f"{prefix}{name}.weight"
        if not isinstance(layer, torch.nn.Linear) or key not in tensors:
            continue
        decoder, parts = _stored(header, tensors, key)
        wanted, found = (layer.out_features, layer.in_features), decoder.shape_of(parts)
        if found != wanted:
            raise FileFormatError(
                f"{shown(header.path.name)}: {shown(key)}: expected {list(wanted)}, found {list(found)}; "
                "this file is for another model"
            )
        bias = None if layer.bias is None else layer.bias.data
        if f"{prefix}{name}.bias" in tensors:
            bias = _plain(header, f"{prefix}{name}.bias", tensors[f"{prefix}{name}.bias"])
        stored = StoredLinear.from_parts(decoder, parts, wanted, bias)
        owner, _, child = name.rpartition(".")
        setattr(layers[owner] if owner else model, child, stored)
        used |= {k for k in tensors if k == key or k.startswith(f"{key}.")}
        used |= {f"{prefix}{name}.bias", f"{prefix}{name}.scale_weight"} & tensors.keys()
    for name, parameter in list(model.named_parameters()):
        key = f"{prefix}{name}"
        if key in tensors and key not in used:
            value = _plain(header, key, tensors[key])
            if value.shape != parameter.shape:
                raise FileFormatError(
                    f"{shown(header.path.name)}: {shown(key)}: expected {list(parameter.shape)}, found {list(value.shape)}; "
                    "this file is for another model"
                )
            parameter.data = value
            used.add(key)
    return [key for key in tensors if key not in used]


def _stored(header: FileHeader, tensors: Mapping[str, torch.Tensor], key: str) -> tuple[Decoder, Parts]:
    """Returns the decoder and the parts of one weight of the file."""
    tensor, stored_as = tensors[key], header.tensors[key].format
    if header.container == "gguf":
        if stored_as not in GGUF_DECODERS:
            raise FileFormatError(
                f"{shown(header.path.name)}: {shown(key)}: expected one of {', '.join(GGUF_DECODERS)}, found {stored_as}; "
                "use another quantisation of this model"
            )
        return GGUF_DECODERS[stored_as], {"data": tensor.view(torch.uint8) if tensor.dim() == 2 else tensor}
    if f"{key}.absmax" in tensors:
        return from_file_parts(tensors, key)
    if tensor.dtype in FP8_DTYPES:
        scale = tensors.get(f"{key.removesuffix('weight')}scale_weight")
        return ScaledFp8Codec(), {"data": tensor} if scale is None else {"data": tensor, "scale": scale}
    return PlainCodec(tensor.dtype, dtype_name(tensor.dtype)), {"data": _plain(header, key, tensor)}


def _plain(header: FileHeader, key: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in (*WIDE_DTYPES, *FP8_DTYPES):
        raise FileFormatError(
            f"{shown(header.path.name)}: {shown(key)}: expected plain floating-point numbers, found {header.tensors[key].format}; "
            "use another quantisation of this model"
        )
    return tensor
