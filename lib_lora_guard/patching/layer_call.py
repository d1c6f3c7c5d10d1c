"""One call of a patched layer, and the ways out when it runs out of memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters import Slice
from ..errors import LayerError, Message, about
from ..memory.out_of_memory import give_back_cached_memory, is_out_of_memory
from ..messages import say
from .backup import lies_in_ram

log = logging.getLogger(__name__)

SMALLEST_CHUNK_TOKENS = 256
"""Below this a chunk saves nothing: its rank activation is smaller than one allocation of the allocator (2 MB)."""


@dataclass
class LayerCall:
    """Input and output of one call. `x` is the layer's input in the dtype of `output`; steps write into `output`."""

    key: str
    layer: Any
    x: torch.Tensor
    output: torch.Tensor
    shape: tuple[int, ...]
    """Shape of the weight."""
    said: set[str] = field(default_factory=set)
    """The sentences that were logged about this layer since its LoRAs came, for `say_once`."""

    @property
    def has_other_memory(self) -> bool:
        """True if the layer runs on a device, so that RAM is another memory."""
        return not lies_in_ram(self.output)

    @property
    def is_linear(self) -> bool:
        """True for a linear layer, False for a convolution."""
        return len(self.shape) == 2

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels, counted from the end: the weight's columns in `x`, its rows in `output`."""
        return 1 - len(self.shape)

    def input_of(self, part: Slice | None) -> torch.Tensor:
        """Returns the input channels that belong to `part` of the weight."""
        return self.x if part is None or part.dim == 0 else self.x.narrow(self.channel_dim, part.start, part.length)

    def output_of(self, part: Slice | None) -> torch.Tensor:
        """Returns a view of the output channels that belong to `part` of the weight."""
        if part is None or part.dim == 1:
            return self.output
        return self.output.narrow(self.channel_dim, part.start, part.length)

    def flat(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields input and output of a linear layer as `(tokens, features)`, without a copy of the input.

        An input that is no such view as a whole comes picture by picture: Flux passes a part of each picture's tokens.
        The output is made contiguous.
        """
        self.output = self.output.contiguous()
        yield from _flattened(self.x, self.output)

    def in_chunks(
        self, total: int, add: Callable[[int, int], None], otherwise: Callable[[int, int], None] | None = None
    ) -> None:
        """Runs `add(start, length)` over all tokens. Out of memory, the chunks are halved.

        Args:
            total: The number of tokens.
            add: Adds the product for some tokens. It allocates before it writes, so that it can be run again.
            otherwise: Gets all remaining tokens if even the smallest chunk fails and RAM is another memory.

        Raises:
            LayerError: Even the smallest chunk finds no memory.
        """
        start, length = 0, total
        while start < total:
            try:
                add(start, min(length, total - start))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if otherwise is not None and not self.has_other_memory:
                    otherwise = None
                if length // 2 < SMALLEST_CHUNK_TOKENS and otherwise is None:
                    why = Message("memory.slices", {"tokens": SMALLEST_CHUNK_TOKENS})
                    raise LayerError(about(self.key, why)) from error
            else:
                start += length
                continue
            # Outside the handler the error no longer holds what was allocated.
            length //= 2
            give_back_cached_memory()
            if length < SMALLEST_CHUNK_TOKENS and otherwise is not None:
                otherwise(start, total - start)
                return

    def say_once(self, sentence: str) -> None:
        """Logs a sentence about this layer, the first time only. `sentence` is its key in the catalogue."""
        if sentence not in self.said:
            self.said.add(sentence)
            say(log, logging.INFO, sentence, key=self.key)

    def out_of_memory(self) -> LayerError:
        """Returns the error for a layer that finds no memory."""
        return LayerError(about(self.key, Message("memory.layer" if self.is_linear else "memory.convolution")))


@contextlib.contextmanager
def naming_the_layer(key: str) -> Iterator[None]:
    """Turns an out-of-memory error in the block into one that names the layer. Other errors pass unchanged.

    Raises:
        LayerError: The block ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise LayerError(about(key, Message("memory.layer"))) from error


def _flattened(x: torch.Tensor, output: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        # This ends: two dimensions always are such a view.
        for part, result in zip(x, output, strict=True):
            yield from _flattened(part, result)
    else:
        yield rows, output.view(-1, output.shape[-1])
