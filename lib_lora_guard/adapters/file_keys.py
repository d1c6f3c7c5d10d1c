"""Reads the meaning of a tensor's name in a LoRA file: module, kind of adapter, field.

The kinds bring their keys (`kinds.Kind`). Trainers whose files they are taken from: kohya sd-scripts
(`lora_down.weight`), PEFT and diffusers (`lora_A.weight`, `lora.down.weight`), LyCORIS 4 (`hada_*`, `lokr_*`,
`oft_blocks`), ComfyUI and BFL (`diff_b`, `set_weight`, `lora_B.bias`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from .kinds import KINDS, MOST_PARTS, KeyEnd, Kind
from .other_kinds import other_kind_of


class KeyMeaning(NamedTuple):
    """The meaning of one name.

    Attributes:
        module: as written in the file.
        kind: None for fields that belong to whichever kind the module has (alpha, magnitude).
        field: of the kind's adapter.
    """

    module: str
    kind: Kind | None
    field: str


def meaning_of(key: str, names: Container[str] = ()) -> KeyMeaning | None:
    """The meaning of a tensor's name; None if it is no LoRA key.

    Args:
        key: the name in the file.
        names: all names in the file. Some names mean something only beside others.
    """
    end = _end_of(tuple(key.rsplit(".", MOST_PARTS)[1:]))
    if end is not None:
        return KeyMeaning(key[: -end.characters], end.kind, end.field)
    if without_dot := _without_dot(key):
        return without_dot
    for kind in KINDS.claims:
        claimed = kind.claim(key, names) if kind.claim is not None else None
        if claimed is not None:
            module, field = claimed
            return KeyMeaning(module, kind, field)
    return None


def _end_of(parts: tuple[str, ...]) -> KeyEnd | None:
    """Returns the meaning of a name's last parts; None if they are no kind's. A file's thousand names have a few ends."""
    ends = KINDS.ends
    try:
        return ends[parts]
    except KeyError:
        found = _known_end(parts)
    if sum(map(len, parts)) <= _LONGEST_END:
        if len(ends) >= _MOST_ENDS:
            ends.clear()
        ends[parts] = found
    return found


def _known_end(parts: tuple[str, ...]) -> KeyEnd | None:
    written = _with_adapter_name(parts)
    if written is not None:
        suffix, count = written
        return KeyEnd(sum(len(part) + 1 for part in parts[-count:]), *KINDS.keys[suffix])
    # The longest end has the say: "lora.up.weight" before "up.weight".
    for count in range(len(parts), 0, -1):
        suffix = ".".join(parts[-count:])
        known = KINDS.keys.get(suffix)
        if known is not None:
            return KeyEnd(len(suffix) + 1, *known)
    return None


_LONGEST_END, _MOST_ENDS = 200, 1000
"""Characters of an end that is remembered, and how many are."""


def _with_adapter_name(parts: Sequence[str]) -> tuple[str, int] | None:
    """Finds the adapter's own name that PEFT may put inside: `lora_A.style.weight`, `boft_R.default`.

    Returns:
        The key without it, and how many parts of the name they are together.
    """
    if len(parts) > 2 and parts[-3] in KINDS.peft_heads and parts[-1] in ("weight", "bias") and parts[-2]:
        key, count = f"{parts[-3]}.{parts[-1]}", 3
    elif len(parts) > 1 and parts[-2] in KINDS.peft_heads and parts[-1] not in ("weight", "bias", ""):
        key, count = parts[-2], 2
    else:
        return None
    return (key, count) if key in KINDS.peft_keys else None


_SPELLED_OUT = ("lora_", "hada_", "lokr_", "oft_", "boft_", "ia3_", "dora_")
"""Beginnings of fields that no module's own name has."""
_LONGEST_FIELD = 40


def _without_dot(key: str) -> KeyMeaning | None:
    """The meaning of a name whose dot before the field was flattened too (`..._fc1_hada_w1_a`, OneTrainer)."""
    found = _flat_fields(tuple(KINDS.keys)).search(key[-_LONGEST_FIELD:])
    if found is None or other_kind_of(key) is not None:
        return None
    module = key[: len(key) - len(found[0])]
    if not module or (found[1] == "alpha" and "." in key):
        return None
    return KeyMeaning(module, *KINDS.keys[_by_flat_name(tuple(KINDS.keys))[found[1].replace(".", "_")]])


@lru_cache(maxsize=2)
def _by_flat_name(keys: tuple[str, ...]) -> Mapping[str, str]:
    return {key.replace(".", "_"): key for key in keys if key.startswith(_SPELLED_OUT) or key == "alpha"}


@lru_cache(maxsize=2)
def _flat_fields(keys: tuple[str, ...]) -> re.Pattern[str]:
    fields = (
        re.escape(key).replace(r"\.", "[._]") for key in sorted(_by_flat_name(keys).values(), key=len, reverse=True)
    )
    return re.compile(rf"_({'|'.join(fields)})$")
