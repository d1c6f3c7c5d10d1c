"""Reads the patch tuples that Forge and ComfyUI hand to their patchers.

Format, from Forge `backend/patcher/lora.py` and `backend/patcher/base.py`: a patch is
`[strength, value, strength_model, offset, function]`; `value` is `(tensor,)` for a difference, `(kind, (..., ...))`
for a named kind, or a list `[base, patch, patch, ...]` for a nested stack; `offset` is `(dim, start, length)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import LoraMismatchError
from .base import Adapter, Slice, Term
from .glora import GloraAdapter
from .loha import LohaAdapter
from .lokr import LokrAdapter
from .lora import LoraAdapter
from .whole import DiffAdapter, ForeignAdapter, NestedAdapter, SetAdapter

Calculators = Mapping[str, Callable[[torch.Tensor, float, Any], torch.Tensor]]


def parse_term(patch: Sequence[Any], calculators: Calculators, origin: int = 0) -> Term:
    """One host patch as a Term. Raises LoraMismatchError for a value that is none of the known forms."""
    if len(patch) < 5:
        raise LoraMismatchError.of("lora.patch_fields", count=len(patch))
    strength, value, strength_model, offset, function = patch[:5]
    return Term(
        adapter=parse_value(value, calculators),
        strength=float(strength),
        strength_model=float(strength_model),
        part=None if offset is None else Slice(*(int(n) for n in offset)),
        function=function,
        origin=origin,
    )


def parse_value(value: Any, calculators: Calculators) -> Adapter:
    """The adapter in one patch value."""
    if isinstance(value, list):
        return NestedAdapter(base=value[0], terms=tuple(parse_term(p, calculators) for p in value[1:]))
    if isinstance(value, tuple) and len(value) == 1:
        return DiffAdapter(value[0])
    if not (isinstance(value, tuple) and len(value) == 2):
        raise LoraMismatchError.of("lora.patch_value", kind=type(value).__name__)
    kind, content = value
    if kind == OWN_KIND:
        adapter: Adapter = content[0]
        return adapter
    if kind in _READERS:
        try:
            return _READERS[kind](*_without_spare_places(content, _READERS[kind]))
        except TypeError as error:
            raise LoraMismatchError.of("lora.patch_content", kind=kind, error=str(error)) from None
    if kind in calculators:
        return ForeignAdapter(name=kind, value=content, calculate=calculators[kind])
    raise LoraMismatchError.of("lora.patch_kind", kind=kind)


OWN_KIND = "lora_guard"
"""The name under which a patch carries an adapter that the host has no tuple for."""


def value_of(adapter: Adapter) -> Any:
    """The patch value that says the same as `adapter`: the host's own tuple where there is an exact one, so that other
    extensions find what they know, else `(OWN_KIND, (adapter,))`."""
    alpha = getattr(adapter, "alpha", None)
    if isinstance(adapter, LoraAdapter):
        return "lora", (adapter.up, adapter.down, alpha, adapter.mid, adapter.magnitude)
    if isinstance(adapter, LohaAdapter):
        a = adapter
        return "loha", (a.w1a, a.w1b, alpha, a.w2a, a.w2b, a.t1, a.t2, a.magnitude)
    if isinstance(adapter, LokrAdapter):
        k = adapter
        return "lokr", (k.w1, k.w2, alpha, k.w1a, k.w1b, k.w2a, k.w2b, k.t2, k.magnitude)
    if isinstance(adapter, GloraAdapter):
        return "glora", (adapter.a1, adapter.a2, adapter.b1, adapter.b2, alpha, adapter.magnitude)
    if isinstance(adapter, DiffAdapter) and adapter.scale == 1.0:
        return "diff", (adapter.diff,)
    if isinstance(adapter, SetAdapter):
        return "set", (adapter.value,)
    return OWN_KIND, (adapter,)


def calculate_own_kind(weight: torch.Tensor, strength: float, value: tuple[Adapter]) -> torch.Tensor:
    """For the host's `extra_weight_calculators`: what the host does with OWN_KIND when it has to patch by itself."""
    return value[0].patch(weight, strength, None)


def _without_spare_places(content: Sequence[Any], reader: Callable[..., Adapter]) -> Sequence[Any]:
    """LayerDiffuse's patches are lists of 16 places, of which a kind uses the first few (`load_frozen_patcher` in Forge
    `backend/patcher/unet.py`)."""
    known = len(inspect.signature(reader).parameters)
    return content[:known] if all(place is None for place in content[known:]) else content


def _number(alpha: Any) -> float | None:
    return None if alpha is None else float(alpha)


def _diff(difference: Any) -> Adapter:
    return DiffAdapter(difference)


def _set(value: Any) -> Adapter:
    return SetAdapter(value)


def _lora(up: Any, down: Any, alpha: Any, mid: Any = None, dora: Any = None) -> Adapter:
    return LoraAdapter(up, down, _number(alpha), mid, dora)


def _loha(
    w1a: Any, w1b: Any, alpha: Any, w2a: Any, w2b: Any, t1: Any = None, t2: Any = None, dora: Any = None
) -> Adapter:
    return LohaAdapter(w1a, w1b, w2a, w2b, _number(alpha), t1, t2, dora)


def _lokr(
    w1: Any, w2: Any, alpha: Any, w1a: Any, w1b: Any, w2a: Any, w2b: Any, t2: Any = None, dora: Any = None
) -> Adapter:
    return LokrAdapter(w1, w2, _number(alpha), w1a, w1b, w2a, w2b, t2, dora)


def _glora(a1: Any, a2: Any, b1: Any, b2: Any, alpha: Any, dora: Any = None) -> Adapter:
    return GloraAdapter(a1, a2, b1, b2, _number(alpha), dora)


_READERS: dict[str, Callable[..., Adapter]] = {
    "diff": _diff,
    "set": _set,
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
}
