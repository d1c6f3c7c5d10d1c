"""One row for each LoRA file: what the reports of all models and the file itself say of it, together. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..messages import Message
from ..units import MB
from .report import ApplyReport, LoraReport

_TEXT_ENCODERS = ("textencoder", "clip", "t5", "qwen", "gemma", "llama", "mistral")
_IMAGE_MODELS = ("kmodel", "unet")


@dataclass(frozen=True)
class FileSheet:
    """Facts of a LoRA file."""

    base: str | None
    """The architecture that it was made for; None if it does not show."""
    ranks: tuple[int, ...]
    """The ranks of its modules, the most frequent first."""
    kinds: tuple[str, ...]
    """The kinds of its modules ("LoRA", "LoKr"), the most frequent first."""
    mb: float
    """Size of the factors."""
    share_left_out: float | None = None
    """The share of its modules that no model takes, 0 to 1; None if it is not known."""


@dataclass(frozen=True)
class OnModel:
    """What one model takes of a LoRA: a copy of its report's numbers."""

    model: str
    strength: float
    used: int = 0
    skipped: int = 0
    lost: int = 0
    """Keys that fit the model but could not be patched."""
    modes: Mapping[str, int] = field(default_factory=dict)
    """Number of weights by mode."""
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The reasons for each mode."""
    fused: Mapping[str, int] = field(default_factory=dict)
    """Number of weights by mode that fast kernels are for."""
    refused: str | None = None


@dataclass(frozen=True)
class LoraRow:
    """One file on all models."""

    name: str
    sheet: FileSheet | None
    strengths: tuple[float, ...]
    """The strengths on the models, in their order; one where all are equal."""
    share: float | None
    """The share of the file that is applied, 0 to 1; None if it is not known."""
    cost_mb: float
    cost_ms: float | None
    """Its part of the time that the last change took, by the number of weights."""
    refused: str | None
    """The reason if nothing of it is applied."""
    models: tuple[OnModel, ...] = ()


def lora_rows(
    reports: Sequence[ApplyReport], left_out: Mapping[str, str], sheets: Mapping[str, FileSheet]
) -> tuple[LoraRow, ...]:
    """Returns the rows in the order of the prompt; LoRAs that reached no model come last.

    Args:
        reports: The last change of each model, the image model first.
        left_out: LoRAs that reached no model, each with the reason.
        sheets: Facts of the files by name.
    """
    found: dict[str, list[tuple[ApplyReport, LoraReport]]] = {}
    for report in reports:
        for lora in report.loras:
            found.setdefault(str(lora.label), []).append((report, lora))
    rows = [_row(name, on, sheets.get(name)) for name, on in found.items()]
    rows += [
        LoraRow(name, sheets.get(name), (), 0.0, 0.0, None, why) for name, why in left_out.items() if name not in found
    ]
    return tuple(rows)


def model_name(name: str) -> str:
    """Returns the name that users know a model by; the class name if there is none."""
    plain = name.lower()
    if any(known in plain for known in _TEXT_ENCODERS):
        return Message("panel.model.text_encoder")
    return Message("panel.model.image") if any(known in plain for known in _IMAGE_MODELS) else name


def way_name(mode: str, count: int, fused: int) -> Message:
    """Returns a mode in words that users know.

    Args:
        mode: The mode.
        count: The weights that have it.
        fused: Those of them that fast kernels are for.
    """
    if not fused:
        return Message(f"panel.way.{mode}")
    if fused == count:
        return Message(f"panel.way.{mode}_fused")
    return Message(f"panel.way.{mode}_partly_fused", {"fused": fused})


def _row(name: str, on: Sequence[tuple[ApplyReport, LoraReport]], sheet: FileSheet | None) -> LoraRow:
    loras = [lora for _, lora in on]
    refused = next((lora.refused for lora in loras if lora.refused is not None), None)
    is_refused = all(lora.refused is not None for lora in loras)
    strengths = tuple(float(lora.strength) for lora in loras)
    return LoraRow(
        name,
        sheet,
        strengths[:1] if len(set(strengths)) == 1 else strengths,
        0.0 if is_refused else _share(loras, sheet),
        sum(lora.bytes for lora in loras if lora.refused is None) / MB,
        None if is_refused else sum(_milliseconds(report, lora) for report, lora in on),
        refused if is_refused else None,
        tuple(_on_model(report, lora) for report, lora in on),
    )


def _on_model(report: ApplyReport, lora: LoraReport) -> OnModel:
    return OnModel(
        str(report.model),
        float(lora.strength),
        lora.used,
        len(lora.skipped),
        len(lora.lost),
        dict(lora.modes),
        {mode: tuple(sorted(reasons, key=str)) for mode, reasons in lora.reasons.items()},
        dict(lora.fused),
        lora.refused,
    )


def _share(loras: Iterable[LoraReport], sheet: FileSheet | None) -> float | None:
    if sheet is not None and sheet.share_left_out is not None:
        return 1.0 - sheet.share_left_out
    known = [lora for lora in loras if lora.refused is None]
    modules = sum(lora.left_out.of for lora in known)
    if modules:
        return 1.0 - sum(lora.left_out.modules for lora in known) / modules
    used, lost = sum(lora.used for lora in known), sum(len(lora.lost) for lora in known)
    return used / (used + lost) if used + lost else None


def _milliseconds(report: ApplyReport, lora: LoraReport) -> float:
    used = sum(one.used for one in report.loras)
    return report.milliseconds * lora.used / used if used else 0.0
