"""The storage formats of weights and their decoders. Needs only torch, no adapter and no host."""

from .bnb4 import Bnb4Decoder
from .codec import Codec, Decoder, PlainCodec, ScaledFp8Codec
from .gguf_blocks import Q4_0Codec, Q8_0Codec
from .gguf_decoders import GGUF_DECODERS
from .nf4 import Nf4Codec
from .storage import Storage, dtype_name, shares_storage, storage_of
from .stored_linear import StoredLinear

__all__ = [
    "GGUF_DECODERS",
    "Bnb4Decoder",
    "Codec",
    "Decoder",
    "Nf4Codec",
    "PlainCodec",
    "Q4_0Codec",
    "Q8_0Codec",
    "ScaledFp8Codec",
    "Storage",
    "StoredLinear",
    "dtype_name",
    "shares_storage",
    "storage_of",
]
