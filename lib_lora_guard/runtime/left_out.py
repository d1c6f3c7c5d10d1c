"""What of a LoRA file is left out of the models of an image, as sentences."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..adapters.base import Shape
from ..adapters.files import LoraFile
from ..adapters.left_out import LeftOut
from ..files import shown
from ..messages import Joined, Message
from ..models.fit import Fit
from ..models.left_out import left_out
from ..reporting.report import clean_text


@dataclass(frozen=True)
class Remainder:
    """What of a file is applied to none of the models of an image.

    Attributes:
        keys: Names that no model has a place for.
        lost: Names with a place that cannot be applied, each with the reason.
        modules: How much of the file that is.
    """

    keys: Sequence[str]
    lost: Sequence[str]
    modules: LeftOut


def remainder_of(file: LoraFile, fits: Sequence[Fit], shapes: Mapping[str, Shape]) -> Remainder:
    """Returns what of a file is left out.

    Args:
        file: The LoRA.
        fits: Its fit to each model that it was held against, none of which refuses it.
        shapes: The parameters of all these models.
    """
    keys = sorted(set.intersection(*(set(fit.skipped) for fit in fits))) if fits else []
    lost = [line for fit in fits for line in fit.lost]
    left = {*keys, *(line.partition(": ")[0] for line in lost)}
    used = [module for module, parameter in file.adapters if f"{module}.{parameter}" not in left]
    return Remainder(keys, lost, left_out(file, used, shapes))


def nothing_applied(file: LoraFile, fits: Sequence[Fit], left: Remainder) -> Message | None:
    """Returns the reason if a file is left out as a whole: no model takes anything of it, or too little; None otherwise."""
    if not fits:
        return None
    if any(fit.terms for fit in fits):
        return left.modules.refusal
    first: str = Message("host.nothing")
    if left.keys or left.lost:
        first = shown(file.spelled(left.keys[0])) if left.keys else clean_text(left.lost[0])
    return Message("host.no_module_here", {"count": len(file.adapters), "first": first})


def applied_in_part(name: str, file: LoraFile, left: Remainder) -> tuple[Message, int] | None:
    """Returns what is to be said of a file of which a part is left out; None if all of it is applied.

    Args:
        name: The file's, as it is shown.
        file: The LoRA.
        left: What is left out of it.

    Returns:
        The sentence, and the level of its log line.
    """
    parts = []
    if left.keys:
        first = shown(file.spelled(left.keys[0]))
        parts.append(Message("host.keys_without_place", {"count": len(left.keys), "first": first}))
    if left.lost:
        parts.append(Message("host.keys_lost", {"count": len(left.lost), "first": clean_text(left.lost[0])}))
    if not parts:
        return None
    # What is lost of a module of which the rest is applied counts by its keys.
    share = left.modules.share or len(left.lost) / max(1, len(file.shapes))
    facts = {"name": name, "what": Joined(parts, "list.semicolon"), "percent": percent(share)}
    if left.modules.is_much:
        return Message("host.in_small_part", facts), logging.WARNING
    return Message("host.in_part", facts), logging.WARNING if left.lost else logging.INFO


def percent(share: float) -> str:
    """Returns "12 %"; never "0 %" for a part, nor "100 %" for less than all."""
    if share <= 0 or share >= 1:
        return f"{100 * share:.0f} %"
    return "less than 1 %" if share < 0.01 else f"{min(99, round(100 * share))} %"
