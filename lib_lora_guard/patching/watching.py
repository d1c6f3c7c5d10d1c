"""What an engine does that a process can die of, for whoever keeps a record of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..planning.mode import Choice, Mode
from ..recorder.flight_recorder import Phase
from .access import Site
from .attachments import Attachment, MergeAttachment
from .backup import lies_in_ram, parameter_bytes

Watch = Callable[[Phase, int], contextlib.AbstractContextManager[object]]
"""Given the phase and the bytes of RAM it may take; entered once for all layers of a phase, and only where there are any."""


def unwatched(phase: Phase, ram_bytes: int) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


def merges_in(attachments: Iterable[Attachment]) -> list[MergeAttachment]:
    return [one for one in attachments if isinstance(one, MergeAttachment)]


def ram_for_merges(merges: Iterable[MergeAttachment]) -> int:
    """Of weights that lie in RAM: the merged value comes beside the original. On a device it takes the original's place."""
    return sum(parameter_bytes(one.site.parameter) for one in merges if lies_in_ram(one.site.parameter))


def ram_for_backups(
    planned: Iterable[tuple[Site, Any, Choice]], attached: Mapping[str, Attachment], offloaded: Mapping[str, Any]
) -> int:
    """Of weights about to be merged for the first time that lie on a device, and that no copy in RAM is left of: the most
    that their backups take, which may find room on the device or on the disk instead."""
    return sum(
        parameter_bytes(site.parameter)
        for site, _, choice in planned
        if choice.mode is Mode.MERGE
        and site.key not in offloaded
        and not isinstance(attached.get(site.key), MergeAttachment)
        and not lies_in_ram(site.parameter)
    )
