"""Text encoders and VAE that lie beside a model file: those of given files, from their headers, and the usual ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileFormatError, about
from ..files import shown
from ..messages import Message
from ..models.text import ANY, CLIP, LLM, T5, find_encoders, missing_encoders
from ..planning.usual_parts import VAE_KIND, usual_parts
from .model_header import OTHER, TEXT, VAE, Checkpoint, read_checkpoint

KIND_NAMES = {
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "clip_h": "OpenCLIP-H",
    CLIP: "CLIP",
    T5: "T5",
    LLM: Message("plan.kind.language_model"),
}
"""The kinds of text encoders with their names for users."""

_LLAMA_CPP = re.compile(r"(?P<t5>enc\.)?blk\.\d+\.")
"""llama.cpp's names of the layers in GGUF files; those of T5 begin with `enc.`."""
_VAE_NAMES = re.compile(r"(first_stage_model\.|vae\.)?(decoder|encoder)\.(conv_in|conv1|mid|middle|down|up)")
_PROMPT_INPUTS = ("txt_in.weight", "context_embedder.weight")
"""Layers that take what the text encoder hands over."""


@dataclass(frozen=True)
class PartBeside:
    """One text encoder or VAE that does not lie in the model file.

    Attributes:
        part: TEXT or VAE.
        kinds: The kinds of `models.text`; empty for a VAE.
        name: Its name for users: of a file its name, else what is assumed ("T5 fp8").
        bytes: Its size in the host's memory.
        is_assumed: No file of it was given.
    """

    part: str
    kinds: tuple[str, ...]
    name: str
    bytes: int
    is_assumed: bool = False


def read_parts(path: Path, compute_bytes: int) -> list[PartBeside]:
    """Reads which parts a file beside the model holds; of a whole checkpoint its text encoders and its VAE.

    Args:
        path: A text encoder, a VAE or both, safetensors or GGUF.
        compute_bytes: Bytes of one number in the compute dtype.

    Raises:
        FileFormatError: The file cannot be read, or is neither.
    """
    checkpoint = read_checkpoint(path)
    name = shown(path.name)
    parameters = list(checkpoint.parameters.values())
    found = []
    kinds = tuple(sorted(set(find_encoders(checkpoint.shapes).values())))
    if not kinds and (mark := next(filter(None, map(_LLAMA_CPP.match, checkpoint.parameters)), None)):
        kinds = (T5 if mark["t5"] else LLM,)
        found.append(PartBeside(TEXT, kinds, name, sum(p.memory_bytes(compute_bytes) for p in parameters)))
    elif kinds:
        # Parts beside the encoder's layers, such as a projection, are read as OTHER.
        size = sum(p.memory_bytes(compute_bytes) for p in parameters if p.part == TEXT)
        found.append(PartBeside(TEXT, kinds, name, size))
    vae = [p for p in parameters if p.part == VAE]
    if not kinds and not vae and any(map(_VAE_NAMES.match, checkpoint.parameters)):
        vae = [p for p in parameters if p.part != OTHER]
    if vae:
        # Each value takes the compute dtype, also where the file has fp32.
        size = sum(p.values * compute_bytes if p.wide else p.memory_bytes(compute_bytes) for p in vae)
        found.append(PartBeside(VAE, (), name, size))
    if not found:
        raise FileFormatError(about(name, Message("plan.no_part")))
    return found


def parts_beside(checkpoint: Checkpoint, given: Sequence[PartBeside]) -> tuple[list[PartBeside], list[str]]:
    """Returns the parts that an image needs beside the model file, and the kinds that nothing is known of.

    Args:
        checkpoint: The model file.
        given: The parts of files that the user named.

    Returns:
        `given` and the usual ones for what is still missing; kinds of `models.text` or VAE_KIND that stay open.
    """
    there = [*find_encoders(checkpoint.shapes).values(), *(kind for part in given for kind in part.kinds)]
    has_vae = bool(checkpoint.of_part(VAE)) or any(part.part == VAE for part in given)
    wanted = [*missing_encoders(checkpoint.architecture, there), *([] if has_vae else [VAE_KIND])]
    usual = usual_parts(checkpoint.architecture.value if checkpoint.architecture else None, _prompt_width(checkpoint))
    assumed = [
        PartBeside(
            VAE if one.kind == VAE_KIND else TEXT,
            () if one.kind == VAE_KIND else (one.kind,),
            one.name,
            one.bytes,
            True,
        )
        for one in usual
        if one.kind in wanted
    ]
    known = {one.kind for one in usual}
    return [*given, *assumed], [kind for kind in wanted if kind not in known]


def _prompt_width(checkpoint: Checkpoint) -> int | None:
    shapes = (shape for name, shape in checkpoint.shapes.items() if name.endswith(_PROMPT_INPUTS) and len(shape) == 2)
    return next((shape[1] for shape in shapes), None)


def kind_names(kinds: Iterable[str]) -> list[str]:
    """Returns the names of parts for users."""
    names = {**KIND_NAMES, ANY: Message("plan.kind.text_encoder"), VAE_KIND: "VAE"}
    return [names[kind] for kind in kinds]
