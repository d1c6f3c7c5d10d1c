"""Limits that every plan keeps to."""

from __future__ import annotations

from ..units import GB

RAM_FLOOR_BYTES = 2 * GB
"""RAM that is left to the system. Below it Windows starts to use the page file."""
