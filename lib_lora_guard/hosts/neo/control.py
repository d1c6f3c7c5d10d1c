"""Brings LoRAs to Neo's models whenever Neo places them: the guard's engine first, Neo's own ways only after a failure.

Source: Neo's `backend/patcher/base.py` (`ModelPatcher`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Concatenate

import torch

from ...errors import RestoreError, named
from ...memory.out_of_memory import is_out_of_memory
from ...messages import Joined, Message, say
from ...patching.hook_attachments import OnTheFlyAttachment
from ...patching.lora_request import LoraRequest
from ...recorder.flight_recorder import Phase
from ...reporting.report import clean_text
from ...runtime.hooks import P, R
from ...runtime.journal import Journal, ModelFacts
from ...runtime.live_settings import LiveSettings
from ...settings import LoraMode
from ..webui.models import storage_name
from ..webui.stored_rows import settle
from .access import NeoAccess, back_home, uses_product
from .api import NeoApi
from .fallback import HostPatches
from .patchers import label_of, loras_of, requests_of
from .stacks import Asked, NeoStack, NeoStacks
from .swapped import Swapped
from .types import Patcher

log = logging.getLogger(__name__)


class LoraControl:
    """Its methods stand in place of those of `ModelPatcher` that place a model, and call one another."""

    def __init__(
        self, api: NeoApi, stacks: NeoStacks, settings: LiveSettings, journal: Journal, swapped: Swapped
    ) -> None:
        """
        Args:
            api: Neo's modules.
            stacks: of all models.
            settings: the user's, read at every load.
            journal: of the process.
            swapped: keeps copies in RAM of what Neo moves.
        """
        self._api, self._stacks, self._settings, self._journal = api, stacks, settings, journal
        self._swapped = swapped
        self._host = HostPatches(api)

    # In place of Neo's methods.

    def partially_load(
        self, original: Callable[Concatenate[Patcher, P], R], patcher: Patcher, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Stands in place of `partially_load`, the one way in which Neo loads a model."""
        stack = self._stacks.known(patcher.model)
        if stack is not None and stack.left_to_host and stack.applied != self._stacks.asked(patcher):
            self._host.take_back(patcher)

        def load_again() -> None:
            original(patcher, *args, **kwargs)

        with self._stacks.placing(patcher, lambda patcher, stack: self._bring(patcher, stack, load_again)):
            return original(patcher, *args, **kwargs)

    def load(
        self, original: Callable[Concatenate[Patcher, P], R], patcher: Patcher, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Stands in place of `load`, which moves layers to the device and empties their lists of functions."""
        with self._stacks.placing(patcher, self._restore):
            self._stacks.before_move(patcher.model)
            self._stacks.remember_offloaded(patcher)
            with self._swapped.moving(patcher):
                return original(patcher, *args, **kwargs)

    def partially_unload(
        self,
        original: Callable[Concatenate[Patcher, torch.device, float, P], float],
        patcher: Patcher,
        device_to: torch.device,
        memory_to_free: float = 0,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> float:
        """Stands in place of `partially_unload`, which moves layers into RAM; the model may go on with the others.

        Factors leave the card in any case, and have their place in RAM. So they leave first, and so much less of the model.
        """
        with self._stacks.placing(patcher, self._restore):
            freed: float = self._free_factors(patcher)
            if 0 < memory_to_free <= freed:
                return freed
            homes = self._stacks.before_move(patcher.model)
            with self._swapped.moving(patcher):
                freed += original(patcher, device_to, memory_to_free - freed, *args, **kwargs)
            with torch.inference_mode(False), torch.no_grad():
                back_home(NeoAccess(self._api, patcher.model), homes)
            return freed

    def _free_factors(self, patcher: Patcher) -> int:
        """Frees the factors on the card of a model that shrinks; returns the bytes that another model may have of it."""
        stack = self._stacks.known(patcher.model)
        is_for_others = stack is not None and stack.depth == 1 and stack.engine.resident_bytes() > 0
        # Asked of Neo: memory that torch keeps for itself counts there only where it is whole.
        before = self._api.memory.get_free_memory(patcher.load_device) if is_for_others else 0
        self._stacks.after_leaving(patcher.model)
        if not is_for_others:
            # For its own next steps: the factors come back for them.
            return 0
        return max(0, self._api.memory.get_free_memory(patcher.load_device) - before)

    def unpatch_model(
        self,
        original: Callable[Concatenate[Patcher, torch.device | None, bool, P], R],
        patcher: Patcher,
        device_to: torch.device | None = None,
        unpatch_weights: bool = True,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Stands in place of `unpatch_model`, which puts Neo's backups in place and moves the model away."""
        if not unpatch_weights:
            return original(patcher, device_to, unpatch_weights, *args, **kwargs)
        self._stacks.before_move(patcher.model)
        if device_to is not None and device_to.type == "cpu":
            self._swapped.to_ram(patcher)
        result = original(patcher, device_to, unpatch_weights, *args, **kwargs)
        self._stacks.after_leaving(patcher.model)
        return result

    def load_state_dict(
        self,
        original: Callable[Concatenate[torch.nn.Module, P], R],
        model: torch.nn.Module,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Stands in place of `backend.state_dict.load_state_dict`: the fast way of the refiner reads other weights into a
        model that stays."""
        self._stacks.weights_changed(model)
        self._swapped.forget(model)
        return original(model, *args, **kwargs)

    # What they end with.

    def _bring(self, patcher: Patcher, stack: NeoStack, load_again: Callable[[], None]) -> None:
        """Brings a model to the stack of `patcher`."""
        asked, loras = self._stacks.asked(patcher), loras_of(patcher)
        if stack.applied == asked:
            stack.reattach()
            self._remind(stack)
        else:
            about = ModelFacts(type(patcher.model).__name__, storage_name(patcher.model), tuple(map(label_of, loras)))
            with self._journal.phase(Phase.APPLY_LORA, about):
                self._change(patcher, stack, asked, load_again)
        self._bring_factors(patcher, stack)

    def _bring_factors(self, patcher: Patcher, stack: NeoStack) -> None:
        """Copies the factors to the device now, many at once; what fails here the first call does layer by layer."""
        if stack.left_to_host:
            return
        try:
            stack.engine.bring_factors(NeoAccess(self._api, patcher.model))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.debug("%s: factors wait for the first step", type(patcher.model).__name__, exc_info=True)

    def _change(self, patcher: Patcher, stack: NeoStack, asked: Asked, load_again: Callable[[], None]) -> None:
        loras, before, stack.applied = loras_of(patcher), stack.last, None
        # As Neo does right after: norms are read from the weights now.
        self._api.memory.bake_gguf_model(patcher.model)
        access = NeoAccess(self._api, patcher.model)
        with torch.inference_mode(False), torch.no_grad():
            if stack.weights_changed or (before is not None and before.patches_uuid != asked.patches_uuid):
                # What the LoRAs were worked out from is not there any more.
                stack.detach()
                stack.weights_changed = False
            stack.mode, stack.left_to_host = asked.mode, False
            if asked.mode is LoraMode.OWN:
                stack.detach()
                self._leave_to_host(patcher, stack, requests_of(loras, asked.as_trained), load_again)
                return
            requests = requests_of(loras, asked.as_trained)
            name = str(asked.loras)
            settle(patcher.model, {key for request in requests for key in request.terms})
            try:
                with stack.engine.offloaded(stack.offloaded):
                    is_as_wished = self._stacks.change(stack, access, patcher.model, requests, asked.mode)
                # The engine leaves alone what it has put on a layer already, and Neo may have emptied the list.
                stack.reattach()
            except Exception as error:
                say(log, logging.ERROR, "host.apply_failed", exc_info=True, model=access.name)
                self._fall_back(patcher, stack, access, requests, error, load_again)
                return
        stack.loras, stack.last = loras, asked
        if not stack.merges_again(name, is_as_wished):
            stack.applied = asked
        if before == asked:
            # Merges that were lifted for a move are in place again: nothing to tell of.
            self._stacks.publish_reports()
            self._remind(stack)
            return
        self._stacks.publish(stack, access.name)
        products = _slow_products(stack, access.name)
        if products is not None:
            self._stacks.words.tell(products, logging.INFO)

    def _restore(self, patcher: Patcher, stack: NeoStack) -> None:
        """Brings the stack that a model has back after Neo has moved some of its layers. `patcher` may be another one of
        the model: Neo lets a parent stand for a clone that is gone."""
        if stack.left_to_host:
            return
        stack.reattach()
        if not stack.engine.suspended:
            return
        access = NeoAccess(self._api, patcher.model)
        requests = requests_of(stack.loras, self._settings.as_trained)
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._stacks.change(stack, access, patcher.model, requests, stack.mode or LoraMode.AUTOMATIC)
            except Exception:
                # The next load applies it, or says why it cannot.
                say(log, logging.ERROR, "host.apply_failed", exc_info=True, model=access.name)

    def _remind(self, stack: NeoStack) -> None:
        """Says again what is to be said of an image with the same stack."""
        if self._stacks.words.is_open:
            self._stacks.tell_again(stack)
        elif stack.report is not None and stack.report.refused:
            loras = Joined([lora.message() for lora in stack.report.refused], "list.semicolon")
            say(log, logging.WARNING, "host.model_still_without", model=stack.report.model, loras=loras)

    def _leave_to_host(
        self, patcher: Patcher, stack: NeoStack, requests: list[LoraRequest], load_again: Callable[[], None]
    ) -> Message | None:
        """Lets Neo apply a stack by its own ways; returns the way, None if there is none."""
        access = NeoAccess(self._api, patcher.model)
        stack.report, stack.fell_back, stack.loras, stack.last = None, [], loras_of(patcher), None
        self._stacks.publish_reports()
        way = self._host.give(patcher, access, requests)
        if way is not None:
            try:
                load_again()
            except Exception:
                say(log, logging.ERROR, "host.own_patcher_failed", exc_info=True, model=access.name)
                self._host.take_back(patcher)
                load_again()
                way = None
        stack.left_to_host = way is not None
        stack.applied = self._stacks.asked(patcher)
        return way

    def _fall_back(
        self,
        patcher: Patcher,
        stack: NeoStack,
        access: NeoAccess,
        requests: list[LoraRequest],
        error: Exception,
        load_again: Callable[[], None],
    ) -> None:
        """Uses Neo's own ways, else no LoRA, and says which (docs/architecture.md, "When something fails")."""
        if not stack.engine.detach_all():
            # An image made now would have a part of a LoRA; the next load tries again.
            say(log, logging.ERROR, "host.not_restored_next_image", model=access.name)
            raise RestoreError.of("memory.not_restored_at_all") from error
        fitting = stack.engine.fitting(access, requests)
        said = []
        for place, refused in stack.engine.refusals(access, requests).items():
            facts = {"name": clean_text(requests[place].label), "model": access.name, "why": clean_text(refused)}
            said.append(Message("host.left_out_of_model", facts))
            self._stacks.words.tell(said[-1])
        wanted = [request for place, request in enumerate(requests) if place in fitting]
        why = clean_text(named(error))
        way = self._leave_to_host(patcher, stack, wanted, load_again)
        # Memory may be there again at the next load; another error would be the same one.
        if is_out_of_memory(error) or way is None:
            stack.applied = None
        if way is not None:
            facts = {"model": access.name, "why": why, "way": way, "loras": _names(wanted)}
            stack.fell_back = [*said, Message("host.fell_back", facts)]
            self._stacks.words.tell(stack.fell_back[-1])
        elif requests:
            facts = {"model": access.name, "loras": _names(requests), "why": why}
            self._stacks.words.tell(Message("host.without", facts), logging.ERROR)

    # Switching off.

    def release_all(self, live: list[Patcher]) -> None:
        """Takes the guard's patches off every model, and gives the LoRAs of loaded patchers to Neo, which applies them at the
        next load. Refused LoRAs are not handed over.

        Args:
            live: the patchers of the loaded models.
        """
        patchers = {patcher.model: patcher for patcher in live}
        for model, stack in self._stacks.take_out():
            access, patcher = NeoAccess(self._api, model), patchers.get(model)
            with torch.inference_mode(False), torch.no_grad():
                fitting: list[LoraRequest] = []
                if patcher is not None and not stack.left_to_host:
                    requests = requests_of(loras_of(patcher), self._settings.as_trained)
                    places = stack.engine.fitting(access, requests)
                    fitting = [request for place, request in enumerate(requests) if place in places]
                if not stack.engine.detach_all():
                    say(log, logging.ERROR, "host.not_restored", model=access.name)
                if patcher is not None and fitting:
                    self._host.give(patcher, access, fitting)


def _slow_products(stack: NeoStack, model: str) -> Message | None:
    """Returns a sentence if weights lose the product of their format: a kind that goes through the weight decodes it at each
    call."""
    attached = [one for one in stack.engine.attached.values() if uses_product(one.site.layer)]
    slow = [one for one in attached if isinstance(one, OnTheFlyAttachment)]
    if not slow:
        return None
    formats = Joined(sorted({one.site.storage.format for one in slow}), "list.names")
    return Message("neo.products_off", {"model": model, "count": len(slow), "of": len(attached), "formats": formats})


def _names(requests: list[LoraRequest]) -> Joined:
    return Joined((clean_text(request.label) for request in requests), "list.names")
