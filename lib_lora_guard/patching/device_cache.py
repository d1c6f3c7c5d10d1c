"""Device copies of LoRA factors: made on first use, kept while the model is in use, dropped when it is unloaded.

On the CPU nothing is kept: a cast per call is cheap there and a second copy in RAM is what users run out of. The key
holds the stream, because Forge's Async swap makes weights on a stream of its own and a copy made on another one
would need an event per use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Key = tuple[torch.device, torch.dtype, int]


class DeviceCache(Generic[T]):
    def __init__(self) -> None:
        self._values: dict[Key, T] = {}

    def get(self, device: torch.device, dtype: torch.dtype, make: Callable[[], T]) -> T:
        """The value for this device, dtype and current stream; `make` runs outside inference mode."""
        if device.type == "cpu":
            return _outside_inference(make)
        key = (device, dtype, _stream_id(device))
        if key not in self._values:
            self._values[key] = _outside_inference(make)
        return self._values[key]

    def drop(self) -> None:
        self._values.clear()

    def __len__(self) -> int:
        return len(self._values)


def _outside_inference(make: Callable[[], T]) -> T:
    # A tensor made in inference mode can never again be changed outside it.
    with torch.inference_mode(False), torch.no_grad():
        return make()


def _stream_id(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.current_stream(device).cuda_stream)
    # Forge swaps on streams of its own on Intel's GPUs too.
    return int(torch.xpu.current_stream(device).sycl_queue) if device.type == "xpu" else 0
