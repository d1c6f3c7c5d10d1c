"""A LoRA file that Neo has not read, as Neo's `load_networks` looks at it.

Neo looks at the names before it hands a file over, and takes the file apart where it finds kohya's prefix with two underscores.

Source: Neo's `extensions-builtin/sd_forge_lora/networks.py` (`load_networks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...errors import FileFormatError
from ..webui.lora_files import LazyState


class UnreadFile(LazyState):
    """The names come from the file, with the prefix as Neo spells it; a file without a readable header has none."""

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """The tensors, which Neo reads now if it has not yet."""
        return {_spelled(name): tensor for name, tensor in super().state.items()}

    def __iter__(self) -> Iterator[str]:
        try:
            return iter([_spelled(name) for name in self.names])
        except FileFormatError:
            # The guard refuses it with a sentence; an error here would leave out all LoRAs of the prompt.
            return iter([])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def for_host(self) -> dict[str, torch.Tensor]:
        """Returns what Neo's own reader takes: it pops what it has read."""
        return self.copy()


def _spelled(name: str) -> str:
    return name.replace("lora_unet__", "lora_unet_", 1) if name.startswith("lora_unet__") else name
