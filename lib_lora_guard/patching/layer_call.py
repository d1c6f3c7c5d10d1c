"""One call of a patched layer, and what to do when memory ends inside it."""

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
    """`x` is what the layer was called with, in the dtype of `output`; steps write into `output`."""

    key: str
    layer: Any
    x: torch.Tensor
    output: torch.Tensor
    shape: tuple[int, ...]
    """Shape of the weight."""
    said: set[str] = field(default_factory=set)
    """What has been said of this layer, for as long as its LoRAs stay: for `say_once`."""

    @property
    def has_other_memory(self) -> bool:
        """True where RAM is not what the layer has run out of."""
        return not lies_in_ram(self.output)

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2

    @property
    def channel_dim(self) -> int:
        """The dimension of `x` and `output` that the weight's columns and rows belong to."""
        return 1 - len(self.shape)

    def input_of(self, part: Slice | None) -> torch.Tensor:
        return self.x if part is None or part.dim == 0 else self.x.narrow(self.channel_dim, part.start, part.length)

    def output_of(self, part: Slice | None) -> torch.Tensor:
        if part is None or part.dim == 1:
            return self.output
        return self.output.narrow(self.channel_dim, part.start, part.length)

    def flat(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Input and output of a linear layer as `(tokens, features)`, without a copy of the input: what is no such view as a
        whole (Flux passes a part of the tokens of each picture) comes picture by picture. The output is made contiguous for
        it."""
        self.output = self.output.contiguous()
        yield from _flattened(self.x, self.output)

    def in_chunks(
        self, total: int, add: Callable[[int, int], None], otherwise: Callable[[int, int], None] | None = None
    ) -> None:
        """Runs `add(start, length)` over all tokens, in halves of halves where memory ends. `add` allocates before it
        writes, so that it can be run again. Where the smallest chunk is too much and RAM is another memory, `otherwise` gets
        all that is left."""
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
            # Out here the error, which held on to what had been allocated, is gone.
            length //= 2
            give_back_cached_memory()
            if length < SMALLEST_CHUNK_TOKENS and otherwise is not None:
                otherwise(start, total - start)
                return

    def say_once(self, sentence: str) -> None:
        """Logs a sentence about this layer, the first time that it is true of it."""
        if sentence not in self.said:
            self.said.add(sentence)
            say(log, logging.INFO, sentence, key=self.key)

    def out_of_memory(self) -> LayerError:
        return LayerError(about(self.key, Message("memory.layer" if self.is_linear else "memory.convolution")))


@contextlib.contextmanager
def naming_the_layer(key: str) -> Iterator[None]:
    """Where memory ends in the block, the error says in which layer. Every other error passes as it is."""
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
        # Two dimensions always are such a view.
        for part, result in zip(x, output, strict=True):
            yield from _flattened(part, result)
    else:
        yield rows, output.view(-1, output.shape[-1])
