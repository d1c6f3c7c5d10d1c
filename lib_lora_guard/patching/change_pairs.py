"""A change of a stack as its transaction sees it: pairs of attachments, of which either may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from .attachment import Attachment
from .neighbours import Place
from .plan import PlannedWeight
from .transaction import Pair, Step, Transaction

Leaving: TypeAlias = tuple[Attachment, None]
"""An attachment that goes, without another in its place."""
Coming: TypeAlias = tuple[Attachment | None, Attachment]
"""An attachment that comes, after the one that it replaces, if there is one."""


def difference(
    present: Mapping[str, Attachment], target: Mapping[str, Attachment]
) -> tuple[list[Leaving], list[Coming]]:
    """Returns the pairs that bring a model from the attachments `present` to those of `target`, by parameter name."""
    if target is present:
        return [], []
    leaving: list[Leaving] = [(old, None) for key, old in present.items() if key not in target]
    coming: list[Coming] = [(old, new) for key, new in target.items() if (old := present.get(key)) is not new]
    return leaving, coming


def going(leaving: Iterable[Leaving], coming: Iterable[Coming]) -> list[Attachment]:
    """Returns the attachments that a change takes off, in its order."""
    return [*(old for old, _ in leaving), *(old for old, _ in coming if old is not None)]


def strays(attachments: Iterable[Attachment]) -> list[tuple[None, Attachment]]:
    """Returns pairs whose undo takes off what may be on the model and is not of its stack."""
    return [(None, attachment) for attachment in attachments]


def replan(moved: Sequence[tuple[Attachment, PlannedWeight, PlannedWeight]]) -> Step:
    """Returns the step that gives attachments that stay another plan; `moved` has each with the old and the new one."""

    def do() -> None:
        for attachment, _, new in moved:
            attachment.planned = new

    def undo() -> None:
        for attachment, old, _ in moved:
            attachment.planned = old

    return Step(do, undo)


def pairs_of(change: Transaction[Attachment] | None) -> Sequence[Pair[Attachment]]:
    """Returns the pairs of a change; none where there is no change."""
    return () if change is None else change.pairs


def attachments_of(change: Transaction[Attachment] | None) -> list[Attachment]:
    """Returns all attachments of a change, old and new; none where there is no change."""
    return [one for pair in pairs_of(change) for one in pair if one is not None]


def place_of(attachment: Attachment) -> Place:
    """Returns the parameter that an attachment is on."""
    return id(attachment.site.layer), attachment.site.name
