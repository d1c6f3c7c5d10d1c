"""The strip above the panel: one sentence on what is going on, and the problems that the user should know of. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..messages import Joined, Message
from .timeline import STEP, Image, Now

GOOD, WARNING, BAD = "good", "warning", "bad"

_PHASES = {
    "load_checkpoint": "load",
    "load_text_encoder": "load",
    "move_to_gpu": "load",
    "apply_lora": "load",
    "merge": "load",
    "backup": "load",
    "restore": "load",
    "encode_prompt": "encode",
    "vae_encode": "encode",
    STEP: "steps",
    "vae_decode": "decode",
    "unload": "load",
}
KINDS = ("load", "encode", "steps", "decode", "other")
"""The kinds of phases that the curve tells apart."""


def kind_of(phase: str) -> str:
    """Returns the kind of a phase of the flight recorder; empty between two phases."""
    return _PHASES.get(phase, "other") if phase else ""


@dataclass(frozen=True)
class Headline:
    """The sentence with its colour: GOOD, WARNING or BAD."""

    level: str
    text: str


UNKNOWN = Headline(WARNING, "")


@dataclass(frozen=True)
class Problem:
    """Something to know. It stays until the user closes it; `id` is the same as long as it is the same problem."""

    id: str
    level: str
    text: str


@dataclass(frozen=True)
class Scene:
    """What the sentence is made from."""

    now: Now | None = None
    steps: tuple[int, int] | None = None
    """Steps done and steps of the present pass, as the host counts them."""
    model: str | None = None
    """The loaded checkpoint."""
    loras: int = 0
    last: Image | None = None


def headline(scene: Scene) -> Headline:
    """Returns the sentence on what is being done, or on what is loaded."""
    model = scene.model or Message("panel.headline.the_model")
    if scene.now is not None:
        return Headline(GOOD, _doing(scene, scene.now, model))
    if scene.model is None and scene.last is None:
        return Headline(GOOD, Message("panel.headline.ready"))
    facts = {"model": model, "count": scene.loras}
    if scene.last is not None and scene.last.ended is not None:
        seconds = scene.last.ended - scene.last.begun
        return Headline(GOOD, Message("panel.headline.loaded_and_last", {**facts, "seconds": seconds}))
    return Headline(GOOD, Message("panel.headline.loaded", facts))


def problems(left_out: Mapping[str, str], crash: Sequence[str] = (), crash_id: str = "") -> tuple[Problem, ...]:
    """Returns what the user should know, the worst first.

    Args:
        left_out: LoRAs that are not applied, each with the reason.
        crash: What the last run died of, in sentences.
        crash_id: Tells that crash from others.
    """
    found = [Problem(f"crash-{crash_id}", BAD, Joined(crash, "list.semicolon"))] if crash else []
    for name, why in left_out.items():
        text = Message("panel.headline.left_out", {"name": name, "why": why})
        found.append(Problem(f"left-{zlib.crc32(text.encode()):08x}", WARNING, text))
    return tuple(found)


def _doing(scene: Scene, now: Now, model: str) -> str:
    if now.phase != STEP:
        return Message(f"panel.headline.{kind_of(now.phase) or 'other'}", {"model": model})
    if scene.steps is None or not scene.steps[1]:
        return Message("panel.headline.sampling", {"model": model})
    done, of = scene.steps
    facts: dict[str, object] = {"model": model, "step": min(done + 1, of), "of": of}
    if now.call_seconds is None:
        return Message("panel.headline.step", facts)
    # Prompt and negative prompt in two calls, and samplers with two calls a step, take so many times a call.
    calls = max(1, round(now.calls / (done + 1)))
    return Message("panel.headline.step_timed", {**facts, "seconds": now.call_seconds * calls})
