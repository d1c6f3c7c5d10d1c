"""Units of memory, in bytes."""

from __future__ import annotations

MB = 1 << 20
GB = 1 << 30

FP32_BYTES = 4
"""Of one number."""
