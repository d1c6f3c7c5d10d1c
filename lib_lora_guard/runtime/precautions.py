"""What a run does otherwise after a crash, until what the last process died in has gone well once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ..messages import say
from ..recorder.crash_report import Precaution

log = logging.getLogger(__name__)


class Cautions:
    """A crash names what was being done, not what it will cost the next time: so the same is done carefully once, and
    when that went well the numbers of the moment decide again. Without this every later picture would pay for one crash."""

    def __init__(self, planned: Callable[[Any], Collection[Precaution]]) -> None:
        """`planned` gives the precautions for a model (None: for no model in particular)."""
        self._planned = planned
        self._over: set[tuple[Precaution, str]] = set()
        self._said: set[Precaution] = set()

    @contextlib.contextmanager
    def against(self, precaution: Precaution, doing: str, model: Any = None) -> Iterator[bool]:
        """True where `precaution` is to be taken while the block does `doing`. When the block ends without an error, it has
        been taken for `doing`; each precaution is said once."""
        if (precaution, doing) in self._over or precaution not in self._planned(model):
            yield False
            return
        if precaution not in self._said:
            self._said.add(precaution)
            say(log, logging.WARNING, "flight.line", line=precaution.message)
        yield True
        self._over.add((precaution, doing))
