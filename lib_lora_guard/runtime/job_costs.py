"""Chooses for a host what lies on the card while its denoiser runs, and says the choice with its numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ..messages import say
from ..planning.job_cost import NEW_PROMPTS, USUAL_IMAGES, Choice, Job, Links, State, choose, runs_from_ram, ways
from ..units import GB, MB
from .jobs import Jobs

log = logging.getLogger(__name__)

WEIGHT_OF_LAST = 0.2
"""Of one image in a share of images."""


class JobCosts:
    """Holds what `planning.job_cost` has to know of the machine and of the work."""

    def __init__(self, jobs: Jobs, links: Callable[[torch.device], Links], is_on: Callable[[], bool]) -> None:
        """
        Args:
            jobs: says which pass begins.
            links: returns a card's rates.
            is_on: False if the user has switched the choice off; then the model takes all room before its calls.
        """
        self._jobs, self._links, self._is_on = jobs, links, is_on
        self._decode_bytes = 0
        self._new_prompts, self._has_new_prompt = NEW_PROMPTS, False
        self._unloads, self._has_unloaded = 0.0, False
        self._said: set[str] = set()

    def note_decode(self, size_bytes: int) -> None:
        """Called with the VRAM that a decode takes, its weights included: the next image takes about the same."""
        self._decode_bytes = size_bytes

    def note_prompt(self) -> None:
        """Called when a text encoder is loaded: the image that begins has a new prompt."""
        self._has_new_prompt = True

    def note_unloaded(self) -> None:
        """Called when the host unloads all models: for a detailer's own checkpoint it does in each image."""
        self._has_unloaded = True

    def runs_from_ram(self, passes: int, device: torch.device) -> bool:
        """True if a model that would have to leave the card again had better not come."""
        return self._is_on() and runs_from_ram(passes, self._links(device))

    def choose(self, model: str, device: torch.device, state: State) -> Choice | None:
        """Returns the fastest way; None where nothing is to be chosen, or where the user has switched it off."""
        if state.outside_bytes <= 0 or not self._is_on():
            return None
        self._new_prompts += (self._has_new_prompt - self._new_prompts) * WEIGHT_OF_LAST
        self._unloads += (self._has_unloaded - self._unloads) * WEIGHT_OF_LAST
        self._has_new_prompt = self._has_unloaded = False
        begins, links = self._jobs.next_pass(), self._links(device)
        images = min(USUAL_IMAGES, 1 / self._unloads) if self._unloads else USUAL_IMAGES
        job = Job(begins.calls, self._decode_bytes, self._new_prompts, images, begins.is_last)
        choice = choose(state, job, links)
        self._say(model, state, job, links, choice)
        return choice

    def _say(self, model: str, state: State, job: Job, links: Links, choice: Choice) -> None:
        """Logs a choice, each about the same once: an image of two passes makes two in turn."""
        if not choice.swapped_bytes and not any(choice.leaving_bytes):
            return
        slowest = max(way.seconds for way in ways(state, job, links))
        line = f"{model} {job.calls} {choice.swapped_bytes >> 26} {choice.grows}"
        level = logging.DEBUG if line in self._said else logging.INFO
        self._said.add(line)
        say(
            log,
            level,
            "memory.chosen",
            model=model,
            calls=job.calls,
            comes_mb=max(0, choice.comes_bytes) / MB,
            left_mb=sum(choice.leaving_bytes) / MB,
            swapped_mb=choice.swapped_bytes / MB,
            seconds=choice.seconds,
            other_seconds=slowest,
            to_card=links.to_card / GB,
            to_ram=links.to_ram / GB,
        )
