"""Measures how much of a LoRA a low-bit weight would keep after merging: the number for users who ask for a merge there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..adapters import apply_terms
from ..weights import Codec, Nf4Codec, PlainCodec, Q4_0Codec, Q8_0Codec
from ..weights.dtype_names import dtype_name
from ..weights.storage import FP8_DTYPES
from .attachment import Attachment
from .merge_attachment import MergeAttachment

ENCODERS: dict[str, Codec] = {codec.format: codec for codec in (Nf4Codec(), Q4_0Codec(), Q8_0Codec())} | {
    dtype_name(dtype): PlainCodec(dtype, dtype_name(dtype)) for dtype in FP8_DTYPES
}
"""Formats that a merged weight can be rounded to. No other GGUF type can be written."""

LEAST_VALUES = 1 << 16
"""Values of the weight that is measured, if there is one of this size: a smaller one is not typical of the others."""


@dataclass(frozen=True)
class MergeLoss:
    """The loss on one model, measured on one of its weights.

    Attributes:
        key: The weight that was measured.
        format: Its storage.
        weights: How many low-bit weights of the model have a LoRA and were not merged.
        cosine: The cosine between the delta that would be left and the true one; 1 is all of it. None if nothing can be
            written in this format.
    """

    key: str
    format: str
    weights: int
    cosine: float | None


def merge_loss(attachments: Iterable[Attachment]) -> MergeLoss | None:
    """Measures the loss on one of the low-bit weights that were not merged; None if there are none.

    It needs some fp32 copies of that weight, on its device.
    """
    low_bit = [a for a in attachments if not isinstance(a, MergeAttachment) and not a.site.storage.wide]
    if not low_bit:
        return None
    sizes = {id(a): torch.Size(a.site.shape).numel() for a in low_bit}
    large = [a for a in low_bit if sizes[id(a)] >= LEAST_VALUES] or low_bit
    example = min(large, key=lambda a: sizes[id(a)])
    codec = ENCODERS.get(example.site.storage.format)
    cosine = None if codec is None else _cosine(example, codec)
    return MergeLoss(example.site.key, example.site.storage.format, len(low_bit), cosine)


def _cosine(attachment: Attachment, codec: Codec) -> float | None:
    with torch.inference_mode(False), torch.no_grad():
        weight = attachment.access.dense(attachment.site)
        patched = apply_terms(weight.clone(), attachment.terms)
        if weight.dim() != 2 or patched.shape != weight.shape:
            return None
        left = codec.decode(codec.encode(patched), torch.float32).sub_(weight)
        true = patched.sub_(weight)
        return float(torch.nn.functional.cosine_similarity(left.flatten(), true.flatten(), dim=0))
