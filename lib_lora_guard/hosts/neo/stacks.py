"""The stacks of LoRAs on Neo's models, asked for by patcher or model, and kept right while models move.

A patcher is a stack that the model shall have; all patchers of a model share what the guard knows of it.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias
from uuid import UUID

import torch

from ...adapters.base import Shape
from ...messages import say
from ...patching.access import Site, find_owner
from ...patching.hook_attachments import OnTheFlyAttachment
from ...patching.watching import Watch, merges_in
from ...recorder.crash_report import Precaution
from ...reporting.report import ApplyReport
from ...runtime.image_words import ImageWords
from ...runtime.live_settings import LiveSettings
from ...runtime.model_stack import ModelStack, ModelStacks
from ...settings import LoraMode
from .patchers import label_of, loras_of
from .types import Loras, Patcher

log = logging.getLogger(__name__)


Homes: TypeAlias = Sequence[tuple[Site, torch.device]]
"""Parameters and the devices that they belong on."""


class Asked(NamedTuple):
    """All that decides how a model is patched; equal where nothing has to be done."""

    loras: tuple[tuple[str, int, float, tuple[str, ...] | None], ...]
    """File, id of its terms for the model, strength, and the parameters if not all are meant, in order."""
    mode: LoraMode
    as_trained: bool
    patches_uuid: UUID
    """Names what other extensions have given to Neo's own merge."""
    objects: tuple[int, ...]
    """The ids of the objects that replace parts of the model."""


@dataclass(eq=False)
class NeoStack(ModelStack):
    """The stack of one of Neo's models."""

    applied: Asked | None = None
    """None: unknown, so that the next load applies its stack."""
    last: Asked | None = None
    """The last stack that was applied. Its merges may have been lifted since; norms are of the weights that it found."""
    loras: Loras = ()
    """Those of `last`. They keep the terms alive whose ids it holds."""
    depth: int = 0
    """How many of Neo's methods that move layers of the model are at work."""
    offloaded: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Parameters in RAM, by name, as they were before Neo moved them to the device."""
    weights_changed: bool = False
    """True once other values were read into the model's weights: norms and backups are those of the old ones."""

    def reattach(self) -> None:
        """Puts on-the-fly functions back where Neo has emptied a layer's list of them."""
        for attachment in self.engine.attached.values():
            if isinstance(attachment, OnTheFlyAttachment):
                attachment.attach()


class NeoStacks(ModelStacks):
    """The stacks of all models that the guard has worked on. They die with the models."""

    def __init__(
        self,
        settings: LiveSettings,
        precautions: Callable[[torch.nn.Module], Collection[Precaution]],
        watch: Watch,
        words: ImageWords | None = None,
    ) -> None:
        """
        Args:
            settings: the user's, read at every question.
            precautions: returns what to avoid with a model, because the last process died of it.
            watch: wraps the work of every engine.
            words: says what a model lacks of its LoRAs.
        """
        super().__init__(precautions, watch, words)
        self._settings = settings
        self._of_models: weakref.WeakKeyDictionary[torch.nn.Module, NeoStack] = weakref.WeakKeyDictionary()

    def known(self, model: torch.nn.Module) -> NeoStack | None:
        """Returns the stack of a model; None if the guard has not worked on it."""
        return self._of_models.get(model)

    def of(self, model: torch.nn.Module) -> NeoStack:
        """Returns the stack of a model; makes one if there is none."""
        stack = self.known(model)
        if stack is None:
            stack = self._of_models[model] = NeoStack(self.new_engine())
            self.add(stack)
        return stack

    def take_out(self) -> list[tuple[torch.nn.Module, NeoStack]]:
        """Forgets all stacks; returns those of the models that still live."""
        stacks = list(self._of_models.items())
        self._of_models.clear()
        self.forget()
        return stacks

    def asked(self, patcher: Patcher) -> Asked:
        """Returns how a patcher's model shall be patched."""
        return Asked(
            tuple((lora.filename, id(lora.terms), lora.asked_strength(), lora.keys) for lora in loras_of(patcher)),
            self._settings.mode(),
            self._settings.as_trained,
            patcher.patches_uuid,
            tuple(map(id, patcher.object_patches.values())),
        )

    # What is on a model.

    def is_current(self, patcher: Patcher) -> bool:
        """True if the stack of `patcher` is applied to its model."""
        stack = self.known(patcher.model)
        if stack is None:
            return not loras_of(patcher)
        return stack.applied is not None and stack.applied.loras == self.asked(patcher).loras

    def report_for(self, patcher: Patcher) -> ApplyReport | None:
        """Returns the report of a patcher's stack; None if another stack is on the model, or nothing of the guard's."""
        stack = self.known(patcher.model)
        return stack.report if stack is not None and self.is_current(patcher) else None

    def names_on(self, model: torch.nn.Module) -> Hashable:
        """Names the LoRAs on a model without their strengths, for what does not depend on them."""
        stack = self.known(model)
        return None if stack is None else (stack.mode, tuple(map(label_of, stack.loras)))

    def unpatched_shapes(self, model: torch.nn.Module) -> dict[str, Shape]:
        """Returns the shapes that the merged parameters of a model have without their LoRAs."""
        stack = self.known(model)
        return {} if stack is None else stack.engine.unpatched_shapes()

    def invalidate_all(self) -> None:
        """Makes every model be patched anew at its next load, because a file has changed under its name."""
        for stack in list(self._of_models.values()):
            stack.applied = None

    def weights_changed(self, module: torch.nn.Module) -> None:
        """Called when a state dict is read into `module`, which may be a part of a model that has LoRAs."""
        for model, stack in list(self._of_models.items()):
            if any(part is module for part in model.modules()):
                stack.applied, stack.weights_changed = None, True

    # While models move.

    @contextlib.contextmanager
    def placing(self, patcher: Patcher, finish: Callable[[Patcher, NeoStack], None]) -> Iterator[None]:
        """Wraps one of Neo's methods that place a model's layers. Such methods call one another; the outermost one ends it.

        Args:
            patcher: whose method it is.
            finish: called when the outermost one has ended without an error: brings the stack to the model.
        """
        stack = self.known(patcher.model)
        if stack is None:
            if not loras_of(patcher):
                yield
                return
            stack = self.of(patcher.model)
        stack.depth += 1
        try:
            yield
            if stack.depth == 1:
                finish(patcher, stack)
        finally:
            stack.depth -= 1
            if not stack.depth:
                stack.offloaded = {}

    def before_move(self, model: torch.nn.Module) -> Homes:
        """Lifts the merges of a model: Neo is about to move its weights, or to put its own backups in their place.

        Returns:
            Where the merged parameters were. The originals lie where their backups are, mostly in RAM.
        """
        stack = self.known(model)
        if stack is None:
            return ()
        homes = tuple((one.site, one.site.parameter.device) for one in merges_in(stack.engine.attached.values()))
        try:
            with torch.inference_mode(False), torch.no_grad():
                suspended = stack.engine.suspend_merges()
        except Exception:
            # Moved with its LoRAs it is as right as before, only larger.
            say(log, logging.ERROR, "host.not_lifted", exc_info=True, model=type(model).__name__)
            suspended = True
        if suspended:
            stack.applied = None
        return homes

    def remember_offloaded(self, patcher: Patcher) -> None:
        """Remembers the parameters in RAM that a stack will patch: they are the backups of the merges made on the device."""
        stack = self.known(patcher.model)
        if stack is None or self._settings.mode() is LoraMode.OWN:
            return
        keys = {key for lora in loras_of(patcher) for key in lora.asked_terms()}
        owners = {key: owner for key in keys if (owner := find_owner(patcher.model, key)) is not None}
        values = {key: getattr(*owner).data for key, owner in owners.items()}
        stack.offloaded = {key: value for key, value in values.items() if value.device.type == "cpu"}

    def after_leaving(self, model: torch.nn.Module) -> None:
        """Frees the factors on the device of a model that has left it."""
        stack = self.known(model)
        if stack is not None:
            stack.engine.drop_device_copies()
