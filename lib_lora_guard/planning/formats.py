"""Computes what would make room for a model: smaller formats, a smaller image, fewer LoRAs. Pure.

Bytes per value are those of a model in Forge. GGUF counts after baking (`planning.gguf_baked`), NF4 with one fp32 scale
for 64 values (bitsandbytes' block size). Only matrices are stored in blocks; convolutions, norms and biases stay in 16
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .gguf_baked import value_bytes

if TYPE_CHECKING:  # adapters need torch, and the replay does without
    from ..adapters.base import Shape

WIDE_BYTES = 2
NF4_BLOCK = 64
MATRIX_BYTES: Mapping[str, float] = {
    "GGUF Q8_0": value_bytes("Q8_0"),
    "fp8": 1.0,
    "GGUF Q6_K": value_bytes("Q6_K"),
    "GGUF Q5_K": value_bytes("Q5_K"),
    "GGUF Q4_K": value_bytes("Q4_K"),
    "NF4": 1 / 2 + 4 / NF4_BLOCK,
}
"""Bytes per value of common model formats, the closest to 16 bit first."""

LEAST_PICTURE = 512
"""No smaller side is advised: the models produce bad images below it."""
STEP_PIXELS = 64
SHRINKS = (7 / 8, 3 / 4, 5 / 8, 1 / 2)


@dataclass(frozen=True)
class Fit:
    """A format, and the bytes that the model and everything beside it need in it."""

    format: str
    need_bytes: int


@dataclass(frozen=True)
class Smaller:
    """An image size, and the bytes that a step saves with it."""

    width: int
    height: int
    saved_bytes: int


def model_bytes(shapes: Mapping[str, Shape], form: str) -> int:
    """Returns the size of a model in one of MATRIX_BYTES. fp8 holds all parameters in 8 bit.

    Raises:
        KeyError: `form` is another format.
    """
    per_value = MATRIX_BYTES[form]
    total = 0.0
    for shape in shapes.values():
        values = 1
        for size in shape:
            values *= size
        total += values * (per_value if len(shape) == 2 or form == "fp8" else WIDE_BYTES)
    return int(total)


def that_fit(shapes: Mapping[str, Shape], now_bytes: int, beside_bytes: int, total_bytes: int) -> list[Fit]:
    """Returns the formats in which the model fits, the closest to 16 bit first.

    Args:
        shapes: The model's parameters.
        now_bytes: Its present size; larger formats are left out.
        beside_bytes: Memory needed beside the weights.
        total_bytes: Memory of the device.
    """
    sizes = {form: model_bytes(shapes, form) for form in MATRIX_BYTES}
    return [
        Fit(form, size + beside_bytes)
        for form, size in sizes.items()
        if size < now_bytes and size + beside_bytes <= total_bytes
    ]


def smaller_picture(
    width: int, height: int, step_bytes: Callable[[int, int], int], missing_bytes: int
) -> Smaller | None:
    """Returns the largest image of about the same proportions whose step needs `missing_bytes` less; None if there is
    none.

    Args:
        width: Present width in pixels.
        height: Present height in pixels.
        step_bytes: Returns the need of a step by width and height.
        missing_bytes: Bytes to save.
    """
    now = step_bytes(width, height)
    for shrink in SHRINKS:
        wide, high = (int(side * shrink) // STEP_PIXELS * STEP_PIXELS for side in (width, height))
        if min(wide, high) < LEAST_PICTURE:
            return None
        saved = now - step_bytes(wide, high)
        if saved >= missing_bytes:
            return Smaller(wide, high, saved)
    return None


def to_leave_out(sizes: Mapping[str, int], missing_bytes: int) -> tuple[Sequence[str], int]:
    """Returns the fewest LoRAs that free `missing_bytes`, and their size; all of them if they do not suffice.

    `sizes`: bytes by the LoRA's name.
    """
    names, saved = [], 0
    for name, size in sorted(sizes.items(), key=lambda one: -one[1]):
        if saved >= missing_bytes or size <= 0:
            break
        names.append(name)
        saved += size
    return names, saved
