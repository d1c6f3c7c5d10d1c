"""What happens in place of `LoraLoader.refresh`: the guard's engine first, the host's own ways only after a failure."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from ..patching.engine import Engine, LoraRequest
from ..planning.mode import Mode
from ..reporting.report import ApplyReport, clean_text
from ..weights.storage import MB
from .forge_access import ForgeAccess, GuardPatches
from .forge_patches import FactorCopies, Patches, describe, requests_from
from .forge_probe import ForgeApi

log = logging.getLogger(__name__)

STATE = "lora_guard_state"
RETRY = "lora guard: apply again"
"""A `loaded_hash` that no stack has, so that the next refresh really works."""
RAM_FLOOR_BYTES = 2048 * MB
"""Left alone when the host's merge would fill RAM with backups: below this Windows starts to kill and swap."""


@dataclass(eq=False)
class LoaderState:
    """What the guard knows of one LoraLoader; lives on the loader and dies with it."""

    engine: Engine = field(default_factory=Engine)
    copies: FactorCopies = field(default_factory=FactorCopies)
    left_to_host: bool = False
    report: ApplyReport | None = None


class LoaderControl:
    def __init__(self, api: ForgeApi) -> None:
        self._api = api
        self._loaders: weakref.WeakSet[Any] = weakref.WeakSet()

    def refresh(
        self,
        original: Callable[..., None],
        loader: Any,
        lora_patches: Patches,
        offload_device: torch.device | None = None,
        force_refresh: bool = False,
    ) -> None:
        """Same meaning as the host's: brings the model to `lora_patches`, at once where nothing changed."""
        stack_hash = str(list(lora_patches.keys()))
        if stack_hash == loader.loaded_hash and not force_refresh:
            return
        offload = offload_device if offload_device is not None else torch.device("cpu")
        state = self._state(loader)
        with torch.inference_mode(False), torch.no_grad():
            if state.left_to_host or (not state.engine.attached and (loader.backup or loader.online_backup)):
                self._take_from_host(original, loader, state, offload)
            access = ForgeAccess(self._api, loader.model)
            requests = requests_from(lora_patches, self._api.lora.extra_weight_calculators, state.copies)
            try:
                state.report = state.engine.change(access, requests, backup_device=offload)
            except Exception as error:
                log.exception("%s: applying LoRAs failed", access.name)
                loader.loaded_hash = RETRY
                self._fall_back(original, loader, state, access, lora_patches, requests, offload, stack_hash, error)
                return
            self._publish(loader, state, stack_hash)
            self._say(state.report)

    def merge_lora_to_weight(
        self, original: Callable[..., torch.Tensor], patches: Any, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Called by Forge's layers with the temporary weight of one forward pass."""
        if isinstance(patches, GuardPatches):
            return patches.apply(weight)
        return original(patches, weight, *args, **kwargs)

    def is_left_to_host(self, loader: Any) -> bool:
        state = getattr(loader, STATE, None)
        return state is not None and state.left_to_host

    def drop_device_copies(self, loader: Any) -> None:
        state = getattr(loader, STATE, None)
        if state is not None:
            state.engine.drop_device_copies()

    def resident_bytes(self, loader: Any) -> int:
        state = getattr(loader, STATE, None)
        return 0 if state is None else state.engine.resident_bytes()

    def report(self, loader: Any) -> ApplyReport | None:
        """What the last refresh of this loader did."""
        state = getattr(loader, STATE, None)
        return None if state is None else state.report

    def release_all(self, original: Callable[..., None], live: Mapping[int, tuple[Patches, torch.device]]) -> None:
        """Takes the guard's patches off every model; `live` names the stacks (by loader id) the host shall apply itself."""
        for loader in list(self._loaders):
            state = self._state(loader)
            if not state.engine.detach_all():
                log.error("%s: some weights could not be restored; reload the checkpoint", type(loader.model).__name__)
            if not state.left_to_host:
                loader.backup, loader.online_backup, loader.loaded_hash = {}, [], str([])
            delattr(loader, STATE)
            if id(loader) in live:
                patches, offload_device = live[id(loader)]
                original(loader, patches, offload_device, True)
        self._loaders.clear()

    def _state(self, loader: Any) -> LoaderState:
        state: LoaderState | None = getattr(loader, STATE, None)
        if state is None:
            state = LoaderState()
            setattr(loader, STATE, state)
            self._loaders.add(loader)
        return state

    def _publish(self, loader: Any, state: LoaderState, stack_hash: str) -> None:
        """The attributes other extensions read mean what they mean in the host."""
        attached = state.engine.attached.values()
        loader.backup = state.engine.originals()
        loader.online_backup = [a.site.layer for a in attached if a.mode is Mode.ON_THE_FLY]
        loader.loaded_hash = stack_hash

    def _say(self, report: ApplyReport) -> None:
        log.log(logging.WARNING if report.refused else logging.INFO, "%s", report.line())

    def _take_from_host(
        self, original: Callable[..., None], loader: Any, state: LoaderState, offload: torch.device
    ) -> None:
        original(loader, {}, offload, True)
        state.left_to_host = False

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
        """Design invariant 5: the host's fp16-LoRA path, then its merge where that loses nothing, then no LoRA."""
        if not state.engine.detach_all():
            log.error(
                "%s: some weights could not be restored; reload the checkpoint before you trust the next image",
                access.name,
            )
        loader.backup, loader.online_backup = {}, []
        fitting = state.engine.fitting(access, requests)
        wanted = [(identifier, patches) for i, (identifier, patches) in enumerate(lora_patches.items()) if i in fitting]
        for online, way in ((True, "Forge's fp16-LoRA path"), (False, "Forge's merge")):
            if not wanted or (not online and not self._merge_is_safe(access, [p for _, p in wanted])):
                continue
            try:
                original(
                    loader, {_with_mode(identifier, online): patches for identifier, patches in wanted}, offload, True
                )
            except Exception:
                log.exception("%s: %s failed too", access.name, way)
                original(loader, {}, offload, True)
                continue
            state.left_to_host = True
            loader.loaded_hash = stack_hash
            log.warning(
                "%s: %s; the LoRAs are applied by %s instead: %s",
                access.name,
                _reason(error),
                way,
                ", ".join(clean_text(describe(i)[0]) for i, _ in wanted),
            )
            return
        loader.loaded_hash = RETRY
        log.error(
            "%s: this image is made WITHOUT the LoRAs %s: %s",
            access.name,
            ", ".join(clean_text(r.label) for r in requests),
            _reason(error),
        )

    def _merge_is_safe(self, access: ForgeAccess, patches: Sequence[Mapping[str, Any]]) -> bool:
        sites = [site for key in {k for p in patches for k in p} if (site := access.site(key)) is not None]
        needed = sum(site.storage.bytes for site in sites)
        return all(site.storage.wide for site in sites) and needed + RAM_FLOOR_BYTES < psutil.virtual_memory().available


def _with_mode(identifier: Any, online: bool) -> Any:
    return (
        (*identifier[:3], online)
        if isinstance(identifier, tuple) and len(identifier) == 4
        else (str(identifier), 1.0, 1.0, online)
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {clean_text(str(error))[:300]}"
