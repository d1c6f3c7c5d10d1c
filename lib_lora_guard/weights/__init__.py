"""The storage formats of weights and their decoders. Needs only torch, no adapter and no host.

Names are imported on first use: headers of files are judged with `dtype_names` and `bnb4_layout` alone, which need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bnb4 import Bnb4Decoder as Bnb4Decoder
    from .codec import Codec as Codec
    from .codec import Decoder as Decoder
    from .codec import PlainCodec as PlainCodec
    from .codec import ScaledFp8Codec as ScaledFp8Codec
    from .dtype_names import dtype_name as dtype_name
    from .gguf_blocks import Q4_0Codec as Q4_0Codec
    from .gguf_blocks import Q8_0Codec as Q8_0Codec
    from .gguf_decoders import GGUF_DECODERS as GGUF_DECODERS
    from .nf4 import Nf4Codec as Nf4Codec
    from .storage import Storage as Storage
    from .storage import shares_storage as shares_storage
    from .storage import storage_of as storage_of
    from .stored_linear import StoredLinear as StoredLinear

_MODULES = {
    "bnb4": ("Bnb4Decoder",),
    "codec": ("Codec", "Decoder", "PlainCodec", "ScaledFp8Codec"),
    "dtype_names": ("dtype_name",),
    "gguf_blocks": ("Q4_0Codec", "Q8_0Codec"),
    "gguf_decoders": ("GGUF_DECODERS",),
    "nf4": ("Nf4Codec",),
    "storage": ("Storage", "shares_storage", "storage_of"),
    "stored_linear": ("StoredLinear",),
}


def __getattr__(name: str) -> object:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{module}", __name__), name)
