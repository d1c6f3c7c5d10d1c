"""Reads from a LoRA file what the panel says of it."""

from __future__ import annotations

from collections import Counter

from ..adapters.files import LoraFile
from ..models.architecture import detect_lora
from ..reporting.lora_rows import FileSheet
from ..units import MB

_NAMES = {
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "boft": "BOFT",
    "ia3": "IA3",
    "glora": "GLoRA",
    "diff": "full difference",
    "set": "whole weights",
}
"""The kinds of adapters as their trainers spell them."""


def sheet_of(file: LoraFile) -> FileSheet:
    """Returns the facts of a file."""
    made_for = detect_lora(file.shapes, file.metadata)
    ranks = Counter(one.rank for one in file.adapters.values() if one.rank is not None)
    kinds = Counter("DoRA" if one.is_dora else _NAMES.get(one.kind, one.kind) for one in file.adapters.values())
    return FileSheet(
        None if made_for is None else made_for.value,
        tuple(rank for rank, _ in ranks.most_common()),
        tuple(kind for kind, _ in kinds.most_common()),
        sum(one.bytes for one in file.adapters.values()) / MB,
    )
