"""GGUF block formats as they lie in the file: Q8_0 and Q4_0.

Source: the GGUF / ggml format description (`block_q8_0`, `block_q4_0`): 32 values a block, an fp16 scale first; Q8_0
has 32 signed bytes, Q4_0 has 16 bytes with values 0..15 that stand for -8..7, the first half of the block in the low
nibbles, the second half in the high ones.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .codec import Codec, Parts


class Q8_0Codec(Codec):
    format: ClassVar[str] = "Q8_0"
    block: ClassVar[int] = 32

    def encode(self, weight: torch.Tensor) -> Parts:
        blocks = self._blocks(weight)
        scale = (blocks.abs().amax(dim=2, keepdim=True) / 127).half()
        # What is divided by is what will be multiplied with: the scale as fp16 holds it, subnormal ones included.
        step = scale.float()
        step = torch.where(step == 0, torch.ones_like(step), step)
        values = (blocks / step).round().clamp(-127, 127).to(torch.int8)
        return {"data": torch.cat([scale.view(torch.uint8), values.view(torch.uint8)], 2).flatten(1)}

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        blocks = _split(parts["data"], 2 + self.block)
        scale = blocks[..., :2].contiguous().view(torch.float16).to(dtype)
        return blocks[..., 2:].contiguous().view(torch.int8).to(dtype).mul_(scale).flatten(1)


class Q4_0Codec(Codec):
    format: ClassVar[str] = "Q4_0"
    block: ClassVar[int] = 32

    def encode(self, weight: torch.Tensor) -> Parts:
        blocks = self._blocks(weight)
        # The value of the largest magnitude becomes exactly -8: the format's range is not symmetric.
        largest = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
        scale = (largest / -8).half()
        step = scale.float()
        step = torch.where(step == 0, torch.ones_like(step), step)
        index = (blocks / step + 8.5).floor().clamp(0, 15).to(torch.uint8)
        half = self.block // 2
        packed = index[..., :half] | (index[..., half:] << 4)
        return {"data": torch.cat([scale.view(torch.uint8), packed], 2).flatten(1)}

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        blocks = _split(parts["data"], 2 + self.block // 2)
        scale = blocks[..., :2].contiguous().view(torch.float16).to(dtype)
        packed = blocks[..., 2:]
        index = torch.cat([packed & 15, packed >> 4], 2).to(dtype)
        return index.sub_(8).mul_(scale).flatten(1)


def _split(data: torch.Tensor, block_bytes: int) -> torch.Tensor:
    return data.view(data.shape[0], -1, block_bytes)
