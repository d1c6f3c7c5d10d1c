"""Reads what a LoRA file has beside its factors under the model's own names: whole norms, biases and weights.

PEFT saves the modules of `modules_to_save` and trained biases so; diffusers' control LoRAs have trained norms. They
replace the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import LoraFileError, LoraMismatchError, Message, about, reason
from ..files import shown
from .base import Adapter, check_values
from .file_groups import Tensors
from .file_settings import FileSettings
from .module_names import plain_name
from .other_kinds import other_kind_of
from .whole import SetAdapter

_SAVED = ".modules_to_save"
_HARMLESS = ("velora", "lora_velora", "monteclora", "lora_monteclora", "reshape_weight")
"""Beginnings of fields that the trained result does not need (PEFT's VeLoRA and MonteCLoRA; the size of a widened weight)."""
_ORIGINAL = ".original_module."
"""PEFT's copy of what the model has itself."""


@dataclass
class WholeWeights:
    """Whole parameters of a file.

    Attributes:
        adapters: by module and parameter.
        lost: names of tensors that are left out, each with the reason.
        keys: names of the tensors that are used, with their module.
    """

    adapters: dict[tuple[str, str], Adapter] = field(default_factory=dict)
    lost: dict[str, Message] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def by_module(self) -> dict[str, tuple[str, ...]]:
        """The names of tensors by module."""
        found: dict[str, list[str]] = {}
        for key, module in self.keys.items():
            found.setdefault(module, []).append(key)
        return {module: tuple(keys) for module, keys in found.items()}


def whole_weights(
    name: str,
    unknown: Sequence[str],
    tensors: Tensors,
    adapters: Mapping[tuple[str, str], Adapter],
    settings: FileSettings,
) -> WholeWeights:
    """Finds the whole parameters among the names that no kind knows.

    Args:
        name: the file's, for errors.
        unknown: these names.
        tensors: all of the file, by name.
        adapters: the file's others, by module and parameter.
        settings: the file's.

    Raises:
        LoraFileError: a tensor belongs to a module that is applied and its part in the formula is not known.
    """
    found = WholeWeights()
    if not unknown:
        return found
    applied = {plain_name(module): module for module, _ in adapters}
    for key in unknown:
        module, dot, last = key.rpartition(".")
        if not dot or _ORIGINAL in key:
            continue
        if last not in ("weight", "bias"):
            _check_field(name, key, module, last, applied)
            continue
        saved = _SAVED in module
        module = module.partition(_SAVED)[0] if saved else module
        module = applied.get(plain_name(module), module)
        if (module, last) in adapters or (module, last) in found.adapters:
            found.lost[key] = Message("lora.whole_weight")
        elif saved or _is_whole(name, module, last, tensors, key, settings):
            try:
                check_values(tensors[key])
            except LoraMismatchError as error:
                raise LoraFileError(about(name, about(shown(key), reason(error)))) from None
            found.adapters[module, last] = SetAdapter(tensors[key])
            found.keys[key] = module
        else:
            found.lost[key] = Message("lora.whole_weight")
    return found


def _is_whole(name: str, module: str, last: str, tensors: Tensors, key: str, settings: FileSettings) -> bool:
    """True if a tensor under the model's own name takes the place of the model's."""
    own = settings.of(module)
    try:
        if own.saves_whole(module) or (last == "bias" and own.saves_biases):
            return True
    except LoraFileError as error:
        raise LoraFileError(about(name, reason(error))) from None
    # A norm; a single bias of another layer may be a remnant of anything.
    weight = tensors.get(f"{module}.weight")
    return tensors[key].dim() == 1 and weight is not None and weight.dim() == 1


def _check_field(name: str, key: str, module: str, last: str, applied: Mapping[str, str]) -> None:
    """Raises LoraFileError for a field of a module that is applied, unless it changes nothing."""
    for owner, part in ((module, last), (module.rpartition(".")[0], module.rpartition(".")[2])):
        if not owner or plain_name(owner) not in applied or part.startswith(_HARMLESS):
            continue
        why = other_kind_of(key) or Message("lora.unknown_field", {"key": shown(key)})
        raise LoraFileError(about(name, why))
