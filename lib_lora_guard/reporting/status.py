"""The panel's data beside the log: loaded models, free memory, active settings.

Texts are `str`; a Message is translated for each reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..files import shown
from ..messages import Joined, Message, in_language
from ..messages.catalogue import ENGLISH, TEXTS
from ..units import MB
from .report import ApplyReport, LoraReport, mode_word

_NAME_CHARACTERS = 200
_TEXT_CHARACTERS = 600


@dataclass(frozen=True)
class LoraStatus:
    """One LoRA on one model."""

    name: str
    strength: float
    used: int = 0
    skipped: int = 0
    lost: int = 0
    """Keys that fit the model but could not be patched."""
    mb: float = 0.0
    modes: Mapping[str, int] = field(default_factory=dict)
    """Number of weights by mode."""
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The reasons for each mode."""
    fused: int = 0
    """Number of weights in bypass that fast kernels are for."""
    refused: str | None = None


@dataclass(frozen=True)
class ModelStatus:
    """One model and its LoRAs, after the last change."""

    name: str
    loras: tuple[LoraStatus, ...]
    device: str
    device_mb: float
    ram_mb: float
    milliseconds: float


@dataclass(frozen=True)
class Amount:
    """A named number of MB."""

    name: str
    mb: float | None
    source: str = ""
    """The origin of the number."""
    missing: str | None = None
    """The reason if `mb` is None."""


@dataclass(frozen=True)
class MemoryFigure:
    """One kind of memory."""

    name: str
    free_mb: float | None = None
    total_mb: float | None = None
    used: tuple[Amount, ...] = ()
    """Its uses, in the order of the bar; together with `free_mb` they make `total_mb`."""
    beside: tuple[Amount, ...] = ()
    """Related memory that is not part of it."""
    numbers: tuple[Amount, ...] = ()
    """All readings, each with its source."""
    source: str = ""
    missing: str | None = None
    """The reason if there is no figure."""


@dataclass(frozen=True)
class StepNeed:
    """Memory on the device that the next step of a model needs, by part."""

    model: str
    mb: float
    parts: tuple[Amount, ...]
    copied_mb: float = 0.0
    """Weights that do not fit there and are copied in every step."""


@dataclass(frozen=True)
class OtherPrograms:
    """Other programs that hold VRAM."""

    mb: float
    """All of them together."""
    largest: tuple[Amount, ...]
    """Without a size if the system does not report it."""
    more: bool = False
    """True if there are further ones."""


@dataclass(frozen=True)
class PanelStatus:
    """A snapshot of all data for the panel."""

    mode: str
    enabled: bool
    version: str
    models: tuple[ModelStatus, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    """LoRAs that reached no model, each with the reason."""
    memory: tuple[MemoryFigure, ...] = ()
    step: StepNeed | None = None
    programs: OtherPrograms | None = None
    """Set only if the other programs hold enough VRAM to matter."""
    allocator: tuple[str, ...] = ()
    problem: str | None = None
    """The reason if the guard is not active."""


def model_status(report: ApplyReport) -> ModelStatus:
    """Converts the report of a change of LoRAs to the panel's numbers."""
    return ModelStatus(
        name=str(report.model),
        loras=tuple(_lora_status(lora) for lora in report.loras),
        device=str(report.device),
        device_mb=report.device_bytes / MB,
        ram_mb=report.ram_bytes / MB,
        milliseconds=report.milliseconds,
    )


def as_json(status: PanelStatus, language: str = ENGLISH) -> dict[str, Any]:
    """Converts `status` to values that every JSON parser accepts (no NaN), with texts in `language`, without control
    characters.

    The texts are not HTML: names come from files of unknown authors.
    """
    return {
        "mode": _text(status.mode, language),
        "enabled": status.enabled,
        "version": status.version,
        "problem": _text(status.problem, language),
        "models": [_model(model, language) for model in status.models],
        "left_out": [
            {"name": shown(name, _NAME_CHARACTERS), "why": _text(why, language)} for name, why in status.left_out
        ],
        "memory": [_figure(figure, language) for figure in status.memory],
        "step": None if status.step is None else _step(status.step, language),
        "programs": None if status.programs is None else _programs(status.programs, language),
        "allocator": [_text(line, language) for line in status.allocator],
    }


def _lora_status(lora: LoraReport) -> LoraStatus:
    return LoraStatus(
        name=str(lora.label),
        strength=float(lora.strength),
        used=lora.used,
        skipped=len(lora.skipped),
        lost=len(lora.lost),
        mb=lora.bytes / MB,
        modes=dict(lora.modes),
        reasons={mode: tuple(sorted(reasons, key=str)) for mode, reasons in lora.reasons.items()},
        fused=lora.fused,
        refused=lora.refused,
    )


def _model(model: ModelStatus, language: str) -> dict[str, Any]:
    return {
        "name": shown(model.name, _NAME_CHARACTERS),
        "device": shown(model.device, _NAME_CHARACTERS),
        "device_mb": _number(model.device_mb),
        "ram_mb": _number(model.ram_mb),
        "milliseconds": _number(model.milliseconds),
        "loras": [_lora(lora, language) for lora in model.loras],
    }


def _lora(lora: LoraStatus, language: str) -> dict[str, Any]:
    return {
        "name": shown(lora.name, _NAME_CHARACTERS),
        "strength": _number(lora.strength, 4),
        "used": lora.used,
        "skipped": lora.skipped,
        "lost": lora.lost,
        "mb": _number(lora.mb),
        "modes": [_weights(lora, mode, language) for mode in sorted(lora.modes) if lora.modes[mode]],
        "refused": _text(lora.refused, language),
    }


def _figure(figure: MemoryFigure, language: str) -> dict[str, Any]:
    return {
        "name": _text(figure.name, language),
        "free_mb": _mb(figure.free_mb),
        "total_mb": _mb(figure.total_mb),
        "used": [_amount(amount, language) for amount in figure.used],
        "beside": [_amount(amount, language) for amount in figure.beside],
        "numbers": [_amount(amount, language) for amount in figure.numbers],
        "source": _text(figure.source, language),
        "missing": _text(figure.missing, language),
    }


def _step(step: StepNeed, language: str) -> dict[str, Any]:
    return {
        "model": shown(step.model, _NAME_CHARACTERS),
        "mb": _mb(step.mb),
        "parts": [_amount(amount, language) for amount in step.parts],
        "copied_mb": _mb(step.copied_mb),
    }


def _programs(programs: OtherPrograms, language: str) -> dict[str, Any]:
    return {
        "mb": _mb(programs.mb),
        "largest": [_amount(amount, language) for amount in programs.largest],
        "more": programs.more,
    }


def _amount(amount: Amount, language: str) -> dict[str, Any]:
    return {
        "name": _text(amount.name, language),
        "mb": _mb(amount.mb),
        "source": _text(amount.source, language),
        "missing": _text(amount.missing, language),
    }


def _mb(value: float | None) -> float | None:
    return None if value is None else _number(value)


def _weights(lora: LoraStatus, mode: str, language: str) -> dict[str, str | None]:
    name = mode_word(mode, lora.modes[mode], lora.fused) if f"mode.{mode}" in TEXTS else mode
    text = Message("panel.weights", {"count": lora.modes[mode], "mode": name})
    return {"text": _text(text, language), "why": _text(Joined(lora.reasons.get(mode, ())), language)}


def _text(text: str | None, language: str) -> str | None:
    return None if text is None else shown(str(in_language(text, language)), _TEXT_CHARACTERS)


def _number(value: float, digits: int = 1) -> float | None:
    """Returns None for numbers that JSON lacks: a strength read from a prompt may be `nan`."""
    return round(float(value), digits) if math.isfinite(value) else None
