"""All GGUF tensor types that can be decoded, by their name in the format."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from .codec import Decoder, PlainCodec
from .gguf_blocks import IQ4NLDecoder, Q4_0Codec, Q4_1Decoder, Q5_0Decoder, Q5_1Decoder, Q8_0Codec
from .gguf_k_blocks import IQ4XSDecoder, Q2KDecoder, Q3KDecoder, Q4KDecoder, Q5KDecoder, Q6KDecoder

_ALL: tuple[Decoder, ...] = (
    PlainCodec(torch.float32, "F32"),
    PlainCodec(torch.float16, "F16"),
    PlainCodec(torch.bfloat16, "BF16"),
    Q4_0Codec(),
    Q4_1Decoder(),
    Q5_0Decoder(),
    Q5_1Decoder(),
    Q8_0Codec(),
    Q2KDecoder(),
    Q3KDecoder(),
    Q4KDecoder(),
    Q5KDecoder(),
    Q6KDecoder(),
    IQ4NLDecoder(),
    IQ4XSDecoder(),
)
GGUF_DECODERS: Mapping[str, Decoder] = MappingProxyType({decoder.format: decoder for decoder in _ALL})
"""`data` is `(rows, row bytes)` in uint8. Rows are all dimensions of the weight, in torch's order, except the last."""
