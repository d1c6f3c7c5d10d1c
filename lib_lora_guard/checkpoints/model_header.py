"""A model file as its header shows it: real shapes, how each weight is stored, and which part of the model it is.

Sources: the prefixes of whole checkpoints as `models.names` has them; bitsandbytes' state-dict layout (`weights.bnb4`);
scaled fp8 as ComfyUI and Forge read it (a `scale_weight` beside the weight, a `scaled_fp8` marker in the file).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.base import Shape, product_of
from ..adapters.file_keys import meaning_of
from ..errors import FileFormatError
from ..files import FileHeader, TensorEntry, open_header, read_tensors, shown
from ..files.safetensors_file import FORMATS
from ..models.architecture import Architecture, detect_model
from ..models.fit import Target
from ..models.names import DENOISER_PREFIXES
from ..models.text import find_encoders
from ..planning.gguf_baked import FORGE_BLOCKS, baked_bytes
from ..weights.bnb4 import LEVELS, from_file_parts
from ..weights.storage import WIDE_DTYPES, dtype_name

DENOISER, TEXT, VAE, OTHER = "denoiser", "text_encoders", "vae", "other"
_VAE = ("first_stage_model.", "vae.")
_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_OTHER = ("control_model.", "model_ema.")

_QUANT_STATE = ".quant_state.bitsandbytes__"
_SCALES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale")
_WIDE_GGUF = ("F64", "F32", "F16", "BF16")
_NOT_CALLED = ("embedding", "shared.weight", "relative_attention_bias", "pos_embed", "position_ids", "logit_scale")
"""Parameters that are looked up or added: no layer multiplies by them."""


@dataclass(frozen=True)
class Parameter:
    """One parameter. `shape` is the real one; `bytes` what it takes in the file, its scales included."""

    name: str
    shape: Shape
    format: str
    bytes: int
    wide: bool
    part: str

    @property
    def values(self) -> int:
        return product_of(self.shape)

    @property
    def is_layer(self) -> bool:
        """True for matrices and kernels that a layer multiplies its input by."""
        return len(self.shape) > 1 and not any(word in self.name for word in _NOT_CALLED)

    def memory_bytes(self, compute_bytes: int) -> int:
        """Bytes as Forge holds it: 16, 32 and 64-bit weights all in the compute dtype, the others as they are."""
        if self.wide and self.part == DENOISER and self.format not in _WIDE_GGUF:
            return self.values * compute_bytes
        return baked_bytes(self.format, self.bytes)

    def placed_bytes(self, compute_bytes: int) -> int:
        """What Forge places it by: GGUF by its bytes in the file, which are not baked yet."""
        return self.bytes if self.format in FORGE_BLOCKS else self.memory_bytes(compute_bytes)


@dataclass(frozen=True)
class Checkpoint:
    header: FileHeader
    parameters: Mapping[str, Parameter]
    architecture: Architecture | None
    is_scaled_fp8: bool

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def target(self) -> Target:
        """The model as LoRA files are matched to it. Raises FileFormatError where its names promise other shapes than it has."""
        target = Target(self.shapes)
        try:
            _ = target.names, target.architecture
        except (IndexError, ValueError) as error:
            raise _odd(self.header) from error
        return target

    def of_part(self, part: str) -> list[Parameter]:
        return [parameter for parameter in self.parameters.values() if parameter.part == part]

    def formats(self) -> Counter[str]:
        """Formats of the denoiser's layers by the values stored in them."""
        counted: Counter[str] = Counter()
        for parameter in self.of_part(DENOISER):
            if parameter.is_layer:
                counted[parameter.format] += parameter.values
        return counted


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the header, and from bitsandbytes files the few bytes that say a weight's shape.

    Raises FileFormatError for what is no model file.
    """
    header = open_header(path)
    _refuse_lora(header)
    small = [name for name in header.tensors if _QUANT_STATE in name]
    states = read_tensors(header, small) if small else {}
    shapes: dict[str, Shape] = {}
    stored: dict[str, tuple[str, bool, int]] = {}
    for name, entry in header.tensors.items():
        # Lone numbers (versions, markers) are no parameters.
        if not entry.shape or _belongs_to_another(name, header.tensors):
            continue
        form, wide, shape, size = _storage(header, entry, states)
        shapes[name], stored[name] = shape, (form, wide, size)
    parts = _parts(shapes)
    parameters = {name: Parameter(name, shapes[name], *_reordered(stored[name]), parts[name]) for name in shapes}
    if not any(parameter.is_layer for parameter in parameters.values()):
        raise FileFormatError(
            f"{shown(path.name)}: expected the weights of a model, found none among {len(header.tensors)} tensors; "
            "give the checkpoint first, then the LoRAs"
        )
    scaled = "scaled_fp8" in header.tensors or any(name.endswith(_SCALES[:1]) for name in header.tensors)
    try:
        return Checkpoint(header, parameters, detect_model(shapes), scaled)
    except (IndexError, ValueError) as error:
        raise _odd(header) from error


def _odd(header: FileHeader) -> FileFormatError:
    return FileFormatError(
        f"{shown(header.path.name)}: expected the shapes that go with its names, found others; the file is "
        "damaged, download it again"
    )


def _reordered(stored: tuple[str, bool, int]) -> tuple[str, int, bool]:
    form, wide, size = stored
    return form, size, wide


def _refuse_lora(header: FileHeader) -> None:
    if header.container == "safetensors" and 2 * sum(meaning_of(name) is not None for name in header.tensors) > len(
        header.tensors
    ):
        raise FileFormatError(
            f"{shown(header.path.name)}: expected a model, found a LoRA; give the checkpoint first, then the LoRAs"
        )


def _belongs_to_another(name: str, tensors: Mapping[str, TensorEntry]) -> bool:
    """Scales and states, which are counted with their weight."""
    if name.endswith(_SCALES) or name == "scaled_fp8" or _QUANT_STATE in name:
        return True
    head, _, last = name.rpartition(".")
    return last in ("absmax", "quant_map", "nested_absmax", "nested_quant_map") and head in tensors


def _storage(
    header: FileHeader, entry: TensorEntry, states: Mapping[str, torch.Tensor]
) -> tuple[str, bool, Shape, int]:
    """Format, whether it is 16 bits or wider, real shape, bytes with scales."""
    if header.container == "gguf":
        return entry.format, entry.format in _WIDE_GGUF, entry.shape, entry.bytes
    state = next((key for kind in LEVELS if (key := f"{entry.name}{_QUANT_STATE}{kind}") in states), None)
    if state is not None:
        return _bnb(header, entry, states)
    dtype = getattr(torch, FORMATS[entry.format][1] or "", None)
    if entry.name.endswith(".weight") and len(entry.shape) > 1 and dtype is torch.uint8:
        raise FileFormatError(
            f"{shown(header.path.name)}: {shown(entry.name)}: expected a weight whose shape can be told, found uint8 "
            "without a bitsandbytes state; use the model in fp8, NF4 or GGUF"
        )
    form = dtype_name(dtype) if isinstance(dtype, torch.dtype) else entry.format
    scale = header.tensors.get(entry.name.removesuffix(".weight") + ".scale_weight")
    return form, dtype in WIDE_DTYPES, entry.shape, entry.bytes + (scale.bytes if scale else 0)


def _bnb(header: FileHeader, entry: TensorEntry, states: Mapping[str, torch.Tensor]) -> tuple[str, bool, Shape, int]:
    """The state's JSON is read, the sizes of the rest are checked against it, on torch's meta device."""
    parts, size = {}, 0
    for name in (
        entry.name,
        *(f"{entry.name}.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
    ):
        if (found := header.tensors.get(name)) is not None:
            dtype = getattr(torch, FORMATS[found.format][1] or "", torch.uint8)
            parts[name] = torch.empty(found.shape, dtype=dtype, device="meta")
            size += found.bytes
    own = {name: state for name, state in states.items() if name.startswith(entry.name + _QUANT_STATE)}
    try:
        decoder, _ = from_file_parts({**parts, **own}, entry.name)
    except FileFormatError as error:
        raise FileFormatError(f"{shown(header.path.name)}: {shown(str(error), 300)}") from None
    return decoder.format, False, decoder.shape, size


def _parts(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Which part of the model each parameter belongs to."""
    encoders = tuple(prefix for prefix in find_encoders(shapes) if prefix)
    is_encoder = not encoders and "" in find_encoders(shapes)
    prefix = next((p for p in DENOISER_PREFIXES if p and any(name.startswith(p) for name in shapes)), "")

    def part(name: str) -> str:
        if prefix and name.startswith(prefix):
            return DENOISER
        if is_encoder or name.startswith((*encoders, *_TEXT)):
            return TEXT
        if name.startswith(_VAE):
            return VAE
        return OTHER if prefix or name.startswith(_OTHER) else DENOISER

    return {name: part(name) for name in shapes}
