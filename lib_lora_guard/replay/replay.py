"""Compares field reports with Forge's arithmetic and with the guard. Pure.

Each configuration of `field_cases` is recomputed as far as its log and the known formulas allow; otherwise there is a
reason. The caller supplies the function for the guard's column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .field_cases import CASES, FieldCase, Outcome
from .lines import Implied, Seen, lines

_NOTHING = "no number of memory in the report"
_SECONDS = "the report has seconds only, and this is arithmetic of bytes"
_OTHER_HOST = "ComfyUI's own memory model, not Forge's"
_DEATH = "no number of memory in the report: a process that dies for RAM prints none"
_PEAK = "measured peaks; no line of the log is behind them"

_REASONS: dict[int, str] = {
    1: "the card and the RAM are known, the log's memory lines were not seen",
    6: "only how far the merge came, without the weight it failed at",
    7: _NOTHING,
    8: _SECONDS,
    9: _NOTHING,
    10: _SECONDS,
    13: _DEATH,
    14: _DEATH,
    15: _DEATH,
    16: _DEATH,
    17: _SECONDS,
    19: _SECONDS,
    20: _SECONDS,
    21: _SECONDS,
    23: _SECONDS,
    26: "VRAM and shared memory as the Task Manager shows them, no log",
    27: _DEATH,
    28: "the slider's setting alone",
    30: "the card and the RAM are known, the log's memory lines were not seen",
    31: _DEATH,
    32: _DEATH,
    33: _DEATH,
    35: "one failed allocation of 202 MB in a step, which no formula of the host gives",
    37: "one failed allocation of 268 MiB, the size of no weight of Flux in fp32, and the state of the allocator",
    40: "Neo of 2026 places models as ComfyUI does; no log",
    41: _SECONDS,
    42: _NOTHING,
    43: _NOTHING,
    44: _NOTHING,
    45: _PEAK,
    46: _NOTHING,
    48: _PEAK,
    50: _SECONDS,
    51: _NOTHING,
    52: _OTHER_HOST,
    53: _OTHER_HOST,
    54: _OTHER_HOST,
}


@dataclass(frozen=True)
class GuardOutcome:
    """The predicted outcome of a configuration with the guard."""

    outcome: Outcome
    why: str
    """One sentence."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """In MB, unless the name has another unit."""


Guard = Callable[[FieldCase], "GuardOutcome | None"]
"""Predicts the guard's outcome; None if it cannot."""


@dataclass(frozen=True)
class Replay:
    """One recomputed configuration."""

    case: FieldCase
    seen: tuple[Seen, ...]
    implied: tuple[Implied, ...]
    reason_if_none: str | None
    """The reason if nothing was recomputed."""
    guard: GuardOutcome | None = None

    @property
    def reproduced(self) -> int:
        """Number of log values that the formulas reproduce."""
        return sum(line.is_reproduced for line in self.seen)

    @property
    def is_reproduced(self) -> bool:
        """True if there are numbers and all of them are reproduced."""
        return bool(self.seen) and self.reproduced == len(self.seen)

    @property
    def is_changed(self) -> bool:
        """True if the outcome with the guard differs."""
        return self.guard is not None and self.guard.outcome is not self.case.outcome


def replay(case: FieldCase, guard: Guard | None = None) -> Replay:
    """Recomputes one configuration."""
    found = lines(case)
    seen = tuple(line for line in found if isinstance(line, Seen))
    implied = tuple(line for line in found if isinstance(line, Implied))
    reason = None if seen else _REASONS[case.number]
    return Replay(case, seen, implied, reason, guard(case) if guard is not None else None)


def replay_all(guard: Guard | None = None, cases: Sequence[FieldCase] = CASES) -> tuple[Replay, ...]:
    """Recomputes all configurations, in their order."""
    return tuple(replay(case, guard) for case in cases)
