"""Measurements for the demo: memory peaks of this process, hashes of a model, and the share of a LoRA that a layer
shows.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from ..units import MB


@dataclass
class Measured:
    """Wall-clock seconds of one phase, and its peak RSS above the RSS at its start, in MB."""

    seconds: float = 0.0
    ram_peak_mb: float = 0.0


@contextmanager
def measured() -> Iterator[Measured]:
    """Yields a Measured and fills it when the block ends. RSS is sampled every 5 ms."""
    process = psutil.Process()
    _give_back_freed_memory()
    start_bytes = peak_bytes = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal peak_bytes
        while not done.wait(0.005):
            peak_bytes = max(peak_bytes, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    result = Measured()
    started = time.perf_counter()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - started
        done.set()
        thread.join()
        peak_bytes = max(peak_bytes, process.memory_info().rss)
        result.ram_peak_mb = (peak_bytes - start_bytes) / MB


def _give_back_freed_memory() -> None:
    gc.collect()
    if sys.platform == "linux":
        # Otherwise a phase could reuse memory that the previous one has freed but not returned to the system.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def model_bits(model: torch.nn.Module) -> str:
    """Returns a hash of every parameter's stored bytes."""
    digest = hashlib.blake2b()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.data.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def answers(model: torch.nn.Module, layers: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Returns each layer's output for a fixed random input `(64, in)`."""
    return {
        name: model.get_submodule(name)(_probe_input(index, inputs))
        for index, (name, (_, inputs)) in enumerate(layers.items())
    }


def share_present(
    without: Mapping[str, torch.Tensor], with_lora: Mapping[str, torch.Tensor], deltas: Mapping[str, torch.Tensor]
) -> float:
    """Returns the share of a LoRA that the layers' outputs show, as the mean over layers: 1 is all of it, 0 none.

    For each layer, the change of its output is projected on the change that the true delta makes.

    Args:
        without: Outputs `(64, out)` without the LoRA, by layer.
        with_lora: The same with the LoRA.
        deltas: The true deltas `(out, in)`, fp64.
    """
    shares = []
    for index, (name, delta) in enumerate(deltas.items()):
        true = _probe_input(index, delta.shape[1]).double() @ delta.T
        found = with_lora[name].double() - without[name].double()
        shares.append(float((found * true).sum() / (true * true).sum()))
    return sum(shares) / len(shares)


def _probe_input(index: int, size: int) -> torch.Tensor:
    return torch.randn(64, size, generator=torch.Generator().manual_seed(index))
