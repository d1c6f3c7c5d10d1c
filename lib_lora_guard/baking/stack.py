"""Matches a stack of LoRAs with a model's parameters, by the same rules as everywhere, and refuses before any work
starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..adapters import Term
from ..adapters.files import LoraFile
from ..checkpoints.lora_header import damaged_where_torch_refuses
from ..checkpoints.model_header import Checkpoint
from ..errors import LoraMismatchError, Message, about
from ..files import shown
from ..models.fit import Fit, fit_file


@dataclass(frozen=True)
class BakedLora:
    """One LoRA of the stack, and its fit to the checkpoint."""

    name: str
    strength: float
    fit: Fit


@dataclass(frozen=True)
class Stack:
    """The matched stack."""

    loras: list[BakedLora]
    terms: Mapping[str, list[Term]]
    """By parameter, in the order of the stack."""


def match_stack(checkpoint: Checkpoint, loras: Sequence[tuple[LoraFile, float]]) -> Stack:
    """Fits every LoRA to the checkpoint.

    Raises:
        LoraMismatchError: A LoRA was made for another model, or none of it fits. The message names the file.
    """
    target = checkpoint.target()
    baked, merged = [], dict[str, list[Term]]()
    for origin, (file, strength) in enumerate(loras):
        name = shown(file.path.name)
        with damaged_where_torch_refuses(file.path):
            fit = fit_file(file, target, strength, origin)
        if fit.refused is not None:
            raise LoraMismatchError(about(name, fit.refused))
        if not fit.terms:
            raise LoraMismatchError(_nothing_fits(name, file, fit))
        baked.append(BakedLora(name, strength, fit))
        for key, terms in fit.terms.items():
            merged.setdefault(key, []).extend(terms)
    return Stack(baked, merged)


def _nothing_fits(name: str, file: LoraFile, fit: Fit) -> Message:
    first = shown(next(iter([*fit.lost, *fit.skipped]), "-"))
    return about(name, Message("bake.nothing_fits", {"count": len(file.adapters), "first": first}))
