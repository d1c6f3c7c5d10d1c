"""Units of memory, in bytes. They are binary, as in every program that shows VRAM and RAM: a MB is 2**20 bytes."""

from __future__ import annotations

MB = 1 << 20
GB = 1 << 30

FP32_BYTES = 4
"""Bytes of one fp32 number."""
