"""Finds the factors of a stack that are still to be brought to the card before the first call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .attachment import Attachment
from .forward_steps import LowRankStep
from .hook_attachments import BypassAttachment
from .low_rank import JoinedLowRank


def waiting(attachments: Iterable[Attachment]) -> list[JoinedLowRank]:
    """Returns the low-rank terms of a stack whose copies on a device, or the strengths beside these, are still to be made."""
    return [joined for joined in _low_rank(attachments) if not joined.is_ready]


def _low_rank(attachments: Iterable[Attachment]) -> Iterator[JoinedLowRank]:
    for attachment in attachments:
        if isinstance(attachment, BypassAttachment):
            yield from (step.joined for step in attachment.hook.program.steps if isinstance(step, LowRankStep))
