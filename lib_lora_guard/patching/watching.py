"""The phases of a change that a process can die of, announced to a watch such as the flight recorder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping

from ..planning.mode import Mode
from ..recorder.flight_recorder import Phase
from .attachment import Attachment
from .backup import lies_in_ram, parameter_bytes
from .merge_attachment import MergeAttachment
from .plan import PlannedWeight

Watch = Callable[[Phase, int], contextlib.AbstractContextManager[object]]
"""Takes the phase and the bytes of RAM that it may need. Entered once for all layers of a phase, if there are any."""


def unwatched(phase: Phase, ram_bytes: int) -> contextlib.AbstractContextManager[object]:
    """A watch that does nothing."""
    return contextlib.nullcontext()


def merges_in(attachments: Iterable[Attachment]) -> list[MergeAttachment]:
    """Returns the merges among `attachments`."""
    return [one for one in attachments if isinstance(one, MergeAttachment)]


def ram_for_merges(merges: Iterable[MergeAttachment]) -> int:
    """Returns the bytes of RAM for the merged values of weights in RAM, beside their originals.

    On a device a merged value takes the original's place.
    """
    return sum(parameter_bytes(one.site.parameter) for one in merges if lies_in_ram(one.site.parameter))


def ram_for_backups(
    planned: Iterable[PlannedWeight], attached: Mapping[str, Attachment], backed_up: Collection[str]
) -> int:
    """Returns the most bytes of RAM that backups of weights on a device can take. They may go to VRAM or disk instead.

    Args:
        planned: The weights of the next stack. Those that are merged for the first time need a backup.
        attached: The attachments of the present stack, by name.
        backed_up: Weights that have their backup already, by name: the host's copy in RAM, or their file.
    """
    return sum(
        parameter_bytes(one.site.parameter)
        for one in planned
        if one.mode is Mode.MERGE
        and one.site.key not in backed_up
        and not isinstance(attached.get(one.site.key), MergeAttachment)
        and not lies_in_ram(one.site.parameter)
    )
