"""Strengths that change over the steps of an image, as written in a prompt: `<lora:name:0@0,1@0.5,0@1>`. Pure.

Syntax and results are those of the extension sd-webui-loractl (github.com/cheald/sd-webui-loractl, README.md and
loractl/lib/utils.py), so that prompts written for it give the same strengths.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..adapters.base import LARGEST_NUMBER
from ..errors import LoraGuardError

HIRES_NAMES = ("hr", "hrte", "hrunet")
NAMES = ("te", "unet", *HIRES_NAMES)
"""The named arguments of a LoRA tag that are strengths."""


class ScheduleError(LoraGuardError, ValueError):
    """A strength is neither a number nor a schedule."""


@dataclass(frozen=True)
class Schedule:
    """Strengths by position, interpolated linearly between two points and constant outside them.

    `points`: (position, strength), sorted by position. If the last position is at most 1, positions are fractions of
    the pass; else they are steps.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, step: int, steps: int) -> float:
        """Returns the strength at a step.

        Args:
            step: As the WebUI reports it while it samples: the number of the last finished step (0 until the second one
                is finished). The last step is thus run at `steps - 2`.
            steps: Length of the pass.
        """
        positions = [position for position, _ in self.points]
        x = _progress(step, steps) if positions[-1] <= 1 else float(step)
        # Of two points at the same position the later one counts from there on: a jump.
        at = bisect_right(positions, x) - 1
        if at < 0:
            return self.points[0][1]
        position, strength = self.points[at]
        if at == len(self.points) - 1 or x == position:
            return strength
        next_position, next_strength = self.points[at + 1]
        return (next_strength - strength) / (next_position - position) * (x - position) + strength

    @property
    def start(self) -> float:
        """The strength of the first step. The text encoder uses it, since a prompt is encoded once."""
        return self.at(0, 1)

    def __str__(self) -> str:
        return ", ".join(f"{strength:g}@{position:g}" for position, strength in self.points)

    @property
    def is_constant(self) -> bool:
        """True if all points have the same strength."""
        return len({strength for _, strength in self.points}) == 1


@dataclass(frozen=True)
class Strengths:
    """The strengths of one tag: for text encoder and model, in the first pass and in the hires pass."""

    text: Schedule
    model: Schedule
    hires_text: Schedule
    hires_model: Schedule


def parse(text: str) -> Schedule:
    """Parses a strength or a schedule.

    Args:
        text: A number, or `strength@position` pairs separated by `,` or `;`, in any order. `~` is equivalent to `@`; a
            pair without a position lies at 1. If the first one is a plain number, it is the strength of every step.

    Raises:
        ScheduleError: `text` is neither, or it is several numbers without any position: 0,8 for 0.8, or block weights.
    """
    points = []
    pairs = re.split("[,;]", text)
    for pair in pairs:
        strength, *position = (_number(part, text) for part in re.split("[@~]", pair))
        if len(position) > 1:
            raise _malformed(text)
        points.append((position[0] if position else 1.0, strength))
    if len(pairs) > 1 and not re.search("[@~]", text):
        raise ScheduleError.of("schedules.list", text=text[:100], count=len(pairs))
    if not re.search("[@~]", pairs[0]):
        return Schedule(((0.0, points[0][1]),))
    return Schedule(tuple(sorted(points, key=lambda point: point[0])))


def read_strengths(positional: Sequence[str], named: Mapping[str, str]) -> Strengths:
    """Reads the arguments of a tag after its name.

    Without `unet` the model takes the text encoder's strength; without `hr...` the hires pass takes the first pass's.

    Args:
        positional: `te`, `unet`.
        named: `te`, `unet`, `hr`, `hrte`, `hrunet` by name.

    Raises:
        ScheduleError: A strength is neither a number nor a schedule.
    """
    by_name = {name: parse(named[name]) for name in NAMES if named.get(name)}
    by_place = dict(zip(("te", "unet"), map(parse, positional), strict=False))
    text = by_name.get("te", by_place.get("te", Schedule(((0.0, 1.0),))))
    model = by_name.get("unet", by_place.get("unet", text))
    return Strengths(
        text,
        model,
        by_name.get("hrte", by_name.get("hr", text)),
        by_name.get("hrunet", by_name.get("hr", model)),
    )


def check_rank(positional: Sequence[object], named: Mapping[str, str]) -> None:
    """Checks that the rank of a DyLoRA is a whole number: hosts read nothing else there, and stop at the whole prompt.

    Args:
        positional: The words of the tag after its name; the third may be the rank.
        named: `dyn` by name, which counts before the third word.

    Raises:
        ScheduleError: It is something else.
    """
    places = [("schedules.fourth_word", word) for word in positional[2:3]]
    places += [("schedules.rank", named[name]) for name in ("dyn",) if name in named]
    for key, word in places:
        try:
            int(word)  # type: ignore[call-overload]  # whatever another extension has put there
        except (TypeError, ValueError):
            raise ScheduleError.of(key, text=str(word)[:100]) from None


def _progress(step: int, steps: int) -> float:
    if steps > 2:
        return step / (steps - 2)
    # Both steps of a pass of two are reported as step 0. A pass of unknown length counts as finished.
    return 0.0 if steps > 0 and step == 0 else 1.0


def _number(part: str, text: str) -> float:
    try:
        number = float(part)
    except ValueError:
        raise _malformed(text) from None
    if not abs(number) < LARGEST_NUMBER:
        raise _malformed(text)
    return number


def _malformed(text: str) -> ScheduleError:
    return ScheduleError.of("schedules.malformed", text=text[:100])
