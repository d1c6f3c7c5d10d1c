"""Stands in place of Forge's `LoraLoader.refresh`: the guard's engine first, Forge's own ways only after a failure.

Source: Forge's `backend/patcher/lora.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import RestoreError, named
from ...memory.out_of_memory import is_out_of_memory
from ...messages import Joined, Message, say
from ...patching.lora_request import LoraRequest
from ...reporting.report import clean_text
from ...runtime.live_settings import LiveSettings
from ...settings import LoraMode
from ..webui.stored_rows import settle
from .access import ForgeAccess
from .api import ForgeApi
from .fallback import HostRefresh, apply_whole
from .identifiers import describe
from .lora_loader_state import AppliedStack, LoaderState, state_of
from .patches import are_there, without_failed
from .stacks import ForgeStacks, wants_hosts_layers
from .types import Identifier, LoraLoader, Patcher, Patches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refresh:
    """One refresh that has something to do.

    Attributes:
        host: Forge's own refresh of the same loader.
        state: The guard's state on the loader.
        access: The model.
        patches: The stack that the model shall have.
    """

    host: HostRefresh
    state: LoaderState
    access: ForgeAccess
    patches: Patches

    @property
    def loader(self) -> LoraLoader:
        """The loader."""
        return self.host.loader


class LoaderControl:
    """Forge calls `refresh` whenever a patcher is loaded."""

    def __init__(self, api: ForgeApi, stacks: ForgeStacks, settings: LiveSettings) -> None:
        """
        Args:
            api: Forge's modules.
            stacks: Of all models.
            settings: The user's, read at every refresh.
        """
        self._api, self._stacks, self._settings = api, stacks, settings

    def refresh(
        self,
        original: Callable[..., None],
        loader: LoraLoader,
        lora_patches: Patches,
        offload_device: torch.device | None = None,
        force_refresh: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Brings the model to `lora_patches`; returns at once if nothing has changed.

        Args:
            original: Forge's own refresh.
            loader: Of the model.
            lora_patches: The stack.
            offload_device: Where Forge keeps what it merges into.
            force_refresh: Applies the stack even if it is on the model already.
            args: Further arguments of a newer Forge, passed on.
            kwargs: The same.

        Raises:
            RestoreError: After a failure the model has a part of a LoRA; the image must not be made.
        """
        mode, state = self._settings.mode(), state_of(loader)
        # Without a state Forge has applied this stack itself, before the guard was switched on.
        is_as_before = not lora_patches if state is None else state.mode is mode
        if AppliedStack(loader).is_current(lora_patches) and not force_refresh and is_as_before:
            if state is not None:
                # Copies on the card went with the model when it left.
                _bring_factors(state, ForgeAccess(self._api, loader.model))
            return
        state = self._stacks.state(loader)
        state.mode = mode
        offload = offload_device if offload_device is not None else torch.device("cpu")
        access = ForgeAccess(self._api, loader.model)

        def with_more(loader: LoraLoader, patches: Patches, offload: torch.device) -> None:
            original(loader, patches, offload, True, *args, **kwargs)

        # Some versions of Forge have no `force_refresh`; one with more parameters has it.
        host = HostRefresh(with_more if args or kwargs else original, loader, offload)
        change = Refresh(host, state, access, lora_patches)
        if mode is LoraMode.OWN or wants_hosts_layers(loader.model, lora_patches):
            self._leave_to_host(change)
        else:
            self._apply(change, mode)

    def _apply(self, change: Refresh, mode: LoraMode) -> None:
        state, loader = change.state, change.loader
        applied = AppliedStack(loader)
        # Until all is done the recorded state is one that no stack has: an interrupt must not leave a true-looking lie.
        applied.invalidate()
        with torch.inference_mode(False), torch.no_grad():
            requests: Sequence[LoraRequest] = []
            try:
                if state.left_to_host or state.is_patched_by_other(loader):
                    self._take_from_host(change)
                requests = self._stacks.reader.requests(change.patches, self._settings.as_trained)
                settle(loader.model, {key for request in requests for key in request.terms})
                is_as_wished = self._stacks.change(state, change.access, loader.model, requests, mode)
            except Exception as error:
                say(log, logging.ERROR, "host.apply_failed", exc_info=True, model=change.access.name)
                self._fall_back(change, requests, error)
                return
            state.publish(loader, change.patches)
            if state.merges_again(state.reported, is_as_wished) or not are_there(change.patches):
                applied.invalidate()
            self._stacks.publish(state, change.access.name)
            _bring_factors(state, change.access)

    def _take_from_host(self, change: Refresh) -> None:
        """Lets Forge's own code undo what it, or a copy of it in another extension, has done."""
        change.host.run({})
        # Then nothing of the guard may be left either.
        change.state.detach()
        change.state.left_to_host, change.state.published = False, None

    def _leave_to_host(self, change: Refresh) -> None:
        """Takes everything of the guard off; Forge applies the stack as it does without the guard."""
        state = change.state
        if not state.left_to_host:
            state.detach()
            if state.published is not None:
                state.unpublish(change.loader)
        state.left_to_host, state.report, state.fell_back = True, None, []
        self._stacks.publish_reports()
        patches, failed = without_failed(change.patches)
        for name, why in failed.items():
            facts = {"name": clean_text(name), "model": change.access.name, "why": clean_text(why)}
            self._stacks.words.tell(Message("host.left_out_of_model", facts))
        change.host.run(patches)

    def _fall_back(self, change: Refresh, requests: Sequence[LoraRequest], error: Exception) -> None:
        """Uses Forge's own ways, else no LoRA, and says which (docs/architecture.md, "When something fails")."""
        state, loader, access = change.state, change.loader, change.access
        restored = state.engine.detach_all()
        state.unpublish(loader)
        self._stacks.publish_reports()
        if not restored:
            # An image made now would have a part of a LoRA; the next load tries again.
            say(log, logging.ERROR, "host.not_restored_next_image", model=access.name)
            raise RestoreError.of("memory.not_restored_at_all") from error
        wanted = _at(change.patches, state.engine.fitting(access, requests))
        said = []
        for place, refused in state.engine.refusals(access, requests).items():
            facts = {"name": clean_text(requests[place].label), "model": access.name, "why": clean_text(refused)}
            said.append(Message("host.left_out_of_model", facts))
            self._stacks.words.tell(said[-1])
        why = clean_text(named(error))
        way = apply_whole(change.host, access, wanted, self._api.weight_classes)
        if way is None:
            AppliedStack(loader).invalidate()
            if change.patches:
                facts = {"model": access.name, "loras": _names(change.patches), "why": why}
                self._stacks.words.tell(Message("host.without", facts), logging.ERROR)
            return
        state.left_to_host = True
        # Memory may be there again at the next load, and a file that never came; another error would be the same one.
        if is_out_of_memory(error) or not are_there(change.patches):
            AppliedStack(loader).invalidate()
        else:
            AppliedStack(loader).record(change.patches)
        facts = {"model": access.name, "why": why, "way": way, "loras": _names(wanted)}
        state.fell_back = [*said, Message("host.fell_back", facts)]
        self._stacks.words.tell(state.fell_back[-1])

    def release_all(self, original: Callable[..., None], live: Mapping[int, Patcher]) -> None:
        """Takes the guard's patches off every model, and lets Forge apply its LoRAs. Refused LoRAs are not handed over.

        Args:
            original: Forge's own refresh.
            live: The patcher of each loaded model, by the id of its loader.
        """
        fitting: dict[int, Patches] = {}
        for loader in self._stacks.loaders():
            state, access = self._stacks.state(loader), ForgeAccess(self._api, loader.model)
            patcher = live.get(id(loader))
            if patcher is not None:
                requests = self._stacks.reader.requests(patcher.lora_patches, self._settings.as_trained)
                fitting[id(loader)] = _at(patcher.lora_patches, state.engine.fitting(access, requests))
            if not state.engine.detach_all():
                say(log, logging.ERROR, "host.not_restored", model=access.name)
            if not state.left_to_host:
                state.unpublish(loader)
                AppliedStack(loader).record(())
        for loader in self._stacks.take_out():
            if id(loader) in fitting:
                HostRefresh(original, loader, live[id(loader)].offload_device).attempt(fitting[id(loader)])


def _bring_factors(state: LoaderState, access: ForgeAccess) -> None:
    """Brings the factors to the card now: made in the first step, they would take its time."""
    try:
        state.engine.bring_factors(access)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The first call makes what is missing, and has a way for each layer that gets none.
        log.debug("%s: factors wait for the first step", access.name, exc_info=True)


def _at(patches: Patches, places: set[int]) -> Patches:
    """Returns the LoRAs at these places of a stack."""
    return {identifier: one for place, (identifier, one) in enumerate(patches.items()) if place in places}


def _names(identifiers: Iterable[Identifier]) -> Joined:
    return Joined((clean_text(describe(identifier)[0]) for identifier in identifiers), "list.names")
