"""The panel's data beside the log: loaded models, free memory, active settings.

Texts are `str`; a Message is translated for each reader.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..files import shown
from ..messages import Joined, Message, in_language
from ..messages.catalogue import ENGLISH, TEXTS
from ..units import MB
from .headline import UNKNOWN, Headline, Problem
from .lora_rows import LoraRow, OnModel, model_name, way_name
from .report import ApplyReport

_NAME_CHARACTERS = 200
_TEXT_CHARACTERS = 600
_PROBLEM_CHARACTERS = 1600
"""What a process died of takes several sentences."""
_WORD_CHARACTERS = 40
_MOST = 4
"""Most ranks and kinds shown of one file."""


@dataclass(frozen=True)
class ModelStatus:
    """One model with LoRAs, after the last change."""

    name: str
    """Of its class."""
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
    headline: Headline = UNKNOWN
    problems: tuple[Problem, ...] = ()
    models: tuple[ModelStatus, ...] = ()
    loras: tuple[LoraRow, ...] = ()
    memory: tuple[MemoryFigure, ...] = ()
    step: StepNeed | None = None
    programs: OtherPrograms | None = None
    """Set only if the other programs hold enough VRAM to matter."""
    allocator: tuple[str, ...] = ()


def model_status(report: ApplyReport) -> ModelStatus:
    """Converts the report of a change of LoRAs to the panel's numbers."""
    return ModelStatus(
        name=str(report.model),
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
        "headline": {"level": status.headline.level, "text": _text(status.headline.text, language)},
        "problems": [
            {"id": problem.id, "level": problem.level, "text": _text(problem.text, language, _PROBLEM_CHARACTERS)}
            for problem in status.problems
        ],
        "models": [_model(model, language) for model in status.models],
        "loras": [_row(row, language) for row in status.loras],
        "memory": [_figure(figure, language) for figure in status.memory],
        "step": None if status.step is None else _step(status.step, language),
        "programs": None if status.programs is None else _programs(status.programs, language),
        "allocator": [_text(line, language) for line in status.allocator],
    }


def _model(model: ModelStatus, language: str) -> dict[str, Any]:
    return {
        "name": _text(model_name(model.name), language),
        "class": shown(model.name, _NAME_CHARACTERS),
        "device": shown(model.device, _NAME_CHARACTERS),
        "device_mb": _number(model.device_mb),
        "ram_mb": _number(model.ram_mb),
        "milliseconds": _number(model.milliseconds),
    }


def _row(row: LoraRow, language: str) -> dict[str, Any]:
    sheet = row.sheet
    return {
        "name": shown(row.name, _NAME_CHARACTERS),
        "base": None if sheet is None or sheet.base is None else shown(sheet.base, _WORD_CHARACTERS),
        "ranks": [] if sheet is None else list(sheet.ranks[:_MOST]),
        "kinds": [] if sheet is None else [shown(kind, _WORD_CHARACTERS) for kind in sheet.kinds[:_MOST]],
        "file_mb": None if sheet is None else _number(sheet.mb),
        "strengths": [_number(strength, 4) for strength in row.strengths],
        "share": None if row.share is None else _number(row.share, 4),
        "cost_mb": _number(row.cost_mb),
        "cost_ms": None if row.cost_ms is None else _number(row.cost_ms),
        "refused": _text(row.refused, language),
        "models": [_on_model(one, language) for one in row.models],
    }


def _on_model(one: OnModel, language: str) -> dict[str, Any]:
    return {
        "name": _text(model_name(one.model), language),
        "strength": _number(one.strength, 4),
        "used": one.used,
        "skipped": one.skipped,
        "lost": one.lost,
        "modes": [_weights(one, mode, language) for mode in sorted(one.modes) if one.modes[mode]],
        "refused": _text(one.refused, language),
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
        "model": _text(model_name(step.model), language),
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
        "about": _about(amount.name, language),
        "mb": _mb(amount.mb),
        "source": _text(amount.source, language),
        "missing": _text(amount.missing, language),
    }


def _about(name: str, language: str) -> str | None:
    """Returns the explanation of a name of the catalogue; None if there is none."""
    key = f"panel.about.{name.key.removeprefix('panel.')}" if isinstance(name, Message) else ""
    return _text(Message(key), language) if key in TEXTS else None


def _mb(value: float | None) -> float | None:
    return None if value is None else _number(value)


def _weights(lora: OnModel, mode: str, language: str) -> dict[str, Any]:
    name = way_name(mode, lora.modes[mode], lora.fused.get(mode, 0)) if f"panel.way.{mode}" in TEXTS else mode
    return {
        "way": mode if f"panel.way.{mode}" in TEXTS else "",
        "text": _text(Message("panel.weights", {"count": lora.modes[mode], "mode": name}), language),
        "why": _text(Joined(lora.reasons.get(mode, ()), "list.names"), language),
    }


def _text(text: str | None, language: str, characters: int = _TEXT_CHARACTERS) -> str | None:
    return None if text is None else shown(str(in_language(text, language)), characters)


def _number(value: float, digits: int = 1) -> float | None:
    """Returns None for numbers that JSON lacks: a strength read from a prompt may be `nan`."""
    return round(float(value), digits) if math.isfinite(value) else None
