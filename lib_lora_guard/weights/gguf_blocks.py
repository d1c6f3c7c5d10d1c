"""Decodes GGUF formats with blocks of 32 values.

Source: the ggml block structures (`block_q4_0` and so on). A block begins with its fp16 scale d; in the "_1" types its
fp16 minimum m follows. value = d * (q - centre), or d * q + m. The two halves of a block share bytes: value i in the
low nibbles, value i + 16 in the high ones. Numbers are little-endian, as on all machines that torch supports.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from ..errors import FileFormatError
from .codec import AnyParts, Codec, Decoder, Parts, found

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of the 16 indices of IQ4_NL and IQ4_XS. Source: ggml, `kvalues_iq4nl`."""


class BlockDecoder(Decoder):
    """A format of whole blocks. `data` is `(rows, blocks per row * block_bytes)` in uint8: the bytes of the file."""

    @abstractmethod
    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        """Decodes `(rows, blocks, block_bytes)` bytes to fp32 `(rows, blocks, ...)` with `block` values per block, in
        order.
        """

    def shape_of(self, parts: AnyParts) -> tuple[int, int]:
        data = parts["data"]
        if data.dim() != 2 or data.dtype != torch.uint8 or data.shape[1] % self.block_bytes:
            raise FileFormatError(
                f"{self.format}: expected a matrix of uint8 whose rows are a multiple of {self.block_bytes} bytes, found "
                f"{found(data)}; the file is damaged or in another format"
            )
        return data.shape[0], data.shape[1] // self.block_bytes * self.block

    def _values(self, parts: AnyParts, start: int, length: int) -> torch.Tensor:
        data = parts["data"][start : start + length]
        blocks = split_last(data, data.shape[1] // self.block_bytes, self.block_bytes)
        return self._block_values(blocks).flatten(1)


def unpack_bits(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Splits every byte into its 8 / `bits` fields, lowest first, along a new dimension `dim`."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim)


def read_fp16(packed: torch.Tensor) -> torch.Tensor:
    """Reads the last dimension of `packed` as fp16 numbers, in fp32. `packed` may start at an odd address."""
    return packed.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def read_fp16_pair(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads the scale and the minimum (or its scale), each `(..., 1)` in fp32."""
    both = read_fp16(packed)
    return both[..., :1], both[..., 1:]


def split_last(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Returns a view with the last dimension split into `sizes`."""
    return x.view(*x.shape[:-1], *sizes)


def iq4_values(index: torch.Tensor) -> torch.Tensor:
    """Returns the fp32 levels of 4-bit indices, in the shape of `index`."""
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=index.device)
    return levels.index_select(0, index.flatten().int()).view(index.shape)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks `(rows, blocks, 16)` bytes to 32 indices per block."""
    return unpack_bits(packed, 4, -2).flatten(-2)


def _nibbles_and_fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks 5-bit indices, 32 per block, from 4 bytes of fifth bits (bit i belongs to value i) and 16 bytes of
    nibbles.
    """
    fifth = unpack_bits(packed[..., :4], 1, -1).flatten(-2)
    return _nibbles(packed[..., 4:]).bitwise_or_(fifth << 4)


class Q8_0Codec(BlockDecoder, Codec):
    """d, 32 signed bytes."""

    format = "Q8_0"
    block = 32
    block_bytes = 34

    def encode(self, weight: torch.Tensor) -> Parts:
        blocks = self._blocks(weight)
        scale = (blocks.abs().amax(dim=2, keepdim=True) / 127).half()
        # Divide by the scale as fp16 stores it (subnormal ones too): decoding multiplies by that value.
        step = scale.float()
        step = torch.where(step == 0, torch.ones_like(step), step)
        values = (blocks / step).round().clamp(-127, 127).to(torch.int8)
        return {"data": torch.cat([scale.view(torch.uint8), values.view(torch.uint8)], 2).flatten(1)}

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks[..., 2:].view(torch.int8).float().mul_(read_fp16(blocks[..., :2]))


class Q4_0Codec(BlockDecoder, Codec):
    """d, 32 nibbles with centre 8."""

    format = "Q4_0"
    block = 32
    block_bytes = 18

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

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        return _nibbles(blocks[..., 2:]).float().sub_(8).mul_(read_fp16(blocks[..., :2]))


class Q4_1Decoder(BlockDecoder):
    """d, m, 32 nibbles."""

    format = "Q4_1"
    block = 32
    block_bytes = 20

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        scale, minimum = read_fp16_pair(blocks[..., :4])
        return _nibbles(blocks[..., 4:]).float().mul_(scale).add_(minimum)


class Q5_0Decoder(BlockDecoder):
    """d, 32 fifth bits, 32 nibbles; centre 16."""

    format = "Q5_0"
    block = 32
    block_bytes = 22

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        return _nibbles_and_fifth_bits(blocks[..., 2:]).float().sub_(16).mul_(read_fp16(blocks[..., :2]))


class Q5_1Decoder(BlockDecoder):
    """d, m, 32 fifth bits, 32 nibbles."""

    format = "Q5_1"
    block = 32
    block_bytes = 24

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        scale, minimum = read_fp16_pair(blocks[..., :4])
        return _nibbles_and_fifth_bits(blocks[..., 4:]).float().mul_(scale).add_(minimum)


class IQ4NLDecoder(BlockDecoder):
    """d, 32 nibbles that point into IQ4_LEVELS."""

    format = "IQ4_NL"
    block = 32
    block_bytes = 18

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        return iq4_values(_nibbles(blocks[..., 2:])).mul_(read_fp16(blocks[..., :2]))
