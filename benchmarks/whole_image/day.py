"""A person's images one after the other: the cases of the benchmark, by name of the day."""

from typing import NamedTuple

FIRST_PROMPT = "a lighthouse on a cliff"
OTHER_PROMPT = "two horses on a beach at dawn, film"
RANKS = {"A": 16, "B": 32, "C": 32, "D": 32, "X": 112, "Y": 112, "Z": 112}
"""LoRAs that a day may use, with their ranks. Of a Flux, X, Y and Z have about 1 GB each."""


class Case(NamedTuple):
    """One image.

    Attributes:
        name: What the person does for it.
        stack: LoRAs with their strengths.
        prompt: The text without the LoRAs.
        same_as: An earlier case of the day that must give the same picture.
        changes: Whether LoRAs or strengths differ from the case before.
        steps: Steps of its own; None takes the run's. For what only prepares the next image.
    """

    name: str
    stack: tuple[tuple[str, float], ...] = ()
    prompt: str = FIRST_PROMPT
    same_as: str | None = None
    changes: bool = False
    steps: int | None = None


A, WEAK, B, WEAK_B = ("A", 0.8), ("A", 0.5), ("B", 0.7), ("B", 0.3)
BOTH = (("A", 0.8), ("B", 0.4))
THREE = (("B", 0.5), ("C", 0.5), ("D", 0.5))
WEAK_THREE = (("B", 0.2), ("C", 0.4), ("D", 0.6))
BIG = (("X", 0.4), ("Y", 0.4), ("Z", 0.4))

DAYS = {
    "ten": (
        Case("cold, no LoRA"),
        Case("no LoRA", same_as="cold, no LoRA"),
        Case("first LoRA", (A,), changes=True),
        Case("same again", (A,), same_as="first LoRA"),
        Case("strength", (WEAK,), changes=True),
        Case("two LoRAs", BOTH, changes=True),
        Case("two again", BOTH, same_as="two LoRAs"),
        Case("removed", same_as="no LoRA", changes=True),
        Case("another LoRA", (B,), changes=True),
        Case("new prompt", (B,), OTHER_PROMPT),
        Case("previous prompt", (B,), same_as="another LoRA"),
    ),
    "six": (
        Case("no LoRA"),
        Case("first LoRA", (A,), changes=True),
        Case("same again", (A,), same_as="first LoRA"),
        Case("strength", (WEAK,), changes=True),
        Case("two LoRAs", BOTH, changes=True),
        Case("removed", same_as="no LoRA", changes=True),
    ),
    "changes": (
        Case("another LoRA", (B,), changes=True),
        Case("strength", (WEAK_B,), changes=True),
        Case("two LoRAs", BOTH, changes=True),
        Case("removed", changes=True),
    ),
    "cold": (Case("cold, no LoRA"),),
    "bare": (
        Case("cold, no LoRA"),
        Case("no LoRA", same_as="cold, no LoRA"),
        Case("new prompt", prompt=OTHER_PROMPT),
        Case("previous prompt", same_as="no LoRA"),
    ),
    "long": (
        Case("no LoRA, 2 steps", steps=2),
        Case("no LoRA"),
        Case("first LoRA, 2 steps", (A,), steps=2, changes=True),
        Case("same again", (A,)),
    ),
    "three": (
        Case("cold, no LoRA"),
        Case("no LoRA", same_as="cold, no LoRA"),
        Case("three LoRAs", THREE, changes=True),
        Case("same again", THREE, same_as="three LoRAs"),
        Case("other strengths", WEAK_THREE, changes=True),
        Case("removed", same_as="no LoRA", changes=True),
    ),
    "big": (
        Case("cold, no LoRA"),
        Case("no LoRA", same_as="cold, no LoRA"),
        Case("three LoRAs of 1 GB", BIG, changes=True),
        Case("same again", BIG, same_as="three LoRAs of 1 GB"),
        Case("removed", same_as="no LoRA", changes=True),
    ),
}
"""`ten`: an ordinary day; an eleventh image tells what two LoRAs cost in any image. `six`: a shorter one, for a host that is warm. `long`: two images whose preparation was made by short ones. `three` and `big`: one stack.
`changes`: what differs from the image before, for a host that is warm. `cold`: the first image of a host, which loads all. `bare`: what a host does
without LoRAs, which the others are measured by. Where the time may end, the images that most depends on come first.
"""


class Part(NamedTuple):
    """A part of a plan: a day at a number of steps.

    Attributes:
        steps: Of its images.
        day: One of `DAYS`.
        ways: Names of the ways that play it; empty for all.
    """

    steps: int
    day: str
    ways: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text):
        """Reads "4" (an ordinary day), "50:long", or "4:three@guard" (for one way).

        Raises:
            ValueError: The steps are no number from 1, or there is no such day.
        """
        what, _, ways = text.partition("@")
        steps, _, day = what.partition(":")
        day = day or "ten"
        if not steps.isdigit() or int(steps) < 1 or day not in DAYS:
            raise ValueError(f"{text}: expected STEPS, STEPS:DAY or STEPS:DAY@WAY, with a day of {', '.join(DAYS)}")
        return cls(int(steps), day, tuple(ways.split(",")) if ways else ())

    def is_for(self, way):
        """Returns whether a way of this name plays the part."""
        return not self.ways or way in self.ways


def loras_of(plan):
    """Returns the letters of the LoRAs that the parts of a plan use, in order."""
    return sorted({letter for part in plan for case in DAYS[part.day] for letter, _ in case.stack})


def prompt_of(case, files):
    """Returns the prompt with its LoRA tags.

    Args:
        case: The image.
        files: The name of the LoRA file for each letter.
    """
    return " ".join([case.prompt, *(f"<lora:{files[letter]}:{strength:g}>" for letter, strength in case.stack)])
