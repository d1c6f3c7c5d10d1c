"""Facts of a LoRA file, from its header and its single numbers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..adapters.base import product_of
from ..adapters.files import LoraFile, lora_of_header, open_lora
from ..errors import LoraFileError, LoraGuardError
from ..files import FileHeader, shown
from ..files.safetensors_file import FORMATS
from ..models.architecture import Architecture, detect_lora
from ..models.routes import flatten
from ..models.text import CLIP_G, CLIP_H, CLIP_L, HINTS, LLM, hint_of
from ..weights.dtype_names import dtype_name

_TRAINER = re.compile(r"^(base_model_model_|lycoris_|lora_)")
_CLIPS = {"te": "CLIP-L", "te1": "CLIP-L", CLIP_L: "CLIP-L", "te2": "CLIP-G", CLIP_G: "CLIP-G", CLIP_H: "CLIP-H"}
_LANGUAGE_MODELS = {
    Architecture.ANIMA: "Qwen3", Architecture.Z_IMAGE: "Qwen3", Architecture.KREA2: "Qwen3-VL",
    Architecture.LUMINA2: "Gemma 2", Architecture.QWEN_IMAGE: "Qwen2.5-VL", Architecture.ERNIE_IMAGE: "Ministral 3",
    Architecture.HUNYUAN_IMAGE: "Qwen2.5-VL",
}  # fmt: skip
"""The language model that an architecture reads its prompt with, where there is one."""
_FAMILIES = {
    "qwen3vl": "Qwen3-VL", "qwen3": "Qwen3", "qwen25": "Qwen2.5-VL", "gemma2": "Gemma 2", "gemma3": "Gemma 3",
    "ministral3": "Ministral 3", "mistral3": "Mistral 3", "llama": "Llama",
}  # fmt: skip
"""The language model that a name in the file says itself."""
_LANGUAGE_LAYER = re.compile(r"(?<!encoder_)layers_\d+_(self_attn_[qkvo]_proj|mlp_(gate|up|down)_proj)")
_UNETS = (
    Architecture.SD1, Architecture.SD2, Architecture.SDXL, Architecture.SDXL_REFINER, Architecture.KOLORS,
    Architecture.SVD,
)  # fmt: skip

SHOWN_METADATA = (
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_output_name",
    "ss_resolution",
)
"""Metadata entries that are shown, beside `modelspec.*`."""
_MAX_TAGS_CHARACTERS = 4_000_000
SHOWN_WORDS = 8
"""The number of trained words shown."""
VALUE_CHARACTERS = 200
"""Characters shown of a metadata value."""


@dataclass(frozen=True)
class LoraFacts:
    """The facts of one file.

    Counters count modules, `dtypes` counts tensors. `scales` holds alpha over rank of the modules that have both.
    """

    file: LoraFile
    header: FileHeader
    made_for: Architecture | None
    kinds: Counter[str]
    ranks: Counter[int]
    alphas: Counter[float]
    scales: Counter[float]
    dtypes: Counter[str]
    parts: Counter[str]
    dora_modules: int

    @property
    def name(self) -> str:
        """The file's name, fit to be shown."""
        return shown(self.file.path.name)

    @property
    def bytes(self) -> int:
        """The bytes of all factors in memory."""
        return sum(adapter.bytes for adapter in self.file.adapters.values())


def read_facts(path: Path) -> LoraFacts:
    """Reads the facts of a LoRA file.

    Raises:
        LoraFileError: The file is no LoRA, or its factors do not go together.
    """
    with damaged_where_torch_refuses(path):
        header = open_lora(path)
        return _facts(lora_of_header(header), header)


def _facts(file: LoraFile, header: FileHeader) -> LoraFacts:
    made_for = detect_lora(file.shapes, file.metadata)
    kinds: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    scales: Counter[float] = Counter()
    parts: Counter[str] = Counter()
    dora = 0
    for (module, _), adapter in file.adapters.items():
        kinds[adapter.kind] += 1
        parts[_part(module, made_for)] += 1
        dora += adapter.is_dora
        rank, alpha = adapter.rank, getattr(adapter, "alpha", None)
        if rank is not None:
            ranks[rank] += 1
        if isinstance(alpha, float):
            alphas[alpha] += 1
            if rank is not None:
                scales[float(getattr(adapter, "scale", alpha / rank))] += 1
    # Single numbers (alpha) are fp32 in most files and say nothing.
    dtypes = Counter(_dtype(entry.format) for entry in header.tensors.values() if product_of(entry.shape) > 1)
    return LoraFacts(file, header, made_for, kinds, ranks, alphas, scales, dtypes, parts, dora)


@contextmanager
def damaged_where_torch_refuses(path: Path) -> Iterator[None]:
    """Turns torch's own errors into one that names the file: torch raises them for factors of impossible shapes.

    Raises:
        LoraFileError: torch raised an error.
    """
    try:
        yield
    except LoraGuardError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise LoraFileError(
            f"{shown(path.name)}: expected factors that go together, found {type(error).__name__}: {shown(str(error))}; the "
            "file is damaged, download it again"
        ) from error


def metadata_of_interest(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the entries that describe the file, fit to be shown."""
    wanted = [*SHOWN_METADATA, *sorted(key for key in metadata if key.startswith("modelspec."))]
    return {
        shown(key): shown(metadata[key], VALUE_CHARACTERS)
        for key in wanted
        # Thumbnails are pictures in base64.
        if metadata.get(key) and "thumbnail" not in key
    }


def trained_words(metadata: Mapping[str, str]) -> list[str]:
    """Returns the words that a kohya file was trained with, the most frequent first."""
    text = metadata.get("ss_tag_frequency", "")
    if not text or len(text) > _MAX_TAGS_CHARACTERS:
        return []
    try:
        folders = json.loads(text)
    except (ValueError, RecursionError):
        return []
    counted: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counted[tag.strip()] += count
    return [shown(tag) for tag, _ in counted.most_common(SHOWN_WORDS)]


def counted(values: Mapping[object, int] | Counter[int] | Counter[float] | Counter[str]) -> str:
    """Returns "16 (300), 32 (4)", the most frequent first; a single value has no count."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    if len(ordered) == 1:
        return _text(ordered[0][0])
    head = ", ".join(f"{_text(value)} ({count})" for value, count in ordered[:6])
    return f"{head}, ..." if len(ordered) > 6 else head


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _part(module: str, made_for: Architecture | None) -> str:
    flat = flatten(module)
    while (plain := _TRAINER.sub("", flat)) != flat:
        flat = plain
    hint = hint_of(flat)
    if "llm_adapter_" in flat or flat.startswith("text_conditioner_"):
        return "text adapter"
    if not hint:
        return "U-Net" if made_for in _UNETS else "transformer"
    if "encoder_block_" in flat or HINTS[hint] in ("t5", "te3"):
        return "UMT5" if made_for is Architecture.WAN else "T5"
    if HINTS[hint] == LLM or _LANGUAGE_LAYER.search(flat):
        return next((name for begin, name in _FAMILIES.items() if begin in hint), "") or _LANGUAGE_MODELS.get(
            made_for or Architecture.SD1, "language model"
        )
    return _CLIPS.get(HINTS[hint], "text encoder")


def _dtype(form: str) -> str:
    return dtype_name(FORMATS[form][1] or form)
