"""Forge's steps are timed, and said to be slow where the driver moved VRAM into system memory.

Nothing is synchronised for it. Before each call of the model Forge itself waits for the GPU: `compute_cond_mark` copies a
list from ordinary RAM to the device, and such a copy returns when all that was enqueued before it is done. So the time from
the start of one call to the start of the next is what the first one took, with the sampler's own work after it. Samplers
with two calls a step, and prompt and negative prompt in two calls, have so many times a step, each of its own size.

It counts where both calls belong to one run and nothing else was written in the journal between them: a model that moved, a
preview decoded by the VAE, LoRAs that were changed, a refiner's checkpoint. The first call of a run prepares what the others
use (factors on the device, kernels for the shapes), and after the last one the picture is decoded: neither counts. So no
pause between two images does, nor one that was interrupted.

Sources: Forge's `backend/sampling/sampling_function.py` (`calc_cond_uncond_batch`), `backend/modules/k_model.py`;
docs.nvidia.com, CUDA runtime, "API synchronization behavior".
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from typing import Concatenate

import torch

from ..memory.shared_usage import shared_usage_bytes
from ..memory.step_times import LEAST_EXCESS_SECONDS, StepTimes, Verdict, driver_spills
from ..messages import Joined, Message
from ..patching.swapped_ahead import AHEAD
from ..recorder.flight_recorder import Phase
from .hooks import P, R
from .host import ModelSizes
from .image_words import ImageWords
from .journal import Journal

log = logging.getLogger(__name__)

BETWEEN_COUNTERS_SECONDS = 1.0
"""Windows' counters take some milliseconds. A step of LEAST_EXCESS_SECONDS may be a slow one, and is looked at in any case."""

_SHARE_STEP_BYTES = 1 << 30
"""Models of which another part lies on the device are timed apart: what is swapped takes longer, and rightly so."""

_SAID = 64


class StepTimer:
    """Hooked in place of `KModel.apply_model`."""

    def __init__(
        self,
        memory: ModelSizes,
        journal: Journal,
        stack_of: Callable[[torch.nn.Module], Hashable],
        *,
        times: StepTimes | None = None,
        clock: Callable[[], float] = time.perf_counter,
        shared_usage: Callable[[], int | None] | None = shared_usage_bytes if sys.platform == "win32" else None,
        words: ImageWords | None = None,
    ) -> None:
        """
        Args:
            memory: the host's sizes of models.
            journal: tells steps from everything else.
            stack_of: names the LoRAs that lie on a model, without their strengths: these change with every image, and not how
                long a step takes.
            times: for tests.
            clock: in seconds.
            shared_usage: bytes of system memory that the driver uses for VRAM; None where there are no such counters.
            words: says under the image that it is slow.
        """
        self._memory, self._journal, self._stack_of = memory, journal, stack_of
        self._times = times or StepTimes(driver_spills())
        self._clock, self._shared_usage = clock, shared_usage
        self._words = words or ImageWords()
        self._lock = threading.Lock()
        self._run = -1
        """The journal's count when the present run began."""
        self._begun: tuple[Hashable, float, bool] | None = None
        """The last call: its configuration, when it began, whether it was the first of its run."""
        self._models: dict[int, Hashable] = {}
        """The facts that all calls of a run share, by the model's id."""
        self._asked = 0.0
        self._shared_at_first: int | None = None
        """The counters before the run's first call: the model is loaded, and no step has taken anything."""
        self._said: set[tuple[Hashable, Verdict]] = set()

    def apply_model(
        self,
        original: Callable[Concatenate[torch.nn.Module, P], R],
        model: torch.nn.Module,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Stands in place of `KModel.apply_model(x, t, ...)`, on whatever device. Swapped weights begin to come with the step."""
        journal = self._journal
        x = args[0] if args else kwargs.get("x")
        if isinstance(x, torch.Tensor) and x.device.type == "cuda":
            self._step(journal.others, model, x, kwargs.get("control") is not None)
        with journal.phase(Phase.SAMPLING_STEP):
            AHEAD.step_begins(model)
            try:
                return original(model, *args, **kwargs)
            except BaseException:
                # Half a step, and what comes next is not known.
                self._begun = None
                raise
            finally:
                AHEAD.step_ends()

    def _step(self, run: int, model: torch.nn.Module, x: torch.Tensor, controlled: bool) -> None:
        # Two that sample at the same time would each be timed for both.
        if not self._lock.acquire(blocking=False):
            self._begun = None
            return
        try:
            self._begin(run, model, x, controlled)
        except Exception:
            # An alarm must not be what stops an image.
            log.debug("a step was not timed", exc_info=True)
            self._begun = None
        finally:
            self._lock.release()

    def _begin(self, run: int, model: torch.nn.Module, x: torch.Tensor, controlled: bool) -> None:
        now, before, first = self._clock(), self._begun, run != self._run
        if first:
            self._run, self._models = run, {}
            self._shared_at_first = None if self._shared_usage is None else self._shared_usage()
        elif before is not None:
            configuration, since, was_first = before
            self._add(configuration, now, now - since, was_first)
        about = self._models.get(id(model))
        if about is None:
            about = self._models[id(model)] = self._about(model, x.device)
        self._begun = (about, x.shape, controlled), now, first

    def _about(self, model: torch.nn.Module, device: torch.device) -> Hashable:
        share = self._memory.module_size(model, include_device=device) // _SHARE_STEP_BYTES
        return weakref.ref(model), str(device), self._stack_of(model), share

    def _add(self, configuration: Hashable, now: float, seconds: float, first: bool) -> None:
        shared = None
        if self._shared_usage is not None and (
            seconds >= LEAST_EXCESS_SECONDS or now - self._asked >= BETWEEN_COUNTERS_SECONDS
        ):
            self._asked, shared = now, self._shared_usage()
        slowdown = self._times.add(
            configuration, seconds, first=first, shared_bytes=shared, shared_at_first_bytes=self._shared_at_first
        )
        if slowdown is None:
            return
        messages = slowdown.messages(lower_mb=slowdown.over_mb, nvidia=torch.version.hip is None)
        if (configuration, slowdown.verdict) not in self._said:
            if len(self._said) >= _SAID:
                self._said.clear()
            self._said.add((configuration, slowdown.verdict))
            # What the driver did not do is nothing to worry about, and nothing that a setting of ours would cure.
            level = logging.INFO if slowdown.verdict is Verdict.OTHER else logging.WARNING
            for message in messages:
                log.log(level, "%s", message)
        slow = Message("spill.image", {"what": Joined(messages, "list.semicolon")})
        self._words.tell(slow, is_logged=True, once=f"slow: {slowdown.verdict.value}")
