"""Counts what of a LoRA file a model has no place for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..adapters.base import Shape
from ..adapters.file_keys import meaning_of
from ..adapters.files import LoraFile
from ..adapters.left_out import LeftOut
from ..adapters.module_names import plain_name
from . import text

_TEXT = ("te1_", "te2_", "te3_", "text_model_", "text_encoders_", *text.HINTS)


def left_out(file: LoraFile, used: Iterable[str], shapes: Mapping[str, Shape]) -> LeftOut:
    """Compares a file with what of it is applied.

    Args:
        file: the LoRA.
        used: the modules, as written in the file, of which something is applied.
        shapes: the parameters of all models that the file was held against.
    """
    modules = {module for module, _ in file.adapters}
    others: dict[str, list[str]] = {}
    for key in file.unknown_keys:
        meaning = meaning_of(key)
        others.setdefault(meaning.module if meaning else key.rpartition(".")[0], []).append(key)
    lonely = others.keys() - modules
    left = (modules - set(used)) | lonely
    if not left:
        return LeftOut(of=len(modules))
    has_text, has_rest = _components(shapes)
    counted = {m for m in (*modules, *lonely) if (has_text if _is_text(m) else has_rest)}
    keys = [key for module in file.adapters_by_module() if module in left for key in file.keys.get(module, ())]
    keys += [key for module in lonely for key in others[module]]
    return LeftOut(tuple(dict.fromkeys(keys)), len(left & counted), len(counted))


def _components(shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    """Whether a model has text encoders, and whether it has anything else."""
    encoders = text.find_encoders(shapes)
    return bool(encoders), "" not in encoders


def _is_text(module: str) -> bool:
    return plain_name(module).startswith(_TEXT)
