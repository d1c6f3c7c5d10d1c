"""(IA)^3: a learned factor per output row or input column (arXiv 2205.05638), as LyCORIS and peft store it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import ClassVar

from ..lazy_torch import torch
from .base import Adapter, RowFunction, Shape, mismatch
from .forms import InputScale, OutputScale
from .kinds import Found, Kind, register

_LYCORIS, _PEFT = 0.0, 1.0
"""The number that changes nothing. LyCORIS (`modules/ia3.py`) stores a difference from one, peft
(`tuners/ia3/layer.py`) the factor."""


@dataclass(frozen=True, eq=False)
class Ia3Adapter(Adapter):
    """`W' = W * (1 + s (weight - centre))`, by input column where `on_input`, else by output row.

    `weight` holds one number per channel in any shape: `(n,)`, `(n, 1)`, `(1, n)`, `(1, n, 1, 1)`. `centre` is the
    number that changes nothing. A 1-D weight is a bias: peft scales it along with the rows, LyCORIS does not.
    """

    kind: ClassVar[str] = "ia3"
    weight: torch.Tensor
    on_input: bool
    centre: float = _LYCORIS

    @property
    def covers_bias(self) -> bool:
        """True for peft's factors of the output: they are for all that the layer returns."""
        return self.centre == _PEFT and not self.on_input

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        axis, found = 1 if self.on_input else 0, self.weight.numel()
        fits = len(shape) > axis and found == shape[axis]
        fills = self.on_input and may_expand and len(shape) > 1 and 0 < found < shape[1]
        if not fits and not fills:
            raise mismatch("IA3 on the input" if self.on_input else "IA3 on the output", self.weight.shape, shape)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        channels = [1] * weight.dim()
        channels[1 if self.on_input else 0] = -1
        less_one = (self.weight.to(device=weight.device, dtype=wide) - self.centre).mul_(strength).flatten()
        if self.on_input:
            # A wider input projection: channels that the file does not know keep their factor 1.
            less_one = torch.nn.functional.pad(less_one, (0, weight.shape[1] - less_one.shape[0]))
        less_one = less_one.reshape(channels)
        if function is not None:
            return weight.copy_(weight.to(wide) + function(weight.to(wide) * less_one))
        # In place and yet rounded once: torch multiplies in the wider of the two dtypes.
        return weight.mul_(less_one.add_(1.0))

    def rows(self, start: int, length: int) -> Ia3Adapter:
        """On the input every row is scaled alike, on the output each has its own factor."""
        return self if self.on_input else replace(self, weight=self.weight.flatten()[start : start + length])

    def cheap_forward(self) -> OutputScale | InputScale:
        difference = self.weight.flatten().float() - self.centre
        return InputScale(difference) if self.on_input else OutputScale(difference)


def _weight_beside_on_input(key: str, names: Container[str]) -> tuple[str, str] | None:
    """LyCORIS calls the factors `weight`, like a whole tensor: only `on_input` beside them tells."""
    module, dot, field = key.rpartition(".")
    return (module, field) if dot and field == "weight" and f"{module}.on_input" in names else None


def _make_lycoris(found: Found) -> Ia3Adapter:
    return Ia3Adapter(found.fields["weight"], bool(found.fields["on_input"]))


def _make_peft(found: Found) -> Ia3Adapter:
    weight = found.fields["weight"]
    # A linear layer's (1, in) and (out, 1) differ; a convolution's (1, n, 1, 1) does not say which it is.
    on_input = weight.dim() == 2 and weight.shape[0] == 1
    if weight.dim() != 2:
        on_input = bool(found.settings.is_feedforward(found.module))
    return Ia3Adapter(weight, on_input, centre=_PEFT)


register(
    Kind(
        "ia3",
        _make_lycoris,
        keys={"on_input": "on_input"},
        claim=_weight_beside_on_input,
        numbers=frozenset({"on_input"}),
    )
)
register(Kind("peft_ia3", _make_peft, peft_keys={"ia3_l": "weight"}))
