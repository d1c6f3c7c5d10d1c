"""The stacks of LoRAs on Forge's models, asked for by patcher, loader or model, and kept right while models move.

A loader belongs to a model. A patcher is a stack that the model shall have; all patchers of a model share its loader.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator

import torch

from ...adapters.base import Shape
from ...messages import Joined, say
from ...patching.access import find_owner
from ...patching.watching import Watch
from ...recorder.crash_report import Precaution
from ...reporting.report import ApplyReport
from ...runtime.image_words import ImageWords
from ...runtime.live_settings import LiveSettings
from ...runtime.model_stack import ModelStacks
from ...settings import LoraMode
from ...weights.storage import WIDE_DTYPES
from .facts import loader_of, loader_of_model, storage_dtype
from .identifiers import describe, parse, stack_name
from .lora_loader_state import STATE, AppliedStack, LoaderState, state_of
from .patches import PatchReader
from .types import LoraLoader, Patcher, Patches

log = logging.getLogger(__name__)


class ForgeStacks(ModelStacks):
    """The stacks of all models that the guard has worked on."""

    def __init__(
        self,
        reader: PatchReader,
        settings: LiveSettings,
        precautions: Callable[[torch.nn.Module], Collection[Precaution]],
        watch: Watch,
        words: ImageWords | None = None,
    ) -> None:
        """
        Args:
            reader: Reads the patches of a stack.
            settings: The user's, read at every question.
            precautions: Returns what to avoid with a model, because the last process died of it.
            watch: Wraps the work of every engine.
            words: Says what a model lacks of its LoRAs.
        """
        super().__init__(precautions, watch, words)
        self.reader, self._settings = reader, settings
        self._loaders: weakref.WeakSet[LoraLoader] = weakref.WeakSet()

    def state(self, loader: LoraLoader) -> LoaderState:
        """Returns the state on a loader; makes one if there is none."""
        state = state_of(loader)
        if state is None:
            state = LoaderState(self.new_engine())
            setattr(loader, STATE, state)
            self._loaders.add(loader)
            self.add(state)
        return state

    def take_out(self) -> list[LoraLoader]:
        """Removes the states from their loaders, and returns those that had one."""
        loaders = list(self._loaders)
        for loader in loaders:
            delattr(loader, STATE)
        self._loaders.clear()
        self.forget()
        return loaders

    def loaders(self) -> list[LoraLoader]:
        """Returns the loaders of all models that the guard has worked on and that still live."""
        return list(self._loaders)

    # What is on a model.

    def report(self, loader: LoraLoader) -> ApplyReport | None:
        """Returns what the last refresh of this loader did; None if the guard has applied nothing."""
        state = state_of(loader)
        return None if state is None else state.report

    def report_for(self, patcher: Patcher) -> ApplyReport | None:
        """Returns the report of the model of a patcher."""
        return self.report(patcher.lora_loader)

    def is_current(self, patcher: Patcher) -> bool:
        """True if the stack of `patcher` is applied: not after a change that failed, nor while merges are suspended."""
        loader = loader_of(patcher)
        # Another extension's patcher has no LoRAs that could be missing.
        return loader is None or AppliedStack(loader).is_current(patcher.lora_patches)

    def is_reported(self, patcher: Patcher) -> bool:
        """True if the last report of this model describes the stack of `patcher`."""
        state = state_of(patcher.lora_loader)
        return state is not None and state.reported == stack_name(patcher.lora_patches)

    def takes_off(self, patcher: Patcher) -> bool:
        """True if a LoRA of the model of `patcher` may not be in its stack, at whatever strength."""
        report = self.report(patcher.lora_loader)
        coming = {describe(identifier)[0] for identifier in patcher.lora_patches}
        return report is None or any(lora.label not in coming for lora in report.loras if lora.refused is None)

    def names_on(self, model: torch.nn.Module) -> Hashable:
        """Names the LoRAs on a model without their strengths, for what does not depend on them."""
        loader = loader_of_model(model)
        state = state_of(loader)
        if state is None or state.report is None:
            return None if loader is None else AppliedStack(loader).name
        return state.mode, tuple(lora.label for lora in state.report.loras)

    def merged_layers(self, model: torch.nn.Module) -> set[torch.nn.Module]:
        """Returns the layers of a model that have a LoRA merged into them."""
        state = state_of(loader_of_model(model))
        return set() if state is None else state.engine.merged_layers()

    def unpatched_shapes(self, model: torch.nn.Module) -> dict[str, Shape]:
        """Returns the shapes that the merged parameters of a model have without their LoRAs."""
        state = state_of(loader_of_model(model))
        return {} if state is None else state.engine.unpatched_shapes()

    def resident_bytes(self, loader: LoraLoader | None) -> int:
        """Returns the bytes of LoRA factors that are on the model's device now."""
        state = state_of(loader)
        return 0 if state is None else state.engine.resident_bytes()

    def applied_bytes(self, patcher: Patcher) -> int | None:
        """Returns the bytes of LoRA factors on the device while the model runs; None unless the guard has applied them."""
        state = state_of(loader_of(patcher))
        return None if state is None or not self.is_current(patcher) else state.engine.device_bytes()

    # Who applies it.

    def is_left_to_host(self, patcher: Patcher) -> bool:
        """True if Forge applies this patcher's LoRAs itself, now or at the refresh that is due."""
        if self._settings.mode() is LoraMode.OWN or wants_hosts_layers(patcher.model, patcher.lora_patches):
            return True
        return self.was_left_to_host(patcher.lora_loader)

    def was_left_to_host(self, loader: LoraLoader) -> bool:
        """True if Forge has applied the present stack of this loader itself."""
        state = state_of(loader)
        return state is not None and state.left_to_host

    # What has to be applied again.

    def invalidate(self, patcher: Patcher) -> None:
        """Makes a model that was handed to `patcher` count as without its LoRAs, if those of the patcher before differ."""
        if not self.is_current(patcher):
            AppliedStack(patcher.lora_loader).invalidate()

    def invalidate_all(self) -> None:
        """Makes every model be refreshed, because a file has changed under its name."""
        for loader in self.loaders():
            AppliedStack(loader).invalidate()

    def remind(self, patcher: Patcher) -> None:
        """Repeats what failed for a patcher that is loaded already, and says again which LoRAs are left out."""
        loader = patcher.lora_loader
        state = state_of(loader)
        is_hosts_work = state is None and bool(patcher.lora_patches)
        is_in_other_mode = state is not None and state.mode is not self._settings.mode()
        if AppliedStack(loader).is_unknown or is_hosts_work or is_in_other_mode:
            patcher.refresh_loras()
            return
        report = self.report(loader)
        if state is not None and self.words.is_open:
            self.tell_again(state)
        elif report is not None and report.refused:
            loras = Joined([lora.message() for lora in report.refused], "list.semicolon")
            say(log, logging.WARNING, "host.model_still_without", model=report.model, loras=loras)

    # While models move.

    def before_move(self, loader: LoraLoader | None) -> None:
        """Suspends the merges of a model that Forge is about to move: it moves the originals, and refreshes afterwards."""
        state = state_of(loader)
        if loader is None or state is None or state.left_to_host:
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                suspended = state.engine.suspend_merges()
        except Exception:
            # Moved with its LoRAs it is as right as before, only larger.
            say(log, logging.ERROR, "host.not_lifted", exc_info=True, model=type(loader.model).__name__)
            suspended = True
        if suspended:
            AppliedStack(loader).invalidate()

    @contextlib.contextmanager
    def loading(self, patcher: Patcher) -> Iterator[None]:
        """Wraps Forge's placing of a model: parameters that lie in RAM before it are the backups of the merges made in
        it."""
        loader = loader_of(patcher)
        if loader is None or not patcher.lora_patches or self._settings.mode() is LoraMode.OWN:
            yield
            return
        self.before_move(loader)
        state = self.state(loader)
        keys = {key for patches in patcher.lora_patches.values() for key in patches}
        owners = [(key, find_owner(patcher.model, key)) for key in keys]
        values = {key: getattr(*owner).data for key, owner in owners if owner is not None}
        with state.engine.offloaded({key: value for key, value in values.items() if value.device.type == "cpu"}):
            del values, owners
            yield

    def drop_device_copies(self, loader: LoraLoader | None) -> None:
        """Frees the factors on the device of a model that has left it."""
        state = state_of(loader)
        if state is not None:
            state.engine.drop_device_copies()


def wants_hosts_layers(model: torch.nn.Module, lora_patches: Patches) -> bool:
    """True for a stack that is to be applied in each forward pass of a model with 16-bit or wider weights.

    Forge itself never asks for that. regional-prompter does, and changes the strengths on the layers between two calls of
    the model.
    """
    if storage_dtype(model) not in WIDE_DTYPES:
        return False
    return any(fields is not None and fields.online is True for fields in map(parse, lora_patches))
