"""A linear layer that decodes its stored weight in every forward pass. Needs neither host nor GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import FileFormatError, ModeError
from .codec import AnyParts, Codec, Decoder, Parts, PlainCodec
from .storage import Storage


class StoredLinear(torch.nn.Module):
    """`y = x @ decode(weight)^T + bias`. For inference only.

    `weight_terms` is set by the guard and applied to the decoded weight in each forward pass (see patching.on_the_fly).
    """

    def __init__(self, codec: Codec, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Encodes `weight` `(out, in)`.

        Args:
            codec: The storage format.
            weight: The float weight.
            bias: `(out,)`, or None.
        """
        super().__init__()
        self._set_parts(codec, codec.encode(weight), bias)

    @classmethod
    def from_parts(
        cls, decoder: Decoder, parts: AnyParts, shape: Sequence[int], bias: torch.Tensor | None = None
    ) -> StoredLinear:
        """Makes a layer from a weight as a file stores it. The parts are kept without a copy.

        Args:
            decoder: The storage format.
            parts: The weight's stored tensors.
            shape: The expected shape `(out, in)`.
            bias: `(out,)`, or None.

        Raises:
            FileFormatError: The parts do not hold a weight of `shape`.
        """
        found = decoder.shape_of(parts)
        if found != tuple(shape):
            raise FileFormatError(f"{decoder.format}: expected a weight of {list(shape)}, found {list(found)}")
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        if isinstance(decoder, PlainCodec):
            # Converted from bytes to numbers, so that it counts as a wide weight.
            parts = {"data": decoder.typed(parts["data"])}
        layer._set_parts(decoder, dict(parts), bias)
        return layer

    def _set_parts(self, codec: Decoder, parts: Parts, bias: torch.Tensor | None) -> None:
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
        """Returns the stored tensors, without a copy."""
        return {name: getattr(self, "weight" if name == "data" else f"weight_{name}").data for name in self._names}

    def storage(self) -> Storage:
        """Returns the storage of the weight."""
        size = sum(part.numel() * part.element_size() for part in self.parts().values())
        wide = self.parts()["data"].dtype in (torch.bfloat16, torch.float16, torch.float32)
        return Storage(self.codec.format, (self.out_features, self.in_features), size, wide)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight, `(out, in)` in `dtype`."""
        return self.codec.decode(self.parts(), dtype)

    def decode_rows(self, start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns the rows from `start` to `start + length` in `dtype`.

        Raises:
            ValueError: The weight does not have these rows.
        """
        return self.codec.decode_rows(self.parts(), start, length, dtype)

    def store(self, weight: torch.Tensor) -> None:
        """Encodes `weight` and replaces the present one (a merge; low-bit formats round it).

        Raises:
            ModeError: The format can only be decoded.
        """
        if not isinstance(self.codec, Codec):
            raise ModeError(
                f"stored as {self.codec.format}, which can be read but not made here; nothing can be merged into it"
            )
        self.put(self.codec.encode(weight))

    def put(self, parts: Parts) -> None:
        """Replaces the stored tensors."""
        for name, value in parts.items():
            parameter: torch.nn.Parameter = getattr(self, "weight" if name == "data" else f"weight_{name}")
            parameter.data = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.decode(x.dtype)
        if self.weight_terms is not None:
            weight = self.weight_terms.apply(weight, self.weight)  # type: ignore[attr-defined]  # WeightTerms; naming it would be an import cycle
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
