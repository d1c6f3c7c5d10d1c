"""Merges a stack of LoRAs into a model file and writes the result as a new file, tensor by tensor.

Each weight with LoRAs is computed in fp32, in the order of the stack, and rounded once. All other tensors are copied
bit for bit, or converted if another dtype is requested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..adapters import Term
from ..adapters.base import Shape
from ..checkpoints.model_header import Checkpoint
from ..errors import LoraMismatchError
from ..files import Entry, write_safetensors
from ..files.safetensors_writer import Progress
from ..patching.merging import CPU, merge
from ..weights.dtype_names import dtype_name
from ..weights.scale_names import BESIDE, COMFY_FORMAT, COMFY_LAYERS, weight_of
from .dtypes import compute_dtype, dtype_for, packed_shape, rounded
from .effect import Effect
from .source import ModelSource, by_row
from .stack import Stack
from .unfinished import unfinished

MARKER = "scaled_fp8"


@dataclass
class BakeReport:
    """Statistics of the written file."""

    bytes: int = 0
    baked: int = 0
    copied: int = 0
    """Tensors without a LoRA, copied."""
    converted: int = 0
    """Tensors without a LoRA, converted."""
    beyond: int = 0
    """Values outside the dtype's range, clamped to its largest number."""
    formats: Counter[str] = field(default_factory=Counter)
    """Number of values with a LoRA, by dtype."""
    cosine: float | None = None
    """As `Effect.cosine`."""
    cosines: dict[str, float] = field(default_factory=dict)
    """As `Effect.cosines`."""
    largest_bytes: int = 0
    """The largest weight in fp32."""


def bake(
    checkpoint: Checkpoint,
    stack: Stack,
    output: Path,
    wanted: torch.dtype | None,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
    replaces: bool = True,
) -> BakeReport:
    """Writes the model with the LoRAs.

    Args:
        checkpoint: The model file.
        stack: The LoRAs.
        output: The new file.
        wanted: Its dtype; None keeps each tensor's dtype.
        metadata: Its metadata.
        progress: Called while tensors are written.
        replaces: False keeps a file that has appeared at `output` meanwhile.

    Raises:
        FileFormatError: The model has a format that cannot be copied. Nothing was written.
        OSError: As for `write_safetensors`.
    """
    baker = _Baker(ModelSource(checkpoint), stack.terms, wanted)
    entries = baker.entries()
    if not baker.keeps_scales():
        metadata = {key: text for key, text in metadata.items() if key != COMFY_LAYERS}
    with torch.inference_mode(False), torch.no_grad():
        write_safetensors(output, entries, metadata, progress, replaces, unfinished(output))
    baker.report.bytes = output.stat().st_size
    baker.report.cosine, baker.report.cosines = baker.effect.cosine, baker.effect.cosines
    return baker.report


class _Baker:
    def __init__(self, source: ModelSource, terms: Mapping[str, list[Term]], wanted: torch.dtype | None) -> None:
        self.source, self.terms = source, terms
        self.report, self.effect = BakeReport(), Effect()
        self._parameters = source.checkpoint.parameters
        self._dtypes = {name: dtype_for(p, source.stored_dtype(name), wanted) for name, p in self._parameters.items()}
        self._scales: dict[str, torch.Tensor] = {}

    def entries(self) -> list[Entry]:
        """Returns every tensor of the new file, in the old order, and counts them."""
        self.report.largest_bytes = max(4 * parameter.values for parameter in self._parameters.values())
        entries = []
        for name in self.source.checkpoint.header.tensors:
            if name in self._parameters:
                entries.append(self._parameter(name))
            elif self._is_kept(name):
                entries.append(self._other(name))
        return entries

    def _parameter(self, name: str) -> Entry:
        parameter, dtype = self._parameters[name], self._dtypes[name]
        if name in self.terms:
            self.report.baked += 1
            self.report.formats[dtype_name(dtype)] += parameter.values
            return Entry(name, dtype, self._shape(name), partial(self._baked, name))
        if dtype == self.source.stored_dtype(name):
            self.report.copied += 1
            return Entry(name, dtype, packed_shape(dtype, parameter.shape), partial(self.source.as_stored, name))
        self.report.converted += 1
        return Entry(name, dtype, parameter.shape, partial(self._converted, name))

    def _other(self, name: str) -> Entry:
        """Returns scales, markers and single numbers. The scale of a weight with a LoRA belongs to that weight: it may
        grow.
        """
        entry, dtype = self.source.checkpoint.header.tensors[name], self.source.stored_dtype(name)
        assert dtype is not None, "what lies in blocks is a parameter"
        weight = weight_of(name, BESIDE)
        if weight in self.terms and name == self.source.scale_name(weight):
            return Entry(name, dtype, entry.shape, partial(self._scale, weight))
        self.report.copied += 1
        return Entry(name, dtype, packed_shape(dtype, entry.shape), partial(self.source.as_stored, name))

    def _is_scaled(self, name: str) -> bool:
        """True if a weight keeps its scale. In another dtype, the scale is multiplied in."""
        return self.source.scale_name(name) is not None and self._dtypes[name] == self.source.stored_dtype(name)

    def keeps_scales(self) -> bool:
        """Returns True if every weight that has a scale keeps it."""
        return all(map(self._is_scaled, self.source.checkpoint.scales))

    def _is_kept(self, name: str) -> bool:
        """True if a tensor that is no parameter still applies to the new file."""
        if name == MARKER:
            return any(map(self._is_scaled, self._parameters))
        weight = weight_of(name, BESIDE)
        if weight in self._parameters and self.source.scale_name(weight) is not None:
            return self._is_scaled(weight)
        if weight in self._parameters and name.endswith(f".{COMFY_FORMAT}"):
            return self._dtypes[weight] == self.source.stored_dtype(weight)
        head, dot, _ = name.partition(".weight.")
        return not (dot and f"{head}.weight" in self._parameters and self.source.is_packed(f"{head}.weight"))

    def _shape(self, name: str) -> Shape:
        """Returns the shape with the LoRAs applied: FLUX-tools files widen an input projection."""
        shape = self._parameters[name].shape
        try:
            for term in self.terms[name]:
                term.check(shape, may_expand=False)
        except LoraMismatchError:
            return tuple(self._merged(name)[1].shape)
        return shape

    # ---- values

    def _converted(self, name: str) -> torch.Tensor:
        result, beyond = rounded(self.source.values(name), self._dtypes[name])
        self.report.beyond += beyond
        return result

    def _merged(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a weight without and with the LoRAs, in the new shape and the compute dtype."""
        base = self.source.values(name)
        merged = merge(base, self.terms[name], device=CPU, out_dtype=compute_dtype(base))
        if merged.shape != base.shape:
            grown = base.new_zeros(merged.shape)
            grown[tuple(slice(size) for size in base.shape)] = base
            base = grown
        return base, merged

    def _baked(self, name: str) -> torch.Tensor:
        base, merged = self._merged(name)
        dtype = self._dtypes[name]
        form = dtype_name(dtype)
        if self._is_scaled(name):
            scale = by_row(self._scale(name).to(merged.dtype), merged)
            limit = torch.finfo(dtype).max
            # The scale covers every value; the division may be off by its last bit.
            result, beyond = rounded((merged / scale).clamp_(-limit, limit), dtype)
            self.effect.add(form, base, merged, base, result.to(merged.dtype).mul_(scale))
        else:
            result, beyond = rounded(merged, dtype)
            same = dtype == self.source.stored_dtype(name)
            self.effect.add(form, base, merged, base if same else rounded(base, dtype)[0], result)
        self.report.beyond += beyond
        return result

    def _scale(self, name: str) -> torch.Tensor:
        """Returns the scale of a weight with LoRAs: the old one, times a power of two if the values have outgrown it.

        Powers of two do not change the mantissa, so values that the LoRAs do not touch stay exact.

        The weight is merged here and again when it is written: keeping it would take memory.
        """
        if name not in self._scales:
            old = self.source.as_stored(str(self.source.scale_name(name)))
            _, merged = self._merged(name)
            rows = merged.flatten(1) if old.numel() > 1 else merged.reshape(1, -1)
            low, high = torch.aminmax(rows, dim=1)
            needed = (torch.maximum(-low, high) / torch.finfo(self._dtypes[name]).max).reshape(old.shape)
            doublings = torch.log2(needed / old).clamp_min(0).ceil()
            # A scale of 0 belongs to a weight of zeros.
            grown = torch.where(old > 0, old * torch.exp2(doublings), needed.clamp_min(torch.finfo(torch.float32).tiny))
            self._scales[name] = grown.to(old.dtype)
        return self._scales[name]
