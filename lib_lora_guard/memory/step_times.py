"""Distinguishes a driver that pages VRAM to system memory from an ordinary slow step. Pure: numbers in, a verdict out.

Under Windows, NVIDIA's driver moves what does not fit into VRAM to system memory ("shared GPU memory"). There is no
error, but steps take 5 to 30 times as long. Since driver 546.01 a setting controls it.
"""

from __future__ import annotations

import math
import platform
import statistics
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from ..messages import Message
from ..units import MB

SLOW, VERY_SLOW = 3.0, 10.0
"""Multiples of the median. Two slow steps in a row count, or one very slow step; a single slow step does not."""

LEAST_STEPS = 4
LEAST_EXCESS_SECONDS = 0.5
"""A smaller delay does not matter to users; a preview or another window explains it."""

LEAST_GROWTH_BYTES = 256 * MB
"""Shared GPU memory also contains this process's pinned memory, which changes in smaller parts."""

_SLIDER_STEP_MB = 128
"""Advice for the slider "GPU Weights" is rounded up to multiples of this."""

_REMEMBERED_STEPS, _REMEMBERED_CONFIGURATIONS = 64, 64


class Verdict(str, Enum):
    """The cause of slow steps."""

    SPILLED = "spilled"
    """Shared GPU memory grew: the driver moved memory of the GPU into system memory."""
    LIKELY = "likely"
    """The driver can page on this system, but shared GPU memory could not be read."""
    OTHER = "other"
    """Not paging: shared GPU memory did not grow, or the driver of this system never pages."""


@dataclass(frozen=True)
class Slowdown:
    """A step that took `seconds`, compared with normal steps of its configuration."""

    verdict: Verdict
    seconds: float
    median_seconds: float | None
    """The median of the normal steps; None if there are none yet."""
    steps: int
    """The number of normal steps."""
    shared_before_bytes: int | None = None
    shared_bytes: int | None = None

    @property
    def factor(self) -> float | None:
        """`seconds` as a multiple of the median."""
        return None if self.median_seconds is None else self.seconds / self.median_seconds

    @property
    def over_mb(self) -> int:
        """Megabytes in use beyond VRAM, rounded for the slider 'GPU Weights'; 0 if unknown."""
        if self.verdict is not Verdict.SPILLED or self.shared_before_bytes is None or self.shared_bytes is None:
            return 0
        return math.ceil((self.shared_bytes - self.shared_before_bytes) / MB / _SLIDER_STEP_MB) * _SLIDER_STEP_MB

    def messages(self, lower_mb: int = 0, nvidia: bool = True) -> list[Message]:
        """Returns sentences for the user: the observation, its meaning, the cure.

        Args:
            lower_mb: How far 'GPU Weights' should go down; 0 if unknown.
            nvidia: The card's driver has the setting.
        """
        if self.median_seconds is None or self.factor is None:
            sentences = [Message("spill.at_once", {"seconds": self.seconds}), self._meaning()]
        else:
            facts = {"seconds": self.seconds, "factor": self.factor, "median": self.median_seconds, "steps": self.steps}
            sentences = [Message("spill.slow", facts), self._meaning()]
        if self.verdict is Verdict.OTHER:
            return sentences
        if nvidia:
            sentences.append(Message("spill.setting"))
        if lower_mb > 0:
            sentences.append(Message("spill.lower", {"lower_mb": lower_mb}))
        return sentences

    def _meaning(self) -> Message:
        if self.shared_before_bytes is None or self.shared_bytes is None:
            return Message("spill.likely" if self.verdict is Verdict.LIKELY else "spill.other")
        shared = {"before_mb": self.shared_before_bytes / MB, "now_mb": self.shared_bytes / MB}
        return Message("spill.spilled" if self.verdict is Verdict.SPILLED else "spill.not_grown", shared)


@dataclass
class _History:
    """The normal steps of one configuration, and whether the last step was slow and was reported."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_STEPS))
    shared_bytes: deque[int] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_STEPS))
    slow: bool = False
    reported: bool = False


class StepTimes:
    """Durations of steps by configuration (whatever decides them: model, storage, resolution, batch, stack). Not
    thread-safe.
    """

    def __init__(self, driver_spills: bool) -> None:
        """`driver_spills`: see the function `driver_spills`."""
        self._driver_spills = driver_spills
        self._histories: OrderedDict[Hashable, _History] = OrderedDict()

    def add(
        self,
        configuration: Hashable,
        seconds: float,
        *,
        first: bool = False,
        shared_bytes: int | None = None,
        shared_at_first_bytes: int | None = None,
    ) -> Slowdown | None:
        """Records one step. Returns a Slowdown once steps have become slow, then none until a normal step.

        Args:
            configuration: The steps to compare with.
            seconds: The duration, measured until the GPU was done.
            first: The first step of an image prepares what the others use and is ignored.
            shared_bytes: `shared_usage_bytes()` after the step.
            shared_at_first_bytes: The same before the image's first step, with the model loaded.
        """
        if first or not (0 < seconds < math.inf):
            return None
        history = self._history_of(configuration)
        if seconds >= LEAST_EXCESS_SECONDS and len(history.seconds) < LEAST_STEPS:
            grown = self._verdict(shared_at_first_bytes, shared_bytes)
            if grown is Verdict.SPILLED:
                # There is no normal duration yet, and these steps must not become it.
                was_slow, history.slow = history.slow, True
                return None if was_slow else Slowdown(grown, seconds, None, 0, shared_at_first_bytes, shared_bytes)
        # A step shorter than the excess alone is never slow.
        is_judged = seconds >= LEAST_EXCESS_SECONDS and len(history.seconds) >= LEAST_STEPS
        median = statistics.median(history.seconds) if is_judged else math.inf
        if seconds < max(SLOW * median, median + LEAST_EXCESS_SECONDS):
            history.seconds.append(seconds)
            if shared_bytes is not None:
                history.shared_bytes.append(shared_bytes)
            history.slow = history.reported = False
            return None
        certain, history.slow = history.slow or seconds > VERY_SLOW * median, True
        if history.reported or not certain:
            return None
        history.reported = True
        before = min(history.shared_bytes, default=None)
        verdict = self._verdict(before, shared_bytes)
        return Slowdown(verdict, seconds, median, len(history.seconds), before, shared_bytes)

    def _history_of(self, configuration: Hashable) -> _History:
        history = self._histories.setdefault(configuration, _History())
        self._histories.move_to_end(configuration)
        while len(self._histories) > _REMEMBERED_CONFIGURATIONS:
            self._histories.popitem(last=False)
        return history

    def _verdict(self, before: int | None, now: int | None) -> Verdict:
        if before is not None and now is not None:
            return Verdict.SPILLED if now - before >= LEAST_GROWTH_BYTES else Verdict.OTHER
        return Verdict.LIKELY if self._driver_spills else Verdict.OTHER


def driver_spills() -> bool:
    """True if drivers of this system page GPU memory by themselves: Windows, and Linux inside it (WSL)."""
    return platform.system() == "Windows" or "microsoft" in platform.release().lower()
