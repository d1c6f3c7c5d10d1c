"""The stack of LoRAs as terms on a model's parameters: the same meaning as everywhere, and refusals before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..adapters import Term
from ..adapters.files import LoraFile
from ..adapters.fitting import misfit
from ..commands.checkpoint import Checkpoint
from ..commands.lora_facts import damaged_where_torch_refuses
from ..errors import LoraMismatchError
from ..files import shown
from ..models.matching import foreign_to, match_file
from ..models.names import NameMap
from ..planning.mode import is_input_projection


@dataclass
class BakedLora:
    """One LoRA of the stack. `used` counts modules of the file; `skipped` are keys without a place in the model, `lost`
    those that have one and cannot be applied, with reasons."""

    name: str
    strength: float
    used: int = 0
    skipped: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stack:
    """`terms` by parameter, in the order of the stack."""

    loras: list[BakedLora]
    terms: Mapping[str, list[Term]]


def match_stack(checkpoint: Checkpoint, loras: Sequence[tuple[LoraFile, float]]) -> Stack:
    """Raises LoraMismatchError, naming the file, for a LoRA that was made for another model or of which nothing fits."""
    names = checkpoint.names()
    baked, merged = [], dict[str, list[Term]]()
    for origin, (file, strength) in enumerate(loras):
        lora = BakedLora(shown(file.path.name), strength)
        baked.append(lora)
        with damaged_where_torch_refuses(file.path):
            fitting = _fitting(checkpoint, names, file, lora, origin)
        for key, terms in fitting.items():
            merged.setdefault(key, []).extend(terms)
    return Stack(baked, merged)


def _fitting(
    checkpoint: Checkpoint, names: NameMap, file: LoraFile, lora: BakedLora, origin: int
) -> dict[str, list[Term]]:
    if refused := foreign_to(file, checkpoint.architecture):
        raise LoraMismatchError(f"{lora.name}: {refused}")
    shapes = checkpoint.shapes
    try:
        match = match_file(file, names, shapes, lora.strength, origin)
    except LoraMismatchError as error:
        raise LoraMismatchError(f"{lora.name}: {error}") from None
    lora.skipped, lora.lost = list(match.skipped), list(match.lost)
    fitting = {}
    for key, terms in match.terms.items():
        wrong = misfit(terms, shapes[key], may_expand=is_input_projection(key))
        if wrong is None:
            fitting[key] = terms
        elif wrong.of_file:
            raise LoraMismatchError(
                f"{lora.name}: made for another model: {shown(key)}: {wrong.why}; use a LoRA made for this model"
            )
        else:
            lora.lost.append(f"{key}: {wrong.why}")
    if not fitting:
        first = shown(next(iter([*lora.lost, *lora.skipped]), "nothing"))
        raise LoraMismatchError(
            f"{lora.name}: none of its {len(file.adapters)} modules can be applied (first: {first}); use a LoRA made "
            "for this model, and a checkpoint that has the parts it changes"
        )
    left = {*lora.skipped, *(line.partition(": ")[0] for line in lora.lost)}
    lora.used = sum(f"{module}.{parameter}" not in left for module, parameter in file.adapters)
    return fitting
