"""One interface for the ways a weight can be stored in a few bits: encode once, decode by rows as often as needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

Parts = dict[str, torch.Tensor]


class Codec(ABC):
    """`encode` gives named tensors, `data` among them; the first dimension of each is the weight's rows.

    `decode` takes the same parts, or the same rows of all of them, and gives the values in `dtype`.
    """

    format: ClassVar[str]
    block: ClassVar[int] = 1
    """The number of columns must be a multiple of this."""

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> Parts:
        """Parts of a 2-D float weight. Raises ValueError where its columns do not fill whole blocks."""

    @abstractmethod
    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """The weight, `(rows, columns)` in `dtype`, where the parts lie."""

    def _blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """`(rows, blocks, block)` in fp32."""
        if weight.dim() != 2 or weight.shape[1] % self.block:
            raise ValueError(
                f"{self.format} needs a matrix whose columns are a multiple of {self.block}, found {list(weight.shape)}"
            )
        return weight.float().reshape(weight.shape[0], -1, self.block)


class PlainCodec(Codec):
    """bf16 or another dtype of torch's, without a scale."""

    def __init__(self, dtype: torch.dtype, format_name: str) -> None:
        self.dtype = dtype
        self.format = format_name  # type: ignore[misc]  # fixed per class elsewhere, per instance here

    def encode(self, weight: torch.Tensor) -> Parts:
        return {"data": weight.to(self.dtype)}

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        return parts["data"].to(dtype)


class ScaledFp8Codec(Codec):
    """float8_e4m3fn with one fp32 scale a row, so that the largest value of the row is fp8's largest (448).

    Source: torch.finfo(torch.float8_e4m3fn); "FP8 Formats for Deep Learning", arXiv 2209.05433.
    """

    format: ClassVar[str] = "fp8"

    def encode(self, weight: torch.Tensor) -> Parts:
        weight = weight.float()
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
        return {"data": (weight / scale).to(torch.float8_e4m3fn), "scale": scale}

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        # In fp32, rounded once: fp16 has no room for the scale of a row of small values.
        return parts["data"].float().mul_(parts["scale"]).to(dtype)
