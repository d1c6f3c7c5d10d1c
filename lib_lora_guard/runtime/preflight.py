"""Looks at RAM before something large is read or moved into it.

Over what stays fast, another way is taken. Over what the process survives, the work is refused in words, before the system
ends the process without any.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from ..errors import MemoryShortError
from ..memory import rules
from ..memory.readings import MemorySnapshot
from ..memory.rules import Finding
from ..messages import Message, say
from ..planning.limits import RAM_FLOOR_BYTES, room_to_read_bytes
from ..recorder.crash_report import Precaution
from .precautions import Precautions

log = logging.getLogger(__name__)


class Preflight:
    def __init__(
        self,
        snapshot: Callable[[], MemorySnapshot],
        drop_caches: Callable[[], int],
        tell: Callable[[Finding | None], None],
        precautions: Precautions,
    ) -> None:
        """
        Args:
            snapshot: reads the memory now.
            drop_caches: gives back what the guard keeps for speed, and returns the bytes.
            tell: logs what a sanity rule has found.
            precautions: of this run.
        """
        self._snapshot, self._drop_caches, self._tell, self._precautions = snapshot, drop_caches, tell, precautions

    @contextlib.contextmanager
    def careful(self, doing: str) -> Iterator[None]:
        """Wraps something large: after a crash the caches are given back first."""
        with self._precautions.against(Precaution.DROP_CACHES, doing) as cautious:
            if cautious:
                self._drop()
            yield

    @contextlib.contextmanager
    def leaving(self, model: torch.nn.Module, wanted_bytes: int) -> Iterator[int]:
        """Wraps a model's move from the card into RAM. Yields how many of `wanted_bytes` may go: after a crash in it, only what
        stays fast."""
        with self._precautions.against(Precaution.PARTIAL_UNLOAD, "leaving", model) as cautious:
            fast = self.fast_bytes() if cautious else None
            yield wanted_bytes if fast is None else min(wanted_bytes, fast)

    def check(self, needed_bytes: int, what: Message) -> None:
        """Drops caches if that makes the difference.

        Raises:
            MemoryShortError: nothing does.
        """
        self.choose([needed_bytes], what)

    def choose(self, needs: Sequence[int], what: Message) -> int:
        """Chooses between several ways of doing the same, and drops caches if that makes the difference.

        Args:
            needs: the RAM in bytes that each way takes.
            what: is being done, for the log.

        Returns:
            The place of the first way that stays fast, else of the smallest; 0 where the system does not say.

        Raises:
            MemoryShortError: the process would not survive any of them.
        """
        chosen = self._fast(needs)
        # Caches cost time to fill again; another way may cost more than time.
        if chosen != 0 and self._drop():
            chosen = self._fast(needs)
        if chosen is not None:
            return chosen
        chosen = min(range(len(needs)), key=needs.__getitem__)
        finding = self._judge(needs[chosen], what)
        if finding is not None and finding.says.key == "rule.ram_refused":
            raise MemoryShortError(Message("rule.line", {"rule": finding.rule, "says": finding.says}))
        self._tell(finding)
        return chosen

    def room_bytes(self) -> int | None:
        """Returns how much may be moved into RAM before the process is in danger; None where the system does not say."""
        return room_to_read_bytes(self._snapshot().alive_ram_bytes)

    def alive_bytes(self) -> int | None:
        """Returns the RAM that the process survives using; None where the system does not say."""
        return self._snapshot().alive_ram_bytes

    def fast_bytes(self) -> int | None:
        """Returns the RAM that can be filled without paging; None where the system does not say."""
        return self._snapshot().fast_ram_bytes(RAM_FLOOR_BYTES)

    def _drop(self) -> int:
        dropped = self._drop_caches()
        if dropped:
            say(log, logging.INFO, "preflight.dropped", size_mb=dropped / rules.MB)
        return dropped

    def _fast(self, needs: Sequence[int]) -> int | None:
        fast = self.fast_bytes()
        if fast is None:
            return 0
        return next((place for place, need in enumerate(needs) if need <= fast), None)

    def _judge(self, needed_bytes: int, what: Message) -> Finding | None:
        snapshot = self._snapshot()
        fast, alive = snapshot.fast_ram_bytes(RAM_FLOOR_BYTES), snapshot.alive_ram_bytes
        if fast is None or alive is None:
            return None
        return rules.ram_for(needed_bytes, fast, alive, what)
