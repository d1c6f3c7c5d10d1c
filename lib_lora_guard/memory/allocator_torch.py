"""The running torch's CUDA allocator: the only place that knows its private functions.

Facts: `torch/cuda/memory.py`; pytorch issue 106660 (the threshold); torch 2.11 on an H200, 2.12.1+cu130 asked directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_SETTERS = ("_cuda_cudaCachingAllocator_set_allocator_settings", "_accelerator_setAllocatorSettings")
"""Of `torch._C`: up to 2.8, and from 2.9 on. Where there are both, CUDA's own is the one that surely reaches it."""

_PROBE_STREAMS = 4


def setter() -> Callable[[str], None] | None:
    """Torch's function that takes a whole string while torch runs; None where it has none."""
    return next((getattr(torch._C, name) for name in _SETTERS if hasattr(torch._C, name)), None)


class TorchAllocator:
    """What `apply` needs of torch. Only for machines whose `device` is "cuda" and whose `backend` is "native"."""

    def write(self, text: str) -> None:
        """Raises RuntimeError or ValueError for a string that torch does not take; part of it may hold by then."""
        write = setter()
        if write is None:
            raise RuntimeError("this torch has no function for allocator settings")
        write(text)

    def read(self) -> Mapping[str, Any]:
        """Torch's own view: the last string under CUDA_VARIABLE, and values by name; empty where torch does not tell.
        A list of all memory comes with it: milliseconds, not for every step."""
        settings: Mapping[str, Any] = _snapshot().get("allocator_settings", {})
        return settings

    def takes_expandable(self, device: torch.device) -> bool | None:
        """Takes 2 MB and looks what kind of segment they came from; None where only memory held before answered. A stream
        of its own has none of that, unless somebody used it: then another one. Raises torch's out-of-memory error, and
        RuntimeError where the driver refuses."""
        torch.cuda.empty_cache()
        try:
            for _ in range(_PROBE_STREAMS):
                known = {segment["address"] for segment in _snapshot()["segments"]}
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
                with torch.cuda.stream(stream):
                    probe = torch.empty(1, dtype=torch.uint8, device=device)
                segment = _segment_of(probe.data_ptr())
                del probe
                if segment.get("is_expandable"):
                    return True
                if segment and segment["address"] not in known:
                    return False
            return None
        finally:
            torch.cuda.empty_cache()

    def cap_near_whole_card(self, device: torch.device) -> float | None:
        """Torch collects only in a process whose memory is capped (issue 106660), and a cap at the whole card is none (seen
        on torch 2.11). The context and the desktop take more than the hundredth that is lost; a lower cap stays. Returns the
        share of the card before; None where it was low enough."""
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        # Older torch does not tell, and starts without a cap.
        before = 1.0 if fraction is None else float(fraction(device))
        if before <= NEAR_WHOLE_CARD:
            return None
        torch.cuda.set_per_process_memory_fraction(NEAR_WHOLE_CARD, device)
        return before

    def lift_cap(self, fraction: float, device: torch.device) -> None:
        """Gives back the share that `cap_near_whole_card` found, unless somebody has set another one since."""
        now = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        if now is None or now(device) == NEAR_WHOLE_CARD:
            torch.cuda.set_per_process_memory_fraction(fraction, device)


NEAR_WHOLE_CARD = 0.99


def _snapshot() -> dict[str, Any]:
    snapshot: dict[str, Any] = torch.cuda.memory._snapshot()
    return snapshot


def _segment_of(address: int) -> dict[str, Any]:
    segments: list[dict[str, Any]] = _snapshot()["segments"]
    return next((s for s in segments if s["address"] <= address < s["address"] + s["total_size"]), {})
