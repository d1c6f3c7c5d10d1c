"""Forge's own two ways of applying LoRAs: after the guard's has failed, and to undo what Forge did."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...memory.snapshot import available_ram_bytes
from ...messages import Message, say
from ...patching.access import Site, find_owner
from ...planning.limits import RAM_FLOOR_BYTES
from .access import ForgeAccess
from .identifiers import with_online
from .lora_loader_state import AppliedStack
from .types import LoraLoader, Patches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostRefresh:
    """Forge's own refresh of one loader.

    Attributes:
        original: `LoraLoader.refresh` without the guard.
        loader: The loader.
        offload: The device on which Forge keeps the weights that it merges into.
    """

    original: Callable[[LoraLoader, Patches, torch.device], None]
    loader: LoraLoader
    offload: torch.device

    def run(self, patches: Patches) -> None:
        """Applies a stack, whatever Forge has recorded as applied."""
        # An unknown stack makes every version of Forge work; `force_refresh` is younger than some of them.
        AppliedStack(self.loader).invalidate()
        self.original(self.loader, patches, self.offload)

    def attempt(self, patches: Patches) -> bool:
        """Applies a stack. If that fails, takes what is there off and moves the parameters back to their devices.

        After a failed merge Forge leaves the whole model on the CPU.

        Returns:
            False after a failure: then the model is without LoRAs.
        """
        model = self.loader.model
        devices = {key: parameter.device for key, parameter in model.named_parameters()}
        try:
            self.run(patches)
            return True
        except Exception:
            say(log, logging.ERROR, "host.own_patcher_failed", exc_info=True, model=type(model).__name__)
        self.run({})
        for key, device in devices.items():
            owner = find_owner(model, key)
            if owner is not None and getattr(*owner).device != device:
                moved = getattr(*owner).to(device)
                setattr(*owner, moved if isinstance(moved, torch.nn.Parameter) else torch.nn.Parameter(moved, False))
        return False


def apply_whole(
    host: HostRefresh, access: ForgeAccess, patches: Patches, weight_classes: tuple[type, ...]
) -> Message | None:
    """Applies a stack by Forge's fp16-LoRA path, else by its merge if that loses nothing.

    See docs/architecture.md, "When something fails".

    Args:
        host: Forge's own refresh.
        access: The model.
        patches: The stack.
        weight_classes: The layers that ask the fp16-LoRA path for their weights.

    Returns:
        The way that worked; None if neither can apply all of `patches`, and then the model is without LoRAs.
    """
    sites = [site for key in {k for one in patches.values() for k in one} if (site := access.site(key)) is not None]
    for online, way in ((True, Message("host.fp16_path")), (False, Message("host.merge_path"))):
        if not patches or not (_online_reaches(sites, weight_classes) if online else _merge_is_safe(sites)):
            continue
        if host.attempt({with_online(identifier, online): one for identifier, one in patches.items()}):
            return way
    return None


def _online_reaches(sites: list[Site], weight_classes: tuple[type, ...]) -> bool:
    """True if Forge's layers ask its fp16-LoRA path for all of these parameters; it omits others without a word."""
    return all(
        site.name in ("weight", "bias")
        and (isinstance(site.layer, weight_classes) or getattr(site.layer, "parameters_manual_cast", False) is True)
        for site in sites
    )


def _merge_is_safe(sites: list[Site]) -> bool:
    """True if merging rounds nothing away and RAM has room for the weights that Forge keeps."""
    needed = sum(site.storage.bytes for site in sites)
    return all(site.storage.wide for site in sites) and needed + RAM_FLOOR_BYTES < available_ram_bytes()
