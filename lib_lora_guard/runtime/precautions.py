"""Precautions after a crash: the operation that killed the last process runs in its careful form until it has succeeded once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator

import torch

from ..messages import say
from ..recorder.crash_report import Precaution

log = logging.getLogger(__name__)


class Precautions:
    """A crash names the operation, not what it will cost the next time. So the operation runs carefully once. When that went
    well, the numbers of the moment decide again: else every later picture would pay for one crash."""

    def __init__(self, planned: Callable[[torch.nn.Module | None], Collection[Precaution]]) -> None:
        """
        Args:
            planned: returns the precautions for a model; for None, those that concern no model in particular.
        """
        self.planned = planned
        self._over: set[tuple[Precaution, str]] = set()
        self._said: set[Precaution] = set()

    @contextlib.contextmanager
    def against(self, precaution: Precaution, doing: str, model: torch.nn.Module | None = None) -> Iterator[bool]:
        """Wraps an operation.

        Yields True if `precaution` is to be taken while the block does `doing`. It has been taken for `doing` once the block
        ends without an error. Each precaution is logged once.
        """
        if (precaution, doing) in self._over or precaution not in self.planned(model):
            yield False
            return
        if precaution not in self._said:
            self._said.add(precaution)
            say(log, logging.WARNING, "flight.line", line=precaution.message)
        yield True
        self._over.add((precaution, doing))
