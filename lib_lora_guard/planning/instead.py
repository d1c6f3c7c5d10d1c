"""Searches what of a model would fit where the model does not: a smaller text encoder, a smaller format. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .formats import MATRIX_BYTES
from .gguf_baked import FORGE_BLOCKS
from .predict import ModelFacts, Patch, Prediction, Weight

_FILE_ENDS: Mapping[str, str] = {
    "GGUF Q8_0": "Q8_0.gguf",
    "fp8": "fp8.safetensors",
    "GGUF Q6_K": "Q6_K.gguf",
    "GGUF Q5_K": "Q5_K_S.gguf",
    "GGUF Q4_K": "Q4_K_S.gguf",
    "NF4": "nf4.safetensors",
}
"""How files of a format are usually named, by the format of MATRIX_BYTES."""
_ONLY_FLUX = ("NF4",)
_ONLY_TRANSFORMERS = ("GGUF Q8_0", "GGUF Q6_K", "GGUF Q5_K", "GGUF Q4_K")
"""Formats that U-Nets are hardly ever published in."""
_STORAGE = re.compile(
    r"[-_. ](fp8|fp16|fp32|bf16|f16|nf4|int8|q\d(_\w+)?|e4m3fn|e5m2|scaled|bnb|pruned|v\d)$", re.IGNORECASE
)
_SMALL_BYTES = 4
"""Bytes per value of what GGUF files do not quantise."""


@dataclass(frozen=True)
class Saving:
    """A smaller text encoder: its name for users and the bytes that it saves."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Instead:
    """What would fit.

    Attributes:
        format: The format of MATRIX_BYTES; None to keep the model file.
        file_bytes: About the size of that file; 0 without one.
        text: The smaller text encoder; None to keep the one that is planned with.
        prediction: The guard's prediction with them.
    """

    format: str | None
    file_bytes: int
    text: Saving | None
    prediction: Prediction


def instead(
    model: ModelFacts,
    patches: Sequence[Patch],
    matrices: frozenset[str],
    text: Saving | None,
    predict: Callable[[ModelFacts, Sequence[Patch]], Prediction],
    architecture: str | None,
    good: Callable[[Prediction], bool],
) -> Instead | None:
    """Returns the first change that is enough, the one that changes least; None if none is.

    Args:
        model: The model as it is.
        patches: Its weights with LoRAs.
        matrices: The names of the weights that formats store in fewer bits.
        text: A smaller text encoder; None where there is none.
        predict: Predicts the guard.
        architecture: The value of `models.Architecture`; None if unknown.
        good: Judges a prediction.
    """
    for form in (None, *_formats(model, matrices, architecture)):
        for saving in (*([None] if form else []), *([text] if text else [])):
            other = replace(model, other_bytes=model.other_bytes - (saving.bytes if saving else 0))
            changed = patches
            if form is not None:
                other, changed = _stored_as(other, patches, matrices, form)
            if good(prediction := predict(other, changed)):
                size = file_bytes(model, matrices, form) if form else 0
                return Instead(form, size, saving, prediction)
    return None


def file_name(stem: str, form: str) -> str:
    """Returns how a file of this format is usually named: "flux1-dev-fp8" in Q4_K is "flux1-dev-Q4_K_S.gguf"."""
    while (plain := _STORAGE.sub("", stem)) != stem and plain:
        stem = plain
    return f"{stem}-{_FILE_ENDS[form]}"


def file_bytes(model: ModelFacts, matrices: frozenset[str], form: str) -> int:
    """Returns about the size of the model's file in a format."""
    blocks = FORGE_BLOCKS.get(form.removeprefix("GGUF "))
    per_value = MATRIX_BYTES[form] if blocks is None else blocks.stored_bytes / blocks.values
    small = _SMALL_BYTES if blocks else model.compute_bytes
    return int(sum(w.values * (per_value if w.key in matrices else small) for w in model.weights))


def _formats(model: ModelFacts, matrices: frozenset[str], architecture: str | None) -> Iterator[str]:
    now = sum(weight.bytes for weight in model.weights if weight.key in matrices)
    values = sum(weight.values for weight in model.weights if weight.key in matrices)
    for form, per_value in MATRIX_BYTES.items():
        if model.is_unet and form in _ONLY_TRANSFORMERS:
            continue
        if architecture != "Flux" and form in _ONLY_FLUX:
            continue
        if values * per_value < now:
            yield form


def _stored_as(
    model: ModelFacts, patches: Sequence[Patch], matrices: frozenset[str], form: str
) -> tuple[ModelFacts, list[Patch]]:
    per_value = MATRIX_BYTES[form]
    weights = [Weight(w.key, w.values, int(w.values * per_value)) if w.key in matrices else w for w in model.weights]
    sizes = {weight.key: weight.bytes for weight in weights}
    name = form.removeprefix("GGUF ")
    changed = [
        replace(p, bytes=sizes[p.key], format=name, wide=False) if p.key in matrices and p.key in sizes else p
        for p in patches
    ]
    return replace(model, weights=weights, wide=False), changed
