"""What the panel shows beside the log, as data: what is loaded, what memory is left, what is in force.

Texts are `str`; those that are a Message reach each reader in their own language.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..files import shown
from ..weights.storage import MB
from .catalogue import ENGLISH, TEXTS
from .messages import Joined, Message, in_language
from .report import ApplyReport, LoraReport

_NAME_CHARACTERS = 200
_TEXT_CHARACTERS = 600


@dataclass(frozen=True)
class LoraStatus:
    """One LoRA on one model. `lost` keys fit the model and could not be patched; `modes` counts weights by mode, `reasons`
    says why they got it."""

    name: str
    strength: float
    used: int = 0
    skipped: int = 0
    lost: int = 0
    mb: float = 0.0
    modes: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class ModelStatus:
    name: str
    loras: tuple[LoraStatus, ...]
    device: str
    device_mb: float
    ram_mb: float
    milliseconds: float


@dataclass(frozen=True)
class MemoryFigure:
    """One kind of memory; `source` says whose numbers these are. `total_mb` is 0 where there is none of it."""

    name: str
    free_mb: float
    used_mb: float
    total_mb: float
    source: str


@dataclass(frozen=True)
class PanelStatus:
    """One look at everything. `left_out` has the LoRAs that reached no model, with the reason; `problem` says why the guard
    is not at work, where it is not."""

    mode: str
    enabled: bool
    version: str
    models: tuple[ModelStatus, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    memory: tuple[MemoryFigure, ...] = ()
    allocator: tuple[str, ...] = ()
    problem: str | None = None


def model_status(report: ApplyReport) -> ModelStatus:
    """What a change of LoRAs reported, in the panel's numbers."""
    return ModelStatus(
        name=str(report.model),
        loras=tuple(_lora_status(lora) for lora in report.loras),
        device=str(report.device),
        device_mb=report.device_bytes / MB,
        ram_mb=report.ram_bytes / MB,
        milliseconds=report.milliseconds,
    )


def as_json(status: PanelStatus, language: str = ENGLISH) -> dict[str, Any]:
    """`status` in values that every JSON reader takes (no NaN), with texts in `language` and without control characters.

    It is text all the same, not HTML: names come from files that strangers made.
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
        "name": figure.name,
        "free_mb": _number(figure.free_mb),
        "used_mb": _number(figure.used_mb),
        "total_mb": _number(figure.total_mb),
        "source": _text(figure.source, language),
    }


def _weights(lora: LoraStatus, mode: str, language: str) -> dict[str, str | None]:
    name = Message(f"mode.{mode}") if f"mode.{mode}" in TEXTS else mode
    text = Message("panel.weights", {"count": lora.modes[mode], "mode": name})
    return {"text": _text(text, language), "why": _text(Joined(lora.reasons.get(mode, ())), language)}


def _text(text: str | None, language: str) -> str | None:
    return None if text is None else shown(str(in_language(text, language)), _TEXT_CHARACTERS)


def _number(value: float, digits: int = 1) -> float | None:
    """None for what JSON cannot say: a strength read from a prompt may be `nan`."""
    return round(float(value), digits) if math.isfinite(value) else None
