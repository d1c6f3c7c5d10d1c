"""Reads and writes the patch tuples that Forge and ComfyUI hand to their patchers.

Format, from Forge `backend/patcher/lora.py` and `backend/patcher/base.py`: a patch is
`[strength, value, strength_model, offset, function]`; `value` is `(tensor,)` for a difference, `(kind, (..., ...))`
for a named kind, or a list `[base, patch, patch, ...]` for a nested stack; `offset` is `(dim, start, length)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LoraMismatchError
from .base import Adapter, Slice, Term
from .kinds import KINDS
from .whole import DiffAdapter, ForeignAdapter, NestedAdapter

if TYPE_CHECKING:
    import torch

Calculators = Mapping[str, Callable[["torch.Tensor", float, Any], "torch.Tensor"]]
"""The host's functions for the kinds of other extensions, by name (`extra_weight_calculators`)."""

OWN_KIND = "lora_guard"
"""The name of a patch that carries an adapter for which the host has no tuple."""


def parse_term(patch: Sequence[Any], calculators: Calculators, origin: int = 0) -> Term:
    """Reads one patch of the host.

    Args:
        patch: in the host's format.
        calculators: the host's functions for kinds of other extensions.
        origin: the LoRA's place in the user's order.

    Raises:
        LoraMismatchError: the patch has none of the known forms.
    """
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
    """Reads the adapter in the value of a patch. Takes and raises what `parse_term` does."""
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
    if kind in KINDS.host:
        try:
            return KINDS.host[kind].read(content)
        except TypeError as error:
            raise LoraMismatchError.of("lora.patch_content", kind=kind, error=str(error)) from None
    if kind in calculators:
        return ForeignAdapter(name=kind, value=content, calculate=calculators[kind])
    raise LoraMismatchError.of("lora.patch_kind", kind=kind)


def value_of(adapter: Adapter) -> Any:
    """The value of a patch for `adapter`.

    It is the host's own tuple if that is exact, so that other extensions find what they know; else
    `(OWN_KIND, (adapter,))`.
    """
    name = KINDS.host_name(adapter)
    content = None if name is None else KINDS.host[name].write(adapter)
    return (OWN_KIND, (adapter,)) if content is None else (name, content)


def calculate_own_kind(weight: torch.Tensor, strength: float, value: tuple[Adapter]) -> torch.Tensor:
    """Patches `weight` for the host, which calls this for OWN_KIND when it has to patch by itself.

    Meant for the host's `extra_weight_calculators`.
    """
    return value[0].patch(weight, strength, None)
