"""A linear layer whose weight is stored by a codec and decoded for every forward pass. Needs neither host nor GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import FileFormatError, ModeError
from .codec import AnyParts, Codec, Decoder, Parts, PlainCodec
from .storage import Storage


class StoredLinear(torch.nn.Module):
    """`y = x @ decode(weight)^T + bias`. Inference only.

    `weight_terms`: set by the guard, applied to the decoded weight of each forward pass (see patching.on_the_fly).
    """

    def __init__(self, codec: Codec, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._hold(codec, codec.encode(weight), bias)

    @classmethod
    def from_parts(
        cls, decoder: Decoder, parts: AnyParts, shape: Sequence[int], bias: torch.Tensor | None = None
    ) -> StoredLinear:
        """A layer that holds a weight of `shape` (out, in) as a file stores it; the parts are kept, not copied.

        Raises FileFormatError for parts that are not of `shape`.
        """
        found = decoder.shape_of(parts)
        if found != tuple(shape):
            raise FileFormatError(f"{decoder.format}: expected a weight of {list(shape)}, found {list(found)}")
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        if isinstance(decoder, PlainCodec):
            # As numbers, not bytes: then it is a wide weight like any other.
            parts = {"data": decoder.typed(parts["data"])}
        layer._hold(decoder, dict(parts), bias)
        return layer

    def _hold(self, codec: Decoder, parts: Parts, bias: torch.Tensor | None) -> None:
        self.codec = codec
        self.out_features, self.in_features = codec.shape_of(parts)
        self._names = tuple(parts)
        for name, value in parts.items():
            self.register_parameter(
                "weight" if name == "data" else f"weight_{name}", torch.nn.Parameter(value, requires_grad=False)
            )
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.weight_terms: object | None = None

    def parts(self) -> Parts:
        return {name: getattr(self, "weight" if name == "data" else f"weight_{name}").data for name in self._names}

    def storage(self) -> Storage:
        size = sum(part.numel() * part.element_size() for part in self.parts().values())
        wide = self.parts()["data"].dtype in (torch.bfloat16, torch.float16, torch.float32)
        return Storage(self.codec.format, (self.out_features, self.in_features), size, wide)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        return self.codec.decode(self.parts(), dtype)

    def decode_rows(self, start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows `start` to `start + length` alone. Raises ValueError for rows that the weight does not have."""
        return self.codec.decode_rows(self.parts(), start, length, dtype)

    def store(self, weight: torch.Tensor) -> None:
        """Encodes `weight` into the place of the present one (the merging way; low-bit formats round it).

        Raises ModeError where the format can only be decoded.
        """
        if not isinstance(self.codec, Codec):
            raise ModeError(
                f"stored as {self.codec.format}, which can be read but not made here; nothing can be merged into it"
            )
        self.put(self.codec.encode(weight))

    def put(self, parts: Parts) -> None:
        """Replaces the stored parts."""
        for name, value in parts.items():
            parameter: torch.nn.Parameter = getattr(self, "weight" if name == "data" else f"weight_{name}")
            parameter.data = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.decode(x.dtype)
        if self.weight_terms is not None:
            weight = self.weight_terms.apply(weight, self.weight)  # type: ignore[attr-defined]  # WeightTerms; naming it would be an import cycle
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
