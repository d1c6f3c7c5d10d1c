"""Access to the CUDA allocator of the running torch. No other module calls torch's private functions for it.

Facts: `torch/cuda/memory.py`; pytorch issue 106660 (the threshold); experiments with torch 2.11 on an H200 and
2.12.1+cu130.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..lazy_torch import torch

_SETTERS = ("_cuda_cudaCachingAllocator_set_allocator_settings", "_accelerator_setAllocatorSettings")
"""Functions of `torch._C`: up to 2.8, and since 2.9. If both exist, the CUDA function is preferred: it surely reaches
the CUDA allocator.
"""

_PROBE_STREAMS = 4


def setter() -> Callable[[str], None] | None:
    """Returns torch's function that applies an allocator string at run time; None if this torch has none."""
    return next((getattr(torch._C, name) for name in _SETTERS if hasattr(torch._C, name)), None)


class TorchAllocator:
    """The allocator of the running torch. Only for machines whose `device` is "cuda" and whose `backend` is "native"."""

    def write(self, text: str) -> None:
        """Applies an allocator string.

        Raises:
            RuntimeError: torch refuses the string, or has no function for it. A part of the string may be in effect by
                then.
            ValueError: torch refuses the string; as above.
        """
        write = setter()
        if write is None:
            raise RuntimeError("this torch has no function for allocator settings")
        write(text)

    def read(self) -> Mapping[str, Any]:
        """Returns torch's settings: the last string under CUDA_VARIABLE, and values by name; empty if torch does not
        report them.

        Takes milliseconds, because torch lists all memory with it: not for every step.
        """
        settings: Mapping[str, Any] = _snapshot().get("allocator_settings", {})
        return settings

    def takes_expandable(self, device: torch.device) -> bool | None:
        """Allocates 2 MB and returns whether they came from an expandable segment; None if only cached memory was used.

        A new stream has no cached memory, unless torch reuses a stream that other code has used. Then the next one is
        tried.

        Raises:
            torch.OutOfMemoryError: There is no room for 2 MB.
            RuntimeError: The driver refuses.
        """
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
        """Caps this process at NEAR_WHOLE_CARD of the card and returns the share it had before; None if it was no
        higher.

        torch collects garbage only in a process with a cap (issue 106660). A cap of the whole card does not count (seen
        on torch 2.11). The lost hundredth is less than the CUDA context and the desktop take anyway.
        """
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        # Older torch cannot report the share and starts without a cap.
        before = 1.0 if fraction is None else float(fraction(device))
        if before <= NEAR_WHOLE_CARD:
            return None
        torch.cuda.set_per_process_memory_fraction(NEAR_WHOLE_CARD, device)
        return before

    def lift_cap(self, fraction: float, device: torch.device) -> None:
        """Restores the share `fraction` that `cap_near_whole_card` returned, unless other code has set another one
        since.
        """
        now = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        if now is None or now(device) == NEAR_WHOLE_CARD:
            torch.cuda.set_per_process_memory_fraction(fraction, device)


NEAR_WHOLE_CARD = 0.99
"""The share of the card's memory that the cap allows."""


def _snapshot() -> dict[str, Any]:
    snapshot: dict[str, Any] = torch.cuda.memory._snapshot()
    return snapshot


def _segment_of(address: int) -> dict[str, Any]:
    segments: list[dict[str, Any]] = _snapshot()["segments"]
    return next((s for s in segments if s["address"] <= address < s["address"] + s["total_size"]), {})
