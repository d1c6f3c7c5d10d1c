"""Sanity rules for the numbers that the host plans its memory with, applied before they do harm. Pure.

Each rule takes numbers and returns the number to use. If it differs, a `Finding` says which rule changed it, what was
wrong and what the user can do. No request exceeds the device, and no estimate is negative, infinite or NaN afterwards.
The causes, with the threads in which users reported them, are in docs/memory.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..messages import Message
from ..units import GB
from ..units import MB as MB
from .readings import trusted_free_bytes

EVERYTHING_BYTES = 1e29
"""From here on a request means "unload everything". Forge requests 1e30 bytes for it, which it printed as
953674316406250018963456.00 MB until 2024-08-21.
"""
SHRINKING_BYTES = 32 * MB
"""Forge lost 45 to 67 MB of a model with each change of a LoRA; rounding in the placement is less than a layer."""


@dataclass(frozen=True)
class Finding:
    """A rule that changed a number."""

    rule: str
    says: Message
    """The fault, what is done instead, and what the user can change."""


def request_bytes(asked: float, total_bytes: int) -> tuple[float, Finding | None]:
    """LG-R01 to LG-R03: checks a request for free memory on a device.

    Args:
        asked: The requested bytes.
        total_bytes: The size of the device.

    Returns:
        The bytes to free (`math.inf` for everything), and the finding.
    """
    if math.isnan(asked):
        return 0, Finding("LG-R03", Message("rule.not_a_number"))
    if asked >= EVERYTHING_BYTES:
        # The request is valid; only its number looks like a fault.
        return math.inf, Finding("LG-R01", Message("rule.everything"))
    if asked < 0:
        return 0, Finding("LG-R03", Message("rule.negative", {"asked_mb": asked / MB}))
    if asked > total_bytes:
        facts = {"asked_mb": asked / MB, "total_mb": total_bytes / MB}
        return total_bytes, Finding("LG-R02", Message("rule.above_total", facts))
    return asked, None


def inference_bytes(set_bytes: float, total_bytes: int) -> tuple[int, Finding | None]:
    """LG-R04: checks the bytes that the "GPU Weights" slider leaves for computing. They are negative if "Paste Prompt"
    sets the slider above the size of the card.
    """
    total_mb = total_bytes / MB
    if math.isnan(set_bytes) or math.isinf(set_bytes):
        return min(GB, total_bytes), Finding("LG-R04", Message("rule.slider_not_a_number", {"total_mb": total_mb}))
    facts = {"set_mb": (total_bytes - set_bytes) / MB, "left_mb": set_bytes / MB, "total_mb": total_mb}
    if set_bytes < 0:
        return 0, Finding("LG-R04", Message("rule.slider_above", facts))
    if set_bytes > total_bytes:
        return total_bytes, Finding("LG-R04", Message("rule.slider_below", facts))
    return int(set_bytes), None


def room_for_a_step(left_bytes: int, estimate_bytes: int, model: str) -> tuple[int, Finding | None]:
    """LG-R05: the placement must leave at least the model's own need for a step. Forge evicts for that need but places
    by the slider alone.
    """
    if estimate_bytes <= left_bytes:
        return left_bytes, None
    facts = {"model": model, "left_mb": left_bytes / MB, "needed_mb": estimate_bytes / MB}
    return estimate_bytes, Finding("LG-R05", Message("rule.step", facts))


def with_factors(need_bytes: int, factor_bytes: int) -> tuple[int, Finding | None]:
    """LG-R06: adds the LoRA factors on the device. Forge counts them only for "fp16 LoRA"."""
    if factor_bytes <= 0:
        return need_bytes, None
    return need_bytes + factor_bytes, Finding("LG-R06", Message("rule.factors", {"size_mb": factor_bytes / MB}))


def free_vram_bytes(torch_bytes: int, nvml_bytes: int | None) -> tuple[int, Finding | None]:
    """LG-R07: checks torch's free VRAM against NVML's.

    On Windows torch may report memory as free that other programs hold. Beyond it the driver uses system RAM, 5 to 30
    times slower. Both numbers include torch's unused blocks.
    """
    usable = trusted_free_bytes(torch_bytes, nvml_bytes)
    if nvml_bytes is None or usable is None or usable == torch_bytes:
        return max(0, torch_bytes), None
    facts = {"torch_mb": torch_bytes / MB, "nvml_mb": nvml_bytes / MB}
    return max(0, usable), Finding("LG-R07", Message("rule.disagreement", facts))


def ram_for(needed_bytes: int, fast_bytes: int, alive_bytes: int, what: str) -> Finding | None:
    """LG-R08: checks the RAM for a read or move that is about to start.

    Args:
        needed_bytes: The RAM it takes.
        fast_bytes: Above it the page file is used.
        alive_bytes: Above it the system ends the process.
        what: The operation, as a phrase.
    """
    facts = {
        "what": what,
        "needed_mb": needed_bytes / MB,
        "fast_mb": fast_bytes / MB,
        "alive_mb": alive_bytes / MB,
        "more_gb": math.ceil(max(0, needed_bytes - alive_bytes) / GB),
    }
    if needed_bytes > alive_bytes:
        return Finding("LG-R08", Message("rule.ram_refused", facts))
    if needed_bytes > fast_bytes:
        return Finding("LG-R08", Message("rule.ram_slow", facts))
    return None


def share_on_device(before_bytes: int, after_bytes: int, was_needed: bool, model: str) -> Finding | None:
    """LG-R09: reports that less of a model lies on the device than before, although no other model needed the room."""
    if was_needed or before_bytes - after_bytes < SHRINKING_BYTES:
        return None
    facts = {"model": model, "before_mb": before_bytes / MB, "after_mb": after_bytes / MB}
    return Finding("LG-R09", Message("rule.shrinking", facts))


def unload_request(has_changed: bool) -> Finding | None:
    """LG-R10: reports an unload of all models without a change of settings. Forge requests it whenever a page is loaded
    or a memory setting is touched.
    """
    return None if has_changed else Finding("LG-R10", Message("rule.nothing_changed"))
