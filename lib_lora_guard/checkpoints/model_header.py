"""Facts of a model file, from its header: real shapes, storage formats, and the part of the model of each parameter.

Sources: the prefixes of whole checkpoints as `models.names` has them; bitsandbytes' state-dict layout (`weights.bnb4_layout`);
scales by `weights.scale_names`, and the `scaled_fp8` marker of a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..adapters.base import Shape, product_of
from ..adapters.file_keys import meaning_of
from ..errors import FileFormatError
from ..files import FileHeader, TensorEntry, open_header, read_bytes, shown
from ..files.safetensors_file import FORMATS
from ..models.architecture import Architecture, detect_model
from ..models.fit import Target
from ..models.names import DENOISER_PREFIXES
from ..models.text import find_encoders
from ..planning.gguf_baked import FORGE_BLOCKS, baked_bytes
from ..units import FP32_BYTES
from ..weights.bnb4_layout import KINDS, LARGEST_STATE_BYTES, Part, find_in_file, state_key
from ..weights.dtype_names import WIDE_DTYPE_NAMES, dtype_name
from ..weights.scale_names import BESIDE, ScaleNames

DENOISER, TEXT, VAE, OTHER = "denoiser", "text_encoders", "vae", "other"
_VAE = ("first_stage_model.", "vae.")
_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_OTHER = ("control_model.", "model_ema.")

_QUANT_STATE = ".quant_state.bitsandbytes__"
_BESIDE_4_BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_WIDE_GGUF = ("F64", "F32", "F16", "BF16")
_T5_TABLE = "shared.weight"
"""T5's token table, which hosts keep in fp32 whatever the file has."""
_NOT_CALLED = ("embedding", "shared.weight", "relative_attention_bias", "pos_embed", "position_ids", "logit_scale")
"""Parameters that are looked up or added: no layer multiplies by them."""


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    `shape` is the real one, `bytes` its size in the file with its scales, `wide` is True for floats of 16 bits and more.
    """

    name: str
    shape: Shape
    format: str
    bytes: int
    wide: bool
    part: str

    @property
    def values(self) -> int:
        """The number of values."""
        return product_of(self.shape)

    @property
    def is_layer(self) -> bool:
        """True for matrices and kernels that a layer multiplies its input by."""
        return len(self.shape) > 1 and not any(word in self.name for word in _NOT_CALLED)

    def memory_bytes(self, compute_bytes: int) -> int:
        """Returns the bytes in Forge's memory. Floats of 16 bits and more take the compute dtype in denoiser and VAE, T5's
        token table takes fp32, everything else stays."""
        if self.wide and self.part in (DENOISER, VAE) and self.format not in _WIDE_GGUF:
            return self.values * compute_bytes
        if self.part == TEXT and self.name.endswith(_T5_TABLE):
            return self.values * FP32_BYTES
        return baked_bytes(self.format, self.bytes)

    def placed_bytes(self, compute_bytes: int) -> int:
        """Returns the bytes that Forge places it by: for GGUF those in the file, as it bakes them later."""
        return self.bytes if self.format in FORGE_BLOCKS else self.memory_bytes(compute_bytes)


@dataclass(frozen=True)
class Checkpoint:
    """The facts of one model file, its parameters by name."""

    header: FileHeader
    parameters: Mapping[str, Parameter]
    architecture: Architecture | None
    scales: Mapping[str, str]
    """The names of the weights' scales, by the weights' names."""

    @property
    def is_scaled_fp8(self) -> bool:
        """True if the file says so, or a weight has a scale."""
        return bool(self.scales) or "scaled_fp8" in self.header.tensors

    @property
    def shapes(self) -> dict[str, Shape]:
        """The real shapes of all parameters."""
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def target(self) -> Target:
        """Returns the model as LoRA files are matched to it.

        Raises:
            FileFormatError: The shapes do not go with the names.
        """
        target = Target(self.shapes)
        try:
            _ = target.names, target.architecture
        except (IndexError, ValueError) as error:
            raise _odd(self.header) from error
        return target

    def of_part(self, part: str) -> list[Parameter]:
        """Returns the parameters of one part of the model."""
        return [parameter for parameter in self.parameters.values() if parameter.part == part]

    def formats(self) -> Counter[str]:
        """Counts the values of the denoiser's layers by storage format."""
        counted: Counter[str] = Counter()
        for parameter in self.of_part(DENOISER):
            if parameter.is_layer:
                counted[parameter.format] += parameter.values
        return counted


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the header, and from bitsandbytes files the few bytes that hold a weight's shape.

    Raises:
        FileFormatError: The file cannot be read or is no model.
    """
    header = open_header(path)
    _refuse_lora(header)
    small = [n for n, entry in header.tensors.items() if _QUANT_STATE in n and entry.bytes <= LARGEST_STATE_BYTES]
    states = read_bytes(header, small) if small else {}
    names = scale_names(header)
    scales: dict[str, str] = {}
    shapes: dict[str, Shape] = {}
    stored: dict[str, tuple[str, bool, int]] = {}
    for name, entry in header.tensors.items():
        # Single numbers (versions, markers) are no parameters.
        if not entry.shape or _belongs_to_another(name, header.tensors):
            continue
        form, wide, shape, size = _storage(header, entry, states, names)
        if form not in KINDS and (scale := _scale_of(header, names, name)):
            scales[name] = scale
            size += header.tensors[scale].bytes
        shapes[name], stored[name] = shape, (form, wide, size)
    parts = _parts(shapes)
    parameters = {name: Parameter(name, shapes[name], *_reordered(stored[name]), parts[name]) for name in shapes}
    if not any(parameter.is_layer for parameter in parameters.values()):
        raise FileFormatError(
            f"{shown(path.name)}: expected the weights of a model, found none among {len(header.tensors)} tensors; "
            "give the checkpoint first, then the LoRAs"
        )
    try:
        return Checkpoint(header, parameters, detect_model(shapes), scales)
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
    """Returns True for scales and states, which are counted with their weight."""
    head, _, last = name.rpartition(".")
    if (head and last in BESIDE) or name == "scaled_fp8" or _QUANT_STATE in name:
        return True
    return last in _BESIDE_4_BIT and head in tensors


def scale_names(header: FileHeader) -> ScaleNames:
    """Returns the scales of a file, by its names."""
    return ScaleNames(
        {name: _part(entry) for name, entry in header.tensors.items()},
        lambda name: read_bytes(header, [name])[name],
    )


def _scale_of(header: FileHeader, names: ScaleNames, name: str) -> str | None:
    try:
        return names.of(name)
    except FileFormatError as error:
        raise FileFormatError(f"{shown(header.path.name)}: {shown(str(error), 300)}") from None


def _storage(
    header: FileHeader, entry: TensorEntry, states: Mapping[str, bytes], names: ScaleNames
) -> tuple[str, bool, Shape, int]:
    """Returns the format, whether it is a float of 16 bits or more, the real shape, and the bytes with bnb's scales."""
    if header.container == "gguf":
        return entry.format, entry.format in _WIDE_GGUF, entry.shape, entry.bytes
    if any(state_key(entry.name, kind) in header.tensors for kind in KINDS):
        return _bnb(header, entry, states)
    dtype = FORMATS[entry.format][1]
    if entry.name.endswith(".weight") and dtype in ("uint8", "int8"):
        _scale_of(header, names, entry.name)
        if len(entry.shape) > 1:
            raise FileFormatError(
                f"{shown(header.path.name)}: {shown(entry.name)}: expected a weight whose shape can be told, found {dtype} "
                "without a bitsandbytes state; use the model in fp8, NF4 or GGUF"
            )
    return dtype_name(dtype or entry.format), dtype in WIDE_DTYPE_NAMES, entry.shape, entry.bytes


def _bnb(header: FileHeader, entry: TensorEntry, states: Mapping[str, bytes]) -> tuple[str, bool, Shape, int]:
    """Reads the state's JSON and compares the sizes of the other parts with it."""
    counted = [entry.name, *(f"{entry.name}.{part}" for part in _BESIDE_4_BIT)]
    names = [*counted, *(state_key(entry.name, kind) for kind in KINDS)]
    stored = {name: _part(header.tensors[name]) for name in names if name in header.tensors}
    size = sum(stored[name].bytes for name in counted if name in stored)
    try:
        layout = find_in_file(stored, states.__getitem__, entry.name).layout
    except FileFormatError as error:
        raise FileFormatError(f"{shown(header.path.name)}: {shown(str(error), 300)}") from None
    return layout.format, False, layout.shape, size


def _part(entry: TensorEntry) -> Part:
    # GGUF has formats of its own.
    return Part(entry.shape, dtype_name(FORMATS.get(entry.format, (0, None))[1] or entry.format), entry.bytes)


def _parts(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Returns the part of the model of each parameter."""
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
