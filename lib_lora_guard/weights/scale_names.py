"""The scale that belongs to a stored weight, by the names of a file. Needs no torch.

A scale under a name that is not known here is never taken for 1: the weights would be hundreds of times too large.

Sources: scaled fp8 as ComfyUI and Forge read it (`scale_weight` beside the weight, `scale_input` for activations). ComfyUI
since 0.4 (QUANTIZATION.md there), compressed-tensors and ModelOpt: `weight_scale` and `input_scale`; with fp8 numbers and one
value all of them multiply by it. ComfyUI's `comfy_quant` names the format as JSON in bytes.
Refused, because the same name means different things, or the layout is not read here: `weight_scale` of several values (MXFP8,
NVFP4, blocks), `weight_scale_inv` (blocks of 128 x 128), `scale` (SDNQ), `scale_b` (torch's own products), `weight._scale` and
`weight._data` (quanto).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping

from ..errors import FileFormatError
from .bnb4_layout import Part

SCALE, INPUT_SCALE = "scale_weight", "scale_input"
COMFY_SCALE, COMFY_INPUT_SCALE, COMFY_FORMAT = "weight_scale", "input_scale", "comfy_quant"
COMFY_LAYERS = "_quantization_metadata"
"""The key in the metadata under which ComfyUI names the format of each layer, in place of `comfy_quant`."""
BESIDE = frozenset({SCALE, INPUT_SCALE, COMFY_SCALE, COMFY_INPUT_SCALE, COMFY_FORMAT})
"""Last parts of names that belong to the weight beside them."""

_QUANTISED = frozenset({COMFY_SCALE, "weight_scale_inv", "weight_scale_2", COMFY_FORMAT})
"""Names that stand beside quantised weights alone."""
_KNOWN = BESIDE | {"bias"}
_LARGEST_MARKER_BYTES = 1 << 12
_MARKED = ("float8_e4m3fn", "float8_e5m2")
_WIDE = ("fp64", "fp32", "bf16", "fp16")
_OTHER_FILE = "use the model in 16 bits, fp8 or another GGUF quantisation"


class ScaleNames:
    """The scales of one file."""

    def __init__(self, stored: Mapping[str, Part], read: Callable[[str], bytes] | None = None) -> None:
        """Sorts the names once.

        Args:
            stored: The tensors of the file.
            read: Returns the bytes of a small tensor; None if the markers of formats are not read.
        """
        self._stored, self._read = stored, read
        self._beside: dict[str, list[str]] = {}
        for name in stored:
            head, _, last = name.partition(".weight.") if ".weight." in name else name.rpartition(".")
            if last != "weight":
                self._beside.setdefault(head, []).append(name)

    def of(self, name: str) -> str | None:
        """Returns the name of a weight's scale: one value, or one a row; None if it has none.

        Args:
            name: The weight's name, "x.weight". Weights of bitsandbytes' four bits are not asked for.

        Raises:
            FileFormatError: The weight has a scale that is not read here.
        """
        head, dot, last = name.rpartition(".")
        beside = self._beside.get(head, ()) if dot and last == "weight" else ()
        if not beside:
            return None
        weight = self._stored[name]
        names = {key: key[len(head) + 1 :] for key in beside}
        scales = [key for key, short in names.items() if short in (SCALE, COMFY_SCALE)]
        is_fp8 = weight.dtype.startswith("fp8")
        is_integer = weight.dtype.startswith(("int", "uint"))
        for key, short in names.items():
            if is_fp8 and len(weight.shape) > 1:
                is_foreign = short not in _KNOWN
            elif is_fp8:  # a norm, which may have statistics beside it
                is_foreign = short in _QUANTISED - BESIDE
            elif is_integer:
                is_foreign = short not in ("bias", INPUT_SCALE, COMFY_INPUT_SCALE)
            else:
                is_foreign = short in _QUANTISED
            if is_foreign:
                raise self._refused(key, weight)
        if is_fp8 and (marker := f"{head}.{COMFY_FORMAT}") in names:
            self._check_marker(marker, weight)
        if len(scales) > 1:
            raise self._refused(scales[1], weight)
        if scales and names[scales[0]] == COMFY_SCALE:
            scale = self._stored[scales[0]]
            if math.prod(scale.shape) != 1 or scale.dtype not in _WIDE:
                raise self._refused(scales[0], weight)
        return scales[0] if scales else None

    def beside(self, name: str) -> Iterable[str]:
        """Returns the names that belong to a weight: its scales, markers and states, with the bias not among them."""
        head = name.removesuffix(".weight")
        return [
            key for key in self._beside.get(head, ()) if key[len(head) + 1 :] in BESIDE or key.startswith(f"{name}.")
        ]

    def _check_marker(self, marker: str, weight: Part) -> None:
        if self._read is None:
            return
        part, form = self._stored[marker], None
        if part.dtype == "uint8" and part.bytes <= _LARGEST_MARKER_BYTES:
            try:
                found = json.loads(self._read(marker))
            except (ValueError, RecursionError):
                found = None
            form = found.get("format") if isinstance(found, dict) else None
        if form not in _MARKED:
            raise self._refused(marker, weight)

    def _refused(self, key: str, weight: Part) -> FileFormatError:
        part = self._stored[key]
        return FileFormatError(
            f"{key}: expected no scales but scale_weight, or one weight_scale of fp8 numbers, found this one of "
            f"{list(part.shape)} {part.dtype} for a weight in {weight.dtype}; {_OTHER_FILE}"
        )


def weight_of(name: str, suffixes: Iterable[str]) -> str:
    """Returns the weight that a scale or marker stands beside; empty for another name."""
    head, _, last = name.rpartition(".")
    return f"{head}.weight" if head and last in suffixes else ""
