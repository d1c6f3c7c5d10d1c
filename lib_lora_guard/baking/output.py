"""Checks the path of the new file and builds its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import LoraGuardError, Message, about
from ..files import FileHeader, shown
from ..version import __version__

SUFFIX = ".safetensors"
BAKED, VERSION = "lora_guard.baked", "lora_guard.version"

_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata")
"""Keys that are wrong for the new file: hashes of the old one's tensors."""
_GGUF_FACTS = "general."
_GGUF_STALE = ("general.alignment", "general.file_type", "general.quantization_version")
_READ_BYTES = 1 << 20


def check_output(output: Path, inputs: Sequence[Path], force: bool) -> None:
    """Checks where the new file may be written.

    Args:
        output: The new file.
        inputs: The files to read.
        force: Allows replacing an existing file.

    Raises:
        LoraGuardError: The suffix is wrong, the file is one of `inputs`, or it exists and `force` is False.
    """
    name = shown(output.name)
    if output.suffix.lower() != SUFFIX:
        raise LoraGuardError(about(name, Message("bake.needs_suffix", {"suffix": SUFFIX})))
    if not output.exists():
        return
    for path in inputs:
        if path.exists() and output.samefile(path):
            raise LoraGuardError(about(name, Message("bake.is_read")))
    if not force:
        raise LoraGuardError(about(name, Message("bake.is_there")))


def metadata_for(header: FileHeader, loras: Sequence[tuple[Path, float, str]]) -> dict[str, str]:
    """Returns the model's own metadata plus the baked LoRAs, in the order of the stack.

    Entries of an earlier baking stay in front.

    Args:
        header: The model's.
        loras: Path, strength and SHA-256 of each file.
    """
    kept = {key: text for key, text in header.metadata.items() if _is_kept(header, key)}
    baked = _baked_before(header.metadata)
    baked += [{"file": path.name, "strength": strength, "sha256": digest} for path, strength, digest in loras]
    said = {BAKED: json.dumps(baked, ensure_ascii=False), VERSION: __version__}
    return {"format": "pt", **kept, **said}


def _is_kept(header: FileHeader, key: str) -> bool:
    if header.container == "gguf":
        # The rest describes tokenizers and blocks; "[n values]" stands for arrays that were not read.
        return key.startswith(_GGUF_FACTS) and key not in _GGUF_STALE
    return key not in _STALE


def _baked_before(metadata: Mapping[str, str]) -> list[object]:
    try:
        found = json.loads(metadata.get(BAKED, "[]"))
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def sha256_of(path: Path) -> str:
    """Returns the hash in hexadecimal digits, as model sites show it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
