"""Decodes GGUF formats with blocks of 256 values.

Source: the ggml block structures (`block_q2_K` and so on). A block has 8 groups of 32 values or 16 groups of 16. A
group has a small integer scale, multiplied by the block's fp16 d. In Q2_K, Q4_K and Q5_K it also has a small integer
minimum, multiplied by the block's fp16 dmin. value = (d * scale) * (q - centre), or (d * scale) * q - dmin * minimum.
All products are exact in fp32 (at most 24 significant bits), so only the subtraction rounds.
"""

from __future__ import annotations

import torch

from .gguf_blocks import BlockDecoder, iq4_values, read_fp16, read_fp16_pair, split_last, unpack_bits


class Q2KDecoder(BlockDecoder):
    """16 bytes of scale (low nibble) and minimum (high), 64 of 2-bit values, d, dmin."""

    format = "Q2_K"
    block = 256
    block_bytes = 84

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        small, packed = blocks[..., :16], blocks[..., 16:80]
        d, dmin = read_fp16_pair(blocks[..., 80:])
        index = _two_bits(packed).float()
        return index.mul_(_column(d * (small & 15))).sub_(_column(dmin * (small >> 4)))


class Q3KDecoder(BlockDecoder):
    """32 bytes of third bits (set: add 4), 64 of 2-bit values, 12 of 6-bit scales with centre 32, d; values' centre 4."""

    format = "Q3_K"
    block = 256
    block_bytes = 110

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        third, packed, small, d = torch.split(blocks, [32, 64, 12, 2], -1)
        # Bit g of byte i belongs to value i of the g-th 32.
        third = split_last(unpack_bits(third, 1, -2).flatten(-2), 16, 16)
        index = _two_bits(packed).bitwise_or_(third << 2).float().sub_(4)
        # Low four bits: 8 bytes, scales 0..7 in the low nibbles. High two bits: 4 bytes, scale g in field g // 4 of byte g % 4.
        scale = unpack_bits(small[..., :8], 4, -2).flatten(-2) | (unpack_bits(small[..., 8:], 2, -2).flatten(-2) << 4)
        return index.mul_(_column(scale.float().sub_(32).mul_(read_fp16(d))))


class Q4KDecoder(BlockDecoder):
    """d, dmin, 12 bytes of scales and minima, 128 of nibbles: 32 bytes hold a group (low) and the next (high)."""

    format = "Q4_K"
    block = 256
    block_bytes = 144

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        scale, minimum = _scales_and_minima(blocks[..., :16])
        return _nibble_groups(blocks[..., 16:]).float().mul_(_column(scale)).sub_(_column(minimum))


class Q5KDecoder(BlockDecoder):
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit g of byte i belongs to value i of group g."""

    format = "Q5_K"
    block = 256
    block_bytes = 176

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        scale, minimum = _scales_and_minima(blocks[..., :16])
        index = _nibble_groups(blocks[..., 48:]).bitwise_or_(unpack_bits(blocks[..., 16:48], 1, -2) << 4)
        return index.float().mul_(_column(scale)).sub_(_column(minimum))


class Q6KDecoder(BlockDecoder):
    """128 bytes of low nibbles, 64 of high two bits, 16 signed scales, d; centre 32.

    Each half of the block is stored separately. 64 bytes have values 0..63 in the low and 64..127 in the high nibbles.
    32 bytes have value i in field i // 32.
    """

    format = "Q6_K"
    block = 256
    block_bytes = 210

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        low, high, small, d = torch.split(blocks, [128, 64, 16, 2], -1)
        index = split_last(unpack_bits(split_last(low, 2, 64), 4, -2).flatten(-3), 16, 16)
        index.bitwise_or_(_two_bits(high) << 4)
        return index.float().sub_(32).mul_(_column(small.view(torch.int8).float().mul_(read_fp16(d))))


class IQ4XSDecoder(BlockDecoder):
    """d, 8 high two bits of the scales, 8 low nibbles of them (centre 32), 8 groups of 32 indices as in IQ4_NL."""

    format = "IQ4_XS"
    block = 256
    block_bytes = 136

    def _block_values(self, blocks: torch.Tensor) -> torch.Tensor:
        d, high, low, packed = torch.split(blocks, [2, 2, 4, 128], -1)
        scale = unpack_bits(low, 4, -1).flatten(-2) | (unpack_bits(high, 2, -1).flatten(-2) << 4)
        index = unpack_bits(split_last(packed, 8, 16), 4, -2).flatten(-2)
        return iq4_values(index).mul_(_column(scale.float().sub_(32).mul_(read_fp16(d))))


def _column(of_groups: torch.Tensor) -> torch.Tensor:
    return of_groups.unsqueeze(-1)


def _two_bits(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks 64 bytes to `(..., 16, 16)`. Each half holds 128 values, value i in field i // 32 of byte i % 32."""
    return split_last(unpack_bits(split_last(packed, 2, 32), 2, -2).flatten(-3), 16, 16)


def _nibble_groups(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks 128 bytes to `(..., 8, 32)`."""
    return unpack_bits(split_last(packed, 4, 32), 4, -2).flatten(-3, -2)


def _scales_and_minima(head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns d * scale and dmin * minimum of the 8 groups, from the first 16 bytes of a Q4_K or Q5_K block.

    After d and dmin follow, 4 bytes each: scales 0..3, minima 0..3, and low nibbles of scales 4..7 (low) and minima
    4..7 (high). Scales and minima 0..3 use six bits; their upper two bits are the high bits of 4..7.
    """
    d, dmin = read_fp16_pair(head[..., :4])
    first_scales, first_minima, nibbles = torch.split(head[..., 4:], 4, -1)
    scale = torch.cat([first_scales & 63, (nibbles & 15) | (first_scales >> 6 << 4)], -1)
    minimum = torch.cat([first_minima & 63, (nibbles >> 4) | (first_minima >> 6 << 4)], -1)
    return d * scale, dmin * minimum
