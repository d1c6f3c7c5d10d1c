"""Stands around the making of a request's images: keeps their mode, shows under them what they lack of their LoRAs, and says
what would help after one that ended for lack of memory.

Sources: `modules/processing.py` (`process_images_inner`, called once for each request).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Concatenate

from ...errors import LayerError
from ...memory.out_of_memory import is_out_of_memory
from ...messages import Joined, say
from ...patching.fused_choice import CHOICE
from ...runtime.advice import Advice
from ...runtime.hooks import P, R, Row
from ...runtime.image_words import ImageWords
from ...runtime.jobs import Jobs, Pass
from ...runtime.live_settings import LiveSettings
from .types import Processing, Refined, TwoPasses, comments_of, own_options

log = logging.getLogger(__name__)

PASSES = 2
"""Forge asks for the prompt and the negative prompt of each image in one call."""


class Images:
    def __init__(
        self,
        advice: Advice,
        words: ImageWords | None = None,
        settings: LiveSettings | None = None,
        jobs: Jobs | None = None,
        recorded: Callable[[], AbstractContextManager[None]] = nullcontext,
        after_image: Callable[[Processing], None] = lambda request: None,
    ) -> None:
        """
        Args:
            advice: For images that end for lack of memory.
            words: What is said of an image's LoRAs while it is made.
            settings: The user's.
            jobs: Are told what a request's passes are.
            recorded: Wraps each request, for the panel.
            after_image: Is told each request whose images have been made.
        """
        self._advice, self._words, self._settings = advice, words or ImageWords(), settings or LiveSettings()
        self._jobs, self._recorded, self._after_image = jobs or Jobs(), recorded, after_image

    def process_images_inner(
        self, original: Callable[Concatenate[Processing, P], R], p: Processing, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Stands in place of `process_images_inner`. The error goes on as it is."""
        try:
            with (
                self._settings.image(own_options(p)),
                self._words.image(id(p), *comments_of(p)),
                self._jobs.job(functools.partial(pass_of, p)),
                CHOICE.image(),
                self._recorded(),
            ):
                result = original(p, *args, **kwargs)
                self._after_image(p)
                return result
        except Exception as error:
            if isinstance(error, LayerError) or is_out_of_memory(error):
                self._say_what_helps(p)
            raise

    def _say_what_helps(self, p: Processing) -> None:
        try:
            patcher = p.sd_model.forge_objects.unet
            is_second = getattr(p, "is_hr_pass", False)
            size = (p.hr_upscale_to_x, p.hr_upscale_to_y) if is_second else (p.width, p.height)
            rows = PASSES * int(getattr(p, "batch_size", 1))

            def needs(width: int, height: int) -> int:
                return int(patcher.memory_required([rows, 4, height // 8, width // 8]))

            said = self._advice.for_image(patcher.model, patcher.load_device, needs, size)
        except Exception:
            # The image's own error is what counts.
            log.debug("no advice", exc_info=True)
            return
        if said:
            say(log, logging.WARNING, "preflight.helps", advice=Joined(said, "list.semicolon"))


def pass_of(p: Processing) -> Pass:
    """Returns the pass that a request begins next: its calls, and if another checkpoint follows it.

    A refiner takes over at its share of the steps, in the second pass if there is one: the WebUI's default. A checkpoint
    of the second pass, or of the request alone, is given back after it.
    """
    steps, is_last = steps_of(p), "sd_model_checkpoint" in own_options(p)
    is_refined_pass = True
    if isinstance(p, TwoPasses) and p.enable_hr:
        is_last |= p.hr_checkpoint_info is not None
        is_refined_pass = p.is_hr_pass
    if not isinstance(p, Refined) or p.refiner_checkpoint_info is None or not is_refined_pass:
        return Pass(steps, is_last)
    before = math.ceil(steps * (p.refiner_switch_at or 0))
    is_refining = p.sd_model.sd_checkpoint_info == p.refiner_checkpoint_info
    return Pass(steps - before if is_refining else before, is_last=True)


def steps_of(p: Processing) -> int:
    """Returns the steps of the pass that a request begins next: of an image from noise all of its steps, of one that is changed
    its share of them. Rows that do not fit into one call, and samplers that call twice a step, make more of it.
    """
    steps = int(p.steps)
    is_second = getattr(p, "is_hr_pass", False)
    if is_second:
        steps = int(getattr(p, "hr_second_pass_steps", 0) or steps)
    strength: float | None = getattr(p, "denoising_strength", None)
    if strength is None or not (is_second or getattr(p, "init_images", None)):
        return steps
    return max(1, round(steps * strength))


ROWS: tuple[Row[Images], ...] = (
    Row("modules.processing", "process_images_inner", lambda images: (images.process_images_inner,), is_needed=False),
)
