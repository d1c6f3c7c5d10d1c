"""Forge's own two ways of applying LoRAs: for after the guard's has failed, and to undo what the host did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...memory.snapshot import available_ram_bytes
from ...messages import Message, say
from ...patching.access import find_owner
from .access import RAM_FLOOR_BYTES, ForgeAccess
from .api import ForgeApi
from .lora_loader_state import RETRY
from .patches import Patches

log = logging.getLogger(__name__)


class OwnWays:
    def __init__(self, api: ForgeApi) -> None:
        self._api = api

    def apply_whole(
        self,
        original: Callable[..., None],
        loader: Any,
        access: ForgeAccess,
        wanted: Sequence[tuple[Any, Mapping[str, Any]]],
        offload: torch.device,
    ) -> Message | None:
        """docs/architecture.md, "When something fails": the host's fp16-LoRA path, then its merge where that loses nothing.
        Returns the way that worked; None where neither reaches all of `wanted`, and then the model is without LoRAs."""
        for online, way in ((True, Message("host.fp16_path")), (False, Message("host.merge_path"))):
            is_whole = self._online_reaches if online else self._merge_is_safe
            if not wanted or not is_whole(access, [patches for _, patches in wanted]):
                continue
            if self.refresh(original, loader, {_with_mode(name, online): patches for name, patches in wanted}, offload):
                return way
        return None

    def refresh(self, original: Callable[..., None], loader: Any, patches: Any, offload: torch.device) -> bool:
        """The host's own refresh; where it fails, its traces are removed and the parameters go back to their devices
        (after a failed merge the host leaves the whole model on the CPU)."""
        devices = {key: parameter.device for key, parameter in loader.model.named_parameters()}
        try:
            run(original, loader, patches, offload)
            return True
        except Exception:
            say(log, logging.ERROR, "host.own_patcher_failed", exc_info=True, model=type(loader.model).__name__)
        run(original, loader, {}, offload)
        for key, device in devices.items():
            owner = find_owner(loader.model, key)
            if owner is not None and getattr(*owner).device != device:
                moved = getattr(*owner).to(device)
                setattr(*owner, moved if isinstance(moved, torch.nn.Parameter) else torch.nn.Parameter(moved, False))
        return False

    def _online_reaches(self, access: ForgeAccess, patches: Sequence[Mapping[str, Any]]) -> bool:
        """True where Forge's layers ask its online path for every one of these parameters; it leaves out others unsaid."""
        sites = [site for key in {k for p in patches for k in p} if (site := access.site(key)) is not None]
        return all(
            site.name in ("weight", "bias")
            and (
                isinstance(site.layer, self._api.weight_classes)
                or getattr(site.layer, "parameters_manual_cast", False) is True
            )
            for site in sites
        )

    def _merge_is_safe(self, access: ForgeAccess, patches: Sequence[Mapping[str, Any]]) -> bool:
        sites = [site for key in {k for p in patches for k in p} if (site := access.site(key)) is not None]
        needed = sum(site.storage.bytes for site in sites)
        return all(site.storage.wide for site in sites) and needed + RAM_FLOOR_BYTES < available_ram_bytes()


def run(original: Callable[..., None], loader: Any, patches: Patches, offload: torch.device) -> None:
    """The host's `refresh`, at work whatever it believes to have applied."""
    # A state that no stack has makes every version of the host work; `force_refresh` is younger than some of them.
    loader.loaded_hash = RETRY
    original(loader, patches, offload)


def _with_mode(identifier: Any, online: bool) -> Any:
    return (
        (*identifier[:3], online)
        if isinstance(identifier, tuple) and len(identifier) == 4
        else (str(identifier), 1.0, 1.0, online)
    )
