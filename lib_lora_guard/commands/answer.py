"""The answer of `plan` in one sentence: fits, does not fit and which file would, or open."""

from __future__ import annotations

from collections.abc import Sequence

from ..files import shown
from ..messages import Joined, Message, about
from ..planning import activations
from ..planning.formats import smaller_picture
from ..planning.instead import file_name
from ..planning.limits import RAM_FLOOR_BYTES
from ..planning.predict import Prediction
from ..planning.tokens import Picture, tokens_for
from ..units import GB
from .plan import PlanResult

_DECIMAL_GB = 1e9
"""Sites that hold files count in these."""


def fits(result: PlanResult) -> bool | None:
    """Returns whether the guard's way fits; None while the size of a part that an image needs is not known."""
    guard = _guard(result)
    if guard is None or not guard.fits:
        return False
    return None if result.model.not_counted else True


def answer(result: PlanResult) -> Message | Joined:
    """Returns the answer, and the LoRAs that have no part in it."""
    refused = [lora.facts.name for lora in result.stack.loras if lora.fit.refused]
    if not refused or _guard(result) is None:
        return _answer(result)
    without = Message("plan.without", {"names": Joined(refused, "list.names")})
    return Joined([without, _answer(result)], "list.semicolon")


def _answer(result: PlanResult) -> Message | Joined:
    guard = _guard(result)
    if guard is None:
        why = Joined((about(lora.facts.name, lora.fit.refused or "") for lora in result.stack.loras), "list.semicolon")
        return Message("plan.unusable", {"why": why})
    parts = Joined(result.model.not_counted, "list.and")
    if not guard.fits:
        why = Joined([*_missing(result, guard), *_would(result, guard)], "list.semicolon")
        if parts:
            return Message("plan.misfit_open", {"parts": parts, "why": why})
        return Message("plan.misfit", {"why": why})
    facts = {
        "ram": (guard.ram_peak_bytes + RAM_FLOOR_BYTES) / GB,
        "system": RAM_FLOOR_BYTES / GB,
    }
    if parts:
        return Message("plan.open", {"vram": guard.vram_peak_bytes / GB, **facts, "parts": parts})
    facts["ram_there"] = result.request.ram_bytes / GB
    if guard.swapped_bytes:
        slow = Message("plan.fits_slowly", {"gb": guard.swapped_bytes / GB, **facts})
        return Joined([slow, *(_would(result, guard) if result.instead else ())], "list.semicolon")
    vram = {"vram": guard.vram_peak_bytes / GB, "vram_there": result.request.vram_bytes / GB}
    return Message("plan.fits", {**vram, **facts})


def counted_beside(result: PlanResult) -> Message | None:
    """Returns a sentence on the text encoders and the VAE outside the model file; None if there are none."""
    if not result.beside:
        return None
    parts = []
    for part in result.beside:
        facts = {"name": part.name, "gb": part.bytes / GB}
        parts.append(Message("plan.part_assumed" if part.is_assumed else "plan.part_given", facts))
    key = "plan.beside_assumed" if any(part.is_assumed for part in result.beside) else "plan.beside"
    return Message(key, {"parts": Joined(parts, "list.names")})


def _guard(result: PlanResult) -> Prediction | None:
    return result.predictions[0] if result.predictions else None


def _missing(result: PlanResult, guard: Prediction) -> Sequence[str]:
    if guard.problem:
        return [guard.problem]
    found = []
    if guard.ram_short_bytes:
        facts = {"needed": guard.ram_peak_bytes / GB, "there": result.request.ram_bytes / GB}
        found.append(Message("plan.needs_ram", {**facts, "system": RAM_FLOOR_BYTES / GB}))
    if guard.excess_bytes:
        facts = {"needed": guard.vram_peak_bytes / GB, "there": result.request.vram_bytes / GB}
        found.append(Message("plan.needs_vram", facts))
    return found


def _would(result: PlanResult, guard: Prediction) -> Sequence[str]:
    """Returns what would fit, or what would stay on the card where the model fits."""
    if guard.problem:
        return []
    other = result.instead
    if other is None:
        picture = None if guard.ram_short_bytes else _picture(result, guard.excess_bytes)
        if picture is not None:
            return [Message("plan.instead_picture", {"width": picture.width, "height": picture.height})]
        return [Message("plan.instead_none")]
    text = other.text.name if other.text else ""
    if other.format is None:
        return [Message("plan.instead_text", {"text": text})]
    stem = shown(result.checkpoint.header.path.stem)
    facts = {"name": file_name(stem, other.format), "gb": other.file_bytes / _DECIMAL_GB}
    if guard.fits:
        return [Message("plan.instead_on_card", facts)]
    if text:
        return [Message("plan.instead_both", {**facts, "text": text})]
    return [Message("plan.instead_file", facts)]


def _picture(result: PlanResult, missing_bytes: int) -> Picture | None:
    picture, architecture = result.request.picture, result.tokens.architecture
    shapes, value_bytes = result.checkpoint.shapes, result.request.rates.compute_bytes

    def step_bytes(width: int, height: int) -> int:
        other = Picture(width, height, picture.batch)
        return activations.step(tokens_for(architecture, other), other, shapes, value_bytes).used_bytes

    found = smaller_picture(picture.width, picture.height, step_bytes, missing_bytes)
    return None if found is None else Picture(found.width, found.height, picture.batch)
