"""What the layers of Forge and Forge Neo have in common when they are called with their weight as it is stored."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from ...patching.fused import is_one_token
from ...weights.storage import FP8_DTYPES
from .stored_rows import is_bnb, is_gguf, stored_bias


def is_hosts_own(kind: type) -> bool:
    """Returns True if a class of layers computes by its host's code, and no other program has replaced its `forward`."""
    forward = kind.__dict__.get("forward")
    return forward is not None and forward.__module__ == kind.__module__


def is_low_bit(weight: torch.Tensor) -> bool:
    """Returns True for plain fp8, GGUF blocks and the 4-bit formats of bitsandbytes."""
    return is_gguf(weight) or hasattr(weight, "bnb_quantized") or weight.dtype in FP8_DTYPES


def streams_of(operations: ModuleType) -> Callable[[], bool]:
    """Returns what tells whether the host brings swapped weights to the card on a stream of its own."""
    stream = vars(operations).get("stream")
    found: Callable[[], bool] = (lambda: False) if stream is None else stream.should_use_stream
    return found


def is_in_reach(weight: torch.Tensor, x: torch.Tensor, is_streaming: Callable[[], bool]) -> bool:
    """Returns True for a weight that lies where the input does, or comes there from RAM on the stream of the forward pass."""
    device = weight.device
    return device == x.device or (device.type == "cpu" and not is_streaming())


def goes_by_vector(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Returns True for a single token on a 4-bit weight: bitsandbytes multiplies with the stored numbers then.

    So does the guard, with the LoRAs in the product, unless that is switched off (`FusedChoice.multiplies_tokens`).
    """
    return is_bnb(weight) and is_one_token(x)


def bias_for(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Returns the bias as a layer of theirs adds it to a product with `x`; None if it has none."""
    bias = layer._parameters.get("bias")
    if bias is None or (bias.dtype is x.dtype and bias.device == x.device and not hasattr(bias, "gguf_cls")):
        return bias
    stored = stored_bias(layer)
    return None if stored is None else stored.to(x.device, x.dtype, non_blocking=True)
