"""What of a LoRA file is left out of the models of an image, as sentences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ..adapters.files import LoraFile
from ..files import shown
from ..messages import Joined, Message
from ..models.fit import Fit
from ..reporting.report import clean_text

MUCH = 0.1
"""Above this share of a file what is left out is seen in the picture."""


@dataclass(frozen=True)
class LeftOut:
    """The part of a file that none of the models takes, or that cannot be applied to them.

    Attributes:
        keys: Names that no model has a place for.
        lost: Names with a place that cannot be applied, each with the reason.
        share: Of the file, 0 to 1.
    """

    keys: Sequence[str]
    lost: Sequence[str]
    share: float


def left_out_of(file: LoraFile, fits: Sequence[Fit]) -> LeftOut:
    """Returns what of a file is left out.

    Args:
        file: The LoRA.
        fits: Its fit to each model that it was held against, none of which refuses it.
    """
    keys = sorted(set.intersection(*(set(fit.skipped) for fit in fits))) if fits else []
    lost = [line for fit in fits for line in fit.lost]
    names = {*keys, *(line.partition(": ")[0] for line in lost)}
    return LeftOut(keys, lost, min(1.0, len(names) / max(1, len(file.adapters) + len(file.unknown_keys))))


def nothing_applied(file: LoraFile, fits: Sequence[Fit]) -> Message | None:
    """Returns the reason if no model takes anything of a file; None otherwise."""
    if not fits or any(fit.terms for fit in fits):
        return None
    left = left_out_of(file, fits)
    first = shown(left.keys[0]) if left.keys else clean_text(left.lost[0]) if left.lost else Message("host.nothing")
    return Message("host.no_module_here", {"count": len(file.adapters), "first": first})


def applied_in_part(name: str, file: LoraFile, fits: Sequence[Fit]) -> tuple[Message, int] | None:
    """Returns what is to be said of a file of which a part is left out; None if all of it is applied.

    Args:
        name: The file's, as it is shown.
        file: The LoRA.
        fits: Its fit to each model that it was held against, none of which refuses it.

    Returns:
        The sentence, and the level of its log line.
    """
    left, parts = left_out_of(file, fits), []
    if left.keys:
        parts.append(Message("host.keys_without_place", {"count": len(left.keys), "first": shown(left.keys[0])}))
    if left.lost:
        parts.append(Message("host.keys_lost", {"count": len(left.lost), "first": clean_text(left.lost[0])}))
    if not parts:
        return None
    facts = {"name": name, "what": Joined(parts, "list.semicolon"), "percent": percent(left.share)}
    if left.share > MUCH:
        return Message("host.in_small_part", facts), logging.WARNING
    return Message("host.in_part", facts), logging.WARNING if left.lost else logging.INFO


def percent(share: float) -> str:
    """Returns "12 %"; never "0 %" for a part, nor "100 %" for less than all."""
    if share <= 0 or share >= 1:
        return f"{100 * share:.0f} %"
    return "less than 1 %" if share < 0.01 else f"{min(99, round(100 * share))} %"
