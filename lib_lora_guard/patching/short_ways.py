"""The kernels that the layers of one model may be called with: which they are is found out at each change of its stack.

`fused.py` carries them out, `fused_choice.py` says for which images they are taken, `host_casts.py` has the layers without LoRAs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from .access import ModelAccess
from .attachment import Attachment
from .fused_choice import CHOICE, Key
from .hook_attachments import BypassAttachment, OnTheFlyAttachment
from .host_casts import HostCasts


def kernels_of(attachments: Mapping[str, Attachment], device: torch.device) -> dict[str, Key]:
    """Returns the kernels that a stack may use, by the name of the weight.

    Args:
        attachments: Of the stack, by the name of the weight.
        device: Where the model runs.
    """
    found = {
        key: one.kernel(device)
        for key, one in attachments.items()
        if isinstance(one, (BypassAttachment, OnTheFlyAttachment))
    }
    may_take = {kernel for kernel in set(found.values()) if kernel is not None and CHOICE.may_take(kernel)}
    return {key: kernel for key, kernel in found.items() if kernel is not None and kernel in may_take}


class ShortWays:
    """Those of one engine."""

    def __init__(self) -> None:
        self._casts = HostCasts()
        self._labels: tuple[str, ...] = ()
        """The LoRAs of the last stack that may use kernels."""

    def settle(
        self,
        access: ModelAccess,
        attached: Mapping[str, Attachment],
        kernels: Collection[Key],
        labels: tuple[str, ...],
        device: torch.device,
    ) -> None:
        """Has the kernels of a new stack compiled in the background, and settles the layers that have no LoRA.

        Args:
            access: The model.
            attached: The attachments of the new stack, which are on it.
            kernels: Those that the stack may use.
            labels: The names of its LoRAs, in order.
            device: Where the model runs.
        """
        if kernels:
            CHOICE.prepare(set(kernels), are_new_files=labels != self._labels)
            self._labels = labels
        self._casts.settle(access, layers_of(attached.values()), device)

    def take_all(self, patched: Collection[Attachment]) -> None:
        """Takes the short way from all layers without LoRAs; `patched` are the attachments on the others."""
        self._casts.take_all(layers_of(patched))


def layers_of(attachments: Collection[Attachment]) -> set[torch.nn.Module]:
    """Returns the layers that attachments are on."""
    return {one.site.layer for one in attachments}
