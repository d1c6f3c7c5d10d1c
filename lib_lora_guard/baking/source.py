"""Reads a model file tensor by tensor, as stored or as plain numbers.

Sources: `weights` for the formats, `weights.scale_names` for scales (value = number * scale).
"""

from __future__ import annotations

import torch

from ..adapters.base import product_of
from ..checkpoints.model_header import Checkpoint
from ..errors import FileFormatError
from ..files import read_tensors, shown
from ..files.gguf_types import PLAIN
from ..files.safetensors_file import FORMATS
from ..weights import GGUF_DECODERS
from ..weights.bnb4 import LEVELS, from_file_parts
from ..weights.codec import Decoder, Parts
from ..weights.storage import FP8_DTYPES, WIDE_DTYPES

_RESHAPED = "comfy.gguf.orig_shape."
_OTHER_FILE = "use the model in 16 bits, fp8 or another GGUF quantisation"


class ModelSource:
    """Reads the tensors of a checkpoint. The file is opened for each tensor and closed again."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Checks the header.

        Raises:
            FileFormatError: A tensor could not be written into the new file.
        """
        self.checkpoint = checkpoint
        self._header = checkpoint.header
        for key in self._header.metadata:
            if key.startswith(_RESHAPED):
                raise self._refused(
                    key, f"expected tensors in the model's own shapes, found some reshaped; {_OTHER_FILE}"
                )
        for name, entry in self._header.tensors.items():
            if not self.is_packed(name):
                self.stored_dtype(name)
            elif self._header.container == "gguf" and entry.format not in GGUF_DECODERS:
                raise self._refused(name, f"expected one of {', '.join(GGUF_DECODERS)}, found {entry.format}")
            elif name not in checkpoint.parameters:
                raise self._refused(name, f"expected a scale in plain numbers, found {entry.format}; {_OTHER_FILE}")
        for name in checkpoint.parameters:
            if scale := self.scale_name(name):
                self._check_scale(scale, checkpoint.parameters[name].shape[0])

    def _check_scale(self, scale: str, rows: int) -> None:
        shape, dtype = self._header.tensors[scale].shape, self.stored_dtype(scale)
        if product_of(shape) not in (1, rows) or dtype not in WIDE_DTYPES:
            raise self._refused(
                scale,
                f"expected one floating-point scale or {rows}, one a row, found {list(shape)} of {dtype}; {_OTHER_FILE}",
            )

    def is_packed(self, name: str) -> bool:
        """True if a parameter is stored in blocks that share a scale."""
        entry, parameter = self._header.tensors[name], self.checkpoint.parameters.get(name)
        if self._header.container == "gguf":
            return entry.format not in PLAIN
        return parameter is not None and parameter.format in LEVELS

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """Returns the dtype of a tensor in the file; None if it is stored in blocks.

        Raises:
            FileFormatError: torch lacks the dtype.
        """
        if self.is_packed(name):
            return None
        form = self._header.tensors[name].format
        dtype = getattr(torch, FORMATS[form][1] or "", None)
        if not isinstance(dtype, torch.dtype):
            raise self._refused(name, f"stored as {form}, which torch {torch.__version__} does not have; {_OTHER_FILE}")
        return dtype

    def scale_name(self, name: str) -> str | None:
        """Returns the name of a weight's scale tensor; None if it has none."""
        return self.checkpoint.scales.get(name)

    def as_stored(self, name: str) -> torch.Tensor:
        """Returns a tensor as the file stores it."""
        return read_tensors(self._header, [name])[name]

    def values(self, name: str) -> torch.Tensor:
        """Returns a parameter in its real shape, multiplied by its scale: 16, 32 and 64-bit floats unchanged, all
        others in fp32.

        Raises:
            FileFormatError: The tensor holds no floating-point numbers, or its parts are malformed.
        """
        shape = self.checkpoint.parameters[name].shape
        if self.is_packed(name):
            decoder, parts = self._packed(name)
            return decoder.decode(parts, torch.float32).reshape(shape)
        stored, scale = self.as_stored(name), self.scale_name(name)
        if stored.dtype not in (*WIDE_DTYPES, *FP8_DTYPES):
            raise self._refused(name, f"expected floating-point numbers, found {stored.dtype}; {_OTHER_FILE}")
        if scale is None:
            return stored.float() if stored.dtype in FP8_DTYPES else stored
        return stored.float().mul_(by_row(self.as_stored(scale).float(), stored))

    def _packed(self, name: str) -> tuple[Decoder, Parts]:
        if self._header.container == "gguf":
            return GGUF_DECODERS[self._header.tensors[name].format], {"data": self.as_stored(name)}
        parts = [name, *(key for key in self._header.tensors if key.startswith(f"{name}."))]
        return from_file_parts(read_tensors(self._header, parts), name)

    def _refused(self, name: str, text: str) -> FileFormatError:
        return FileFormatError(f"{shown(self._header.path.name)}: {shown(name)}: {text}")


def by_row(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Reshapes a scale of one value, or of one per row, so that it multiplies `weight`."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1)) if scale.numel() > 1 else scale.reshape(())
