"""Device copies of LoRA factors: made on first use, kept while the model is in use, dropped when it is unloaded.

On the CPU nothing is kept: a cast per call is cheap there, and RAM for second copies is scarce. The key holds the
stream: Forge's Async swap makes weights on a stream of its own, and a copy from another stream would need an event
per use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""As torch's compiled code asks: without the object of `torch.cuda.current_stream`, which takes longer than all else in `known`."""

Key = tuple[torch.device, torch.dtype, int]
"""Device, dtype and stream."""


class DeviceCache(Generic[T]):
    """Values by device, dtype and stream; `len` counts those that are kept."""

    def __init__(self) -> None:
        self._values: dict[Key, T] = {}

    def get(self, device: torch.device, dtype: torch.dtype, make: Callable[[], T]) -> T:
        """Returns the value for this device, dtype and current stream. `make` makes it, outside inference mode."""
        if device.type == "cpu":
            return _outside_inference(make)
        key = (device, dtype, _stream_id(device))
        value = self._values.get(key)
        if value is None:
            # Another thread may drop all values meanwhile.
            value = self._values[key] = _outside_inference(make)
        return value

    def known(self, device: torch.device, dtype: torch.dtype) -> T | None:
        """Returns the value if it is kept. Makes nothing."""
        if not self._values or device.type == "cpu":
            return None
        return self._values.get((device, dtype, _stream_id(device)))

    def drop(self) -> None:
        """Frees all values."""
        self._values.clear()

    def __len__(self) -> int:
        return len(self._values)


def _outside_inference(make: Callable[[], T]) -> T:
    # A tensor made in inference mode cannot be changed outside it. Not by `inference_mode.outside_inference`: a compiled
    # model asks as well, and Dynamo cannot trace that one.
    with torch.inference_mode(False), torch.no_grad():
        return make()


def _stream_id(device: torch.device) -> int:
    if device.type == "cuda":
        if _raw_stream is not None and device.index is not None:
            return int(_raw_stream(device.index))
        return int(torch.cuda.current_stream(device).cuda_stream)
    # Forge uses streams for swapping on Intel's GPUs too.
    return int(torch.xpu.current_stream(device).sycl_queue) if device.type == "xpu" else 0
