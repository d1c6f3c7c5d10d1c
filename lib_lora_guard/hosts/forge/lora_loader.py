"""What happens in place of `LoraLoader.refresh`: the guard's engine first, the host's own ways only after a failure."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...adapters.base import Shape
from ...errors import RestoreError, named
from ...memory.out_of_memory import is_out_of_memory
from ...messages import Joined, say
from ...patching.access import find_owner
from ...patching.engine import Engine, LoraRequest
from ...patching.merge_loss import merge_loss
from ...patching.watching import Watch, unwatched
from ...planning.mode import Wish
from ...recorder.crash_report import Precaution
from ...reporting.report import ApplyReport, clean_text
from ...runtime.live_settings import LiveSettings
from ...settings import LoraMode
from ...weights.storage import WIDE_DTYPES
from .access import STATE, ForgeAccess, GuardPatches
from .api import ForgeApi
from .fallback import OwnWays, run
from .lora_loader_state import RETRY, LoaderState, hash_of, state_of
from .patches import Patches, describe, requests_from

log = logging.getLogger(__name__)

WISHES = {LoraMode.AUTOMATIC: Wish.AUTO, LoraMode.FP16: Wish.NEVER_MERGE, LoraMode.MERGE: Wish.PREFER_MERGE}


class LoaderControl:
    """`mode` is asked at every refresh: a request over the API may bring a mode of its own for one image."""

    def __init__(
        self,
        api: ForgeApi,
        settings: LiveSettings | None = None,
        precautions: Callable[[torch.nn.Module | None], Collection[Precaution]] = lambda model: (),
        watch: Watch = unwatched,
    ) -> None:
        """
        Args:
            api: Forge.
            settings: the user's.
            precautions: returns what to plan around after a crash, for a model.
            watch: goes around the work of every engine.
        """
        self._api, self._own_ways = api, OwnWays(api)
        self._settings, self._precautions, self._watch = settings or LiveSettings(), precautions, watch
        self._told_no_merge = False
        self._loaders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._reports: tuple[tuple[weakref.ref[Any], ApplyReport], ...] = ()

    def mode(self) -> LoraMode:
        """Returns the mode for the present image."""
        return self._settings.mode()

    def refresh(
        self,
        original: Callable[..., None],
        loader: Any,
        lora_patches: Patches,
        offload_device: torch.device | None = None,
        force_refresh: bool = False,
    ) -> None:
        """Same meaning as the host's: brings the model to `lora_patches`, at once where nothing changed."""
        stack_hash = hash_of(lora_patches)
        mode = self.mode()
        state = state_of(loader)
        # Without a state the host has applied this stack itself, before the guard was switched on.
        is_as_before = not lora_patches if state is None else state.mode is mode
        if stack_hash == loader.loaded_hash and not force_refresh and is_as_before:
            return
        offload = offload_device if offload_device is not None else torch.device("cpu")
        state = self._state(loader)
        state.mode = mode
        access = ForgeAccess(self._api, loader.model)
        if mode is LoraMode.OWN or _wants_hosts_layers(loader.model, lora_patches):
            self._leave_to_host(original, loader, state, lora_patches, offload)
            return
        # Until all is done the recorded state is one that no stack has: an interrupt must not leave a true-looking lie.
        loader.loaded_hash = RETRY
        with torch.inference_mode(False), torch.no_grad():
            requests: Sequence[LoraRequest] = []
            try:
                if state.left_to_host or state.someone_else_patched(loader):
                    self._take_from_host(original, loader, state, offload)
                requests = self._requests(lora_patches, state)
                state.report, is_as_wished = self._change(
                    state.engine, access, requests, self._wish(mode, loader.model)
                )
            except Exception as error:
                say(log, logging.ERROR, "host.apply_failed", exc_info=True, model=access.name)
                self._fall_back(original, loader, state, access, lora_patches, requests, offload, stack_hash, error)
                return
            state.publish(loader, stack_hash)
            if state.merges_again(stack_hash, is_as_wished):
                # Memory may be there again at the next load.
                loader.loaded_hash = RETRY
            self._note_reports()
            if mode is LoraMode.MERGE and not state.told_merge_loss:
                self._say_what_merging_would_lose(access.name, state)
        log.log(logging.WARNING if state.report.is_worrying else logging.INFO, "%s", state.report.line())

    def _wish(self, mode: LoraMode, model: Any) -> Wish:
        """The mode's, without merging where that ended the last process."""
        if mode is LoraMode.MERGE and Precaution.NO_MERGE in self._precautions(model):
            if not self._told_no_merge:
                self._told_no_merge = True
                say(log, logging.WARNING, "flight.line", line=Precaution.NO_MERGE.message)
            return Wish.AUTO
        return WISHES[mode]

    def _change(
        self, engine: Engine, access: ForgeAccess, requests: Sequence[LoraRequest], wish: Wish
    ) -> tuple[ApplyReport, bool]:
        """What was done, and whether as wished: without merging where memory ends in it. Less was there than the system said,
        and nothing has changed yet."""
        try:
            return engine.change(access, requests, wish), True
        except Exception as error:
            if wish is Wish.NEVER_MERGE or not is_out_of_memory(error):
                raise
            why = clean_text(named(error))
        # Only here is what the error held on to free again.
        say(log, logging.WARNING, "preflight.merge_ended", model=access.name, why=why)
        return engine.change(access, requests, Wish.NEVER_MERGE), False

    def remind(self, patcher: Any) -> None:
        """For a patcher that is loaded already: tries a failed change again, and says again what is left out."""
        loader = patcher.lora_loader
        state = state_of(loader)
        is_hosts_work = state is None and bool(patcher.lora_patches)
        if loader.loaded_hash == RETRY or is_hosts_work or (state is not None and state.mode is not self.mode()):
            patcher.refresh_loras()
            return
        report = self.report(loader)
        if report is not None and report.refused:
            loras = Joined([lora.message() for lora in report.refused], "list.semicolon")
            say(log, logging.WARNING, "host.model_still_without", model=report.model, loras=loras)

    def merge_lora_to_weight(
        self, original: Callable[..., torch.Tensor], patches: Any, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Called by Forge's layers with the temporary weight of one forward pass."""
        if isinstance(patches, GuardPatches):
            return patches.apply(weight)
        return original(patches, weight, *args, **kwargs)

    def is_left_to_host(self, patcher: Any) -> bool:
        """True where the host applies this patcher's LoRAs, now or at the refresh that is due."""
        if self.mode() is LoraMode.OWN or _wants_hosts_layers(patcher.model, patcher.lora_patches):
            return True
        return self.was_left_to_host(patcher.lora_loader)

    def was_left_to_host(self, loader: Any) -> bool:
        state = state_of(loader)
        return state is not None and state.left_to_host

    def expect(self, patcher: Any) -> None:
        """The model belongs to `patcher` now: until it is refreshed, the LoRAs of the one before must not pass for its own."""
        if patcher.lora_loader.loaded_hash != hash_of(patcher.lora_patches):
            patcher.lora_loader.loaded_hash = RETRY

    def require_all_refreshes(self) -> None:
        """For when a file has changed under its name."""
        for loader in list(self._loaders):
            loader.loaded_hash = RETRY

    def engines(self) -> list[Engine]:
        """Of every model that the guard has worked on and that lives."""
        states = [state_of(loader) for loader in list(self._loaders)]
        return [state.engine for state in states if state is not None]

    def reports(self) -> tuple[ApplyReport, ...]:
        """What lies on each model now. For any thread: what it reads is replaced as a whole."""
        return tuple(report for loader, report in self._reports if loader() is not None)

    def _note_reports(self) -> None:
        known = [(weakref.ref(loader), self.report(loader)) for loader in self._loaders]
        self._reports = tuple((loader, report) for loader, report in known if report is not None)

    def before_move(self, loader: Any) -> None:
        """The host is about to move the model: what it moves are the originals, and it merges again afterwards."""
        state = state_of(loader)
        if state is None or state.left_to_host:
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                suspended = state.engine.suspend_merges()
        except Exception:
            # Moved with its LoRAs it is as right as before, only larger.
            say(log, logging.ERROR, "host.not_lifted", exc_info=True, model=type(loader.model).__name__)
            suspended = True
        if suspended:
            loader.loaded_hash = RETRY

    @contextlib.contextmanager
    def loading(self, patcher: Any) -> Iterator[None]:
        """Around the host's placing of a model: what lies in RAM before is the backup of what is merged after."""
        loader = getattr(patcher, "lora_loader", None)
        if loader is None or not patcher.lora_patches or self.mode() is LoraMode.OWN:
            yield
            return
        self.before_move(loader)
        state = self._state(loader)
        keys = {key for patches in patcher.lora_patches.values() for key in patches}
        owners = [(key, find_owner(patcher.model, key)) for key in keys]
        values = {key: getattr(*owner).data for key, owner in owners if owner is not None}
        with state.engine.offloaded({key: value for key, value in values.items() if value.device.type == "cpu"}):
            del values, owners
            yield

    def has_applied(self, patcher: Any) -> bool:
        """True where what lies on the model is what `patcher` asks for: not after a change that failed, and not while its
        merges are suspended for a move."""
        applied: bool = patcher.lora_loader.loaded_hash == hash_of(patcher.lora_patches)
        return applied

    def is_last_stack(self, patcher: Any) -> bool:
        """True where the last report of this model is of the stack that `patcher` asks for."""
        state = state_of(patcher.lora_loader)
        return state is not None and state.reported == hash_of(patcher.lora_patches)

    def drop_device_copies(self, loader: Any) -> None:
        state = state_of(loader)
        if state is not None:
            state.engine.drop_device_copies()

    def merged_layers(self, model: torch.nn.Module) -> set[torch.nn.Module]:
        """The layers of a loaded model that have a LoRA merged into them."""
        state = state_of(getattr(model, "lora_loader", None))
        return set() if state is None else state.engine.merged_layers()

    def stack_of(self, model: torch.nn.Module) -> Hashable:
        """Names the LoRAs that lie on a model, without their strengths."""
        loader = getattr(model, "lora_loader", None)
        state = state_of(loader)
        if state is None or state.report is None:
            return getattr(loader, "loaded_hash", None)
        return state.mode, tuple(lora.label for lora in state.report.loras)

    def unpatched_shapes(self, model: torch.nn.Module) -> dict[str, Shape]:
        """Shapes that the merged parameters of a loaded model have without their LoRAs."""
        state = state_of(getattr(model, "lora_loader", None))
        return {} if state is None else state.engine.unpatched_shapes()

    def resident_bytes(self, loader: Any) -> int:
        state = state_of(loader)
        return 0 if state is None else state.engine.resident_bytes()

    def report(self, loader: Any) -> ApplyReport | None:
        """What the last refresh of this loader did."""
        state = state_of(loader)
        return None if state is None else state.report

    def release_all(self, original: Callable[..., None], live: Mapping[int, Any]) -> None:
        """Takes the guard's patches off every model; `live` has the patcher (by loader id) of each loaded one, whose
        LoRAs the host shall apply itself. What the guard refused is not handed over."""
        fitting: dict[int, dict[Any, Any]] = {}
        loaders = list(self._loaders)
        for loader in loaders:
            state, access = self._state(loader), ForgeAccess(self._api, loader.model)
            patcher = live.get(id(loader))
            if patcher is not None:
                requests = self._requests(patcher.lora_patches, state)
                accepted = state.engine.fitting(access, requests)
                entries = enumerate(patcher.lora_patches.items())
                fitting[id(loader)] = {identifier: patches for i, (identifier, patches) in entries if i in accepted}
            if not state.engine.detach_all():
                say(log, logging.ERROR, "host.not_restored", model=access.name)
            if not state.left_to_host:
                loader.backup, loader.online_backup, loader.loaded_hash = {}, [], str([])
            delattr(loader, STATE)
        self._loaders.clear()
        self._reports = ()
        for loader in loaders:
            if id(loader) in fitting:
                self._own_ways.refresh(original, loader, fitting[id(loader)], live[id(loader)].offload_device)

    def _leave_to_host(
        self,
        original: Callable[..., None],
        loader: Any,
        state: LoaderState,
        lora_patches: Patches,
        offload: torch.device,
    ) -> None:
        """Mode "Forge's own": nothing of the guard is on the model, and the host does what it does without the guard."""
        if not state.left_to_host and not state.engine.detach_all():
            raise RestoreError.of("memory.not_restored_at_all")
        if not state.left_to_host and state.published is not None:
            loader.backup, loader.online_backup = {}, []
        state.left_to_host, state.published, state.report = True, None, None
        self._note_reports()
        run(original, loader, lora_patches, offload)

    def _say_what_merging_would_lose(self, model: str, state: LoaderState) -> None:
        try:
            loss = merge_loss(state.engine.attached.values())
        except Exception:
            log.debug("%s: what merging would lose could not be measured", model, exc_info=True)
            return
        if loss is None:
            return
        state.told_merge_loss = True
        key = "everyday.not_merged" if loss.cosine is not None else "everyday.cannot_be_merged"
        cosine = 0.0 if loss.cosine is None else loss.cosine
        say(
            log,
            logging.WARNING,
            key,
            model=model,
            count=loss.weights,
            format=loss.format,
            cosine=cosine,
            weight=loss.key,
        )

    def _requests(self, patches: Patches, state: LoaderState) -> list[LoraRequest]:
        return requests_from(patches, self._api.lora.extra_weight_calculators, state.copies, self._settings.as_trained)

    def _state(self, loader: Any) -> LoaderState:
        state = state_of(loader)
        if state is None:
            state = LoaderState(Engine(self._watch))
            setattr(loader, STATE, state)
            self._loaders.add(loader)
        return state

    def _take_from_host(
        self, original: Callable[..., None], loader: Any, state: LoaderState, offload: torch.device
    ) -> None:
        """Lets the host's own code undo what it (or a copy of it) did; then nothing of ours may be left either."""
        run(original, loader, {}, offload)
        if not state.engine.detach_all():
            raise RestoreError.of("memory.not_restored_at_all")
        state.left_to_host, state.published = False, None

    def _fall_back(
        self,
        original: Callable[..., None],
        loader: Any,
        state: LoaderState,
        access: ForgeAccess,
        lora_patches: Patches,
        requests: Sequence[LoraRequest],
        offload: torch.device,
        stack_hash: str,
        error: Exception,
    ) -> None:
        """docs/architecture.md, "When something fails": the host's own ways, then no LoRA, said in words."""
        restored = state.engine.detach_all()
        loader.backup, loader.online_backup = {}, []
        state.published, state.report = None, None
        self._note_reports()
        if not restored:
            # A picture made now would have a part of a LoRA; the next load tries again.
            say(log, logging.ERROR, "host.not_restored_next_image", model=access.name)
            raise RestoreError.of("memory.not_restored_at_all") from error
        fitting = state.engine.fitting(access, requests)
        wanted = [(identifier, patches) for i, (identifier, patches) in enumerate(lora_patches.items()) if i in fitting]
        why = clean_text(named(error))
        way = self._own_ways.apply_whole(original, loader, access, wanted, offload)
        if way is None:
            loader.loaded_hash = RETRY
            if lora_patches:
                say(log, logging.ERROR, "host.without", model=access.name, loras=_names(lora_patches), why=why)
            return
        state.left_to_host = True
        # Memory may be there again at the next load; another error would be the same one.
        loader.loaded_hash = RETRY if is_out_of_memory(error) else stack_hash
        names = _names(identifier for identifier, _ in wanted)
        say(log, logging.WARNING, "host.fell_back", model=access.name, why=why, way=way, loras=names)


def _wants_hosts_layers(model: Any, lora_patches: Patches) -> bool:
    """True for what Forge itself never asks for: its on-the-fly way on 16-bit and wider storage. regional-prompter does, and
    changes the strengths that lie on the layers between two calls of the model."""
    if getattr(model, "storage_dtype", None) not in WIDE_DTYPES:
        return False
    return any(isinstance(one, tuple) and len(one) == 4 and one[3] is True for one in lora_patches)


def _names(identifiers: Iterable[Any]) -> Joined:
    return Joined(clean_text(describe(identifier)[0]) for identifier in identifiers)
