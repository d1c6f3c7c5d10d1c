"""Recognises kinds of adapters that are not supported, by the names of their tensors.

Sources of the names: the tuners of PEFT 0.21 and the modules of LyCORIS 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import Message

_PEFT = {
    "adamss": "AdaMSS", "adaption_prompt": "ADAPTION_PROMPT", "beft": "BEFT", "bone": "BONE", "c3a": "C3A",
    "cartridge": "CARTRIDGE", "cpt": "CPT", "deft": "DEFT", "delora": "DELORA", "fourierft": "FOURIERFT", "frod": "FROD",
    "glora": "GLORA", "gralora": "GRALORA", "hira": "HIRA", "hra": "HRA", "internal_xlora": "XLORA", "lily": "LILY",
    "ln_tuning": "LN_TUNING", "miss": "MISS", "osf": "OSF", "peanut": "PEANUT", "poly": "POLY", "prompt": "PROMPT_TUNING",
    "psoft": "PSOFT", "pvera": "PVERA", "randlora": "RANDLORA", "road": "ROAD", "shadow": "SHADOW", "shira": "SHIRA",
    "supertuning": "SUPERTUNING", "tinylora": "TINYLORA", "trainable_tokens": "TRAINABLE_TOKENS", "unilora": "UNILORA",
    "vblora": "VBLORA", "vera": "VERA", "waveft": "WAVEFT",
}  # fmt: skip
"""The kind by the beginning of its tensors' names (`hira_A`, `internal_xlora_classifier`)."""
_BEGINS = re.compile(rf"(?:^|\.)({'|'.join(_PEFT)})_[^.]*(?:\.|$)")
_TAIL = 120
"""Characters at the end of a name that hold the tensor's own part."""


def other_kind(keys: Iterable[str]) -> Message | None:
    """The sentence on the first tensor that belongs to a kind that is not supported; None if there is none."""
    return next((said for key in keys if (said := other_kind_of(key)) is not None), None)


def other_kind_of(key: str) -> Message | None:
    """The same for one tensor's name."""
    tail = key[-_TAIL:]
    if tail.endswith((".lora_E", ".lora_ranknum")):
        return _kind("ADALORA", "PEFT")
    if tail.endswith(".lora_diag"):
        return Message("lora.variant", {"variant": "KaSA", "entry": "kasa_config"})
    if tail.endswith((".lambda_layer", ".q_layer.weight", ".p_layer.weight")):
        return _kind("T-LoRA", "LyCORIS")
    found = _BEGINS.search(tail)
    return None if found is None else _kind(_PEFT[found[1]], "PEFT")


def _kind(kind: str, library: str) -> Message:
    return Message("lora.other_kind", {"kind": kind, "library": library})
