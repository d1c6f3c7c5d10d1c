"""Applies stacks of LoRAs to a host's models by the user's mode.

A model has the whole stack as the guard applies it, or nothing of it, or the host applies it: never a part. How a host names
its stacks, and what it can do itself after a failure, is in `hosts/`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import RestoreError, named
from ..memory.out_of_memory import is_out_of_memory
from ..messages import Message
from ..patching.access import ModelAccess
from ..patching.engine import Engine
from ..patching.lora_request import LoraRequest
from ..patching.merge_loss import merge_loss
from ..patching.watching import Watch
from ..planning.mode import Wish
from ..recorder.crash_report import Precaution
from ..reporting.report import ApplyReport, clean_text
from ..settings import LoraMode
from .image_words import ImageWords

log = logging.getLogger(__name__)

WISHES = {LoraMode.AUTOMATIC: Wish.AUTO, LoraMode.FP16: Wish.NEVER_MERGE, LoraMode.MERGE: Wish.PREFER_MERGE}
"""The mode of the host itself has none: there the guard applies nothing."""

MERGE_ATTEMPTS = 2
"""How often the merge of one stack may end for lack of memory: copying the originals of a large model takes seconds each
time."""


@dataclass(eq=False)
class ModelStack:
    """The stack of one model. It lives on the host's object for the model and dies with it."""

    engine: Engine = field(default_factory=Engine)
    mode: LoraMode | None = None
    """The mode of the last change; None before the first."""
    left_to_host: bool = False
    """True while the host applies the LoRAs of this model itself."""
    report: ApplyReport | None = None
    """The last change; None if nothing of the guard is on the model."""
    merge_loss_is_logged: bool = False
    """True once the log says why low-bit weights of this model are not merged."""
    fell_back: list[Message] = field(default_factory=list)
    """After a failure of the guard's way: the sentences on the host's own, and on the LoRAs that it was not given."""
    slow_layers: int = 0
    """How many layers were said to be slow for lack of VRAM."""
    failed_merges: tuple[str, int] = ("", 0)
    """The stack whose merge ended for lack of memory, and how often in a row."""

    def detach(self) -> None:
        """Takes everything of the guard off the model.

        Raises:
            RestoreError: Something of it is still there; the next change tries again.
        """
        if not self.engine.detach_all():
            raise RestoreError.of("memory.not_restored_at_all")

    def merges_again(self, name: str, is_as_wished: bool) -> bool:
        """Returns True if the next load should try again to merge: memory may be there by then.

        Args:
            name: The stack of the change that has just been made.
            is_as_wished: False if its merge ended for lack of memory.
        """
        before, times = self.failed_merges
        self.failed_merges = ("", 0) if is_as_wished else (name, times + 1 if before == name else 1)
        return 0 < self.failed_merges[1] < MERGE_ATTEMPTS


class ModelStacks:
    """The stacks of all models that the guard works on, held weakly, and how they are changed."""

    def __init__(
        self,
        precautions: Callable[[torch.nn.Module], Collection[Precaution]],
        watch: Watch,
        words: ImageWords | None = None,
    ) -> None:
        """
        Args:
            precautions: Returns what to avoid with a model, because the last process died of it.
            watch: Wraps the work of every engine.
            words: Says what a model lacks of its LoRAs.
        """
        self.precautions, self._watch, self.words = precautions, watch, words or ImageWords()
        self.weight_files: Callable[[], Sequence[Path]] = tuple
        """Returns the files that models were loaded from, for merges without copies in RAM. A host replaces it."""
        self.merges_from_file: Callable[[], bool] = bool
        """True if the mode "Automatic" merges where such a file has the originals. A host replaces it."""
        self._no_merge_is_logged = False
        self._stacks: weakref.WeakSet[ModelStack] = weakref.WeakSet()
        self._reports: tuple[tuple[weakref.ref[ModelStack], ApplyReport], ...] = ()

    def new_engine(self) -> Engine:
        """Makes the engine of a model."""
        return Engine(self._watch, weight_files=self.weight_files)

    def add(self, stack: ModelStack) -> None:
        """Adds the stack of a model that the guard has not worked on before."""
        self._stacks.add(stack)

    def change(
        self,
        stack: ModelStack,
        access: ModelAccess,
        model: torch.nn.Module,
        requests: Sequence[LoraRequest],
        mode: LoraMode,
    ) -> bool:
        """Applies a stack to its model.

        If memory ends in a merge, the stack is applied without merging: less memory was there than the system said, and
        nothing has changed yet.

        Args:
            stack: Gets the report.
            access: The model as the engine sees it.
            model: The model.
            requests: The LoRAs, in order.
            mode: The user's; not the host's own.

        Returns:
            False if memory ended in a merge.

        Raises:
            Exception: What an engine raises; the model has the stack it had before.
        """
        stack.fell_back = []
        wish, otherwise = self._wish(mode, model)
        try:
            stack.report = stack.engine.change(access, requests, wish)
            stack.report.otherwise += otherwise if requests else []
            return True
        except Exception as error:
            if wish is Wish.NEVER_MERGE or not is_out_of_memory(error):
                raise
            why = clean_text(named(error))
        # The error is gone here, and what it held in memory with it.
        ended = Message("preflight.merge_ended", {"model": access.name, "why": why})
        log.warning("%s", ended)
        stack.report = stack.engine.change(access, requests, Wish.NEVER_MERGE)
        stack.report.otherwise.append(ended)
        return False

    def publish(self, stack: ModelStack, name: str) -> None:
        """Makes the result of a change known: to the panel, and in the log.

        Args:
            stack: The changed stack.
            name: The model's.
        """
        self.publish_reports()
        if stack.mode is LoraMode.MERGE and not stack.merge_loss_is_logged:
            loss = _merge_loss(stack, name)
            if loss is not None:
                self.words.tell(loss)
        if stack.report is not None:
            log.log(logging.WARNING if stack.report.is_worrying else logging.INFO, "%s", stack.report.line())
            self.tell_again(stack, is_logged=True)

    def tell_again(self, stack: ModelStack, is_logged: bool = False) -> None:
        """Says of the present image what its model lacks of its LoRAs, and what of them is applied otherwise than asked.

        Args:
            stack: The model's.
            is_logged: True if the log has the report already.
        """
        for message in stack.fell_back:
            self.words.tell(message, is_logged=True)
        if stack.report is not None:
            self.words.tell_of([stack.report], is_logged)

    def tell_of_slow_layers(self) -> None:
        """Says under the image how many layers had no VRAM for their LoRA, once for each number. The log has each layer."""
        for stack in list(self._stacks):
            count = sum(one.is_slow for one in stack.engine.attached.values())
            if count not in (0, stack.slow_layers):
                facts = {"model": stack.engine.name, "count": count}
                self.words.tell(Message("memory.layers_on_the_cpu", facts), is_logged=True)
            stack.slow_layers = count

    def publish_reports(self) -> None:
        """Makes the present reports known to other threads."""
        self._reports = tuple((weakref.ref(one), one.report) for one in self._stacks if one.report is not None)

    def reports(self) -> tuple[ApplyReport, ...]:
        """Returns the stack of each model as it was last reported. For any thread."""
        # Replaced as a whole, never changed in place.
        return tuple(report for stack, report in self._reports if stack() is not None)

    def engines(self) -> list[Engine]:
        """Returns the engine of every model that the guard has worked on and that still lives."""
        return [stack.engine for stack in list(self._stacks)]

    def forget(self) -> None:
        """Drops all stacks, when the guard is taken out."""
        self._stacks.clear()
        self._reports = ()

    def _wish(self, mode: LoraMode, model: torch.nn.Module) -> tuple[Wish, list[Message]]:
        """Translates the mode. The guard does not merge if merging ended the last process.

        Returns:
            The wish, and a sentence if it is not what the mode asks for.
        """
        wish = WISHES[mode]
        if mode is LoraMode.AUTOMATIC and self.merges_from_file():
            wish = Wish.MERGE_FROM_FILE
        merges = wish in (Wish.PREFER_MERGE, Wish.MERGE_FROM_FILE)
        if not merges or Precaution.NO_MERGE not in self.precautions(model):
            return wish, []
        if not self._no_merge_is_logged:
            self._no_merge_is_logged = True
            log.warning("%s", Precaution.NO_MERGE.message)
        # "Automatic" asks for the best way, not for a merge.
        return Wish.AUTO, [Precaution.NO_MERGE.message] if mode is LoraMode.MERGE else []


def _merge_loss(stack: ModelStack, model: str) -> Message | None:
    """Returns a sentence on what merging the low-bit weights of a model would lose, once per model."""
    try:
        loss = merge_loss(stack.engine.attached.values())
    except Exception:
        # A measurement, and the LoRAs are on the model already.
        log.debug("%s: what merging would lose could not be measured", model, exc_info=True)
        return None
    if loss is None:
        return None
    stack.merge_loss_is_logged = True
    key = "everyday.cannot_be_merged" if loss.cosine is None else "everyday.not_merged"
    facts = {"count": loss.weights, "format": loss.format, "cosine": loss.cosine or 0.0, "weight": loss.key}
    return Message(key, {"model": model, **facts})
