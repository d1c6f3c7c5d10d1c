"""Reads LoRA files: which tensors belong to one adapter, and which module they name.

Names, from the trainers' own files: kohya (`lora_unet_a_b.lora_down.weight`), PEFT and diffusers
(`transformer.a.b.lora_A.weight`), LyCORIS (`...hada_w1_a`, `...lokr_w1`), whole differences (`...diff`, `...diff_b`).
The format is safetensors only: a pickle can run any code.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import LoraFileError, LoraMismatchError
from .base import Adapter, own_copy
from .loha import LohaAdapter
from .lokr import LokrAdapter
from .lora import LoraAdapter
from .whole import DiffAdapter

Tensors = Mapping[str, torch.Tensor]

_FIELDS = {
    **{f"{up}.weight": ("lora", "up") for up in ("lora_up", "lora_B", "lora.up")},
    **{f"{down}.weight": ("lora", "down") for down in ("lora_down", "lora_A", "lora.down")},
    "lora_mid.weight": ("lora", "mid"),
    **{f"hada_w{side}_{ab}": ("loha", f"w{side}{ab}") for side in (1, 2) for ab in "ab"},
    **{f"hada_t{side}": ("loha", f"t{side}") for side in (1, 2)},
    **{f"lokr_w{side}": ("lokr", f"w{side}") for side in (1, 2)},
    **{f"lokr_w{side}_{ab}": ("lokr", f"w{side}{ab}") for side in (1, 2) for ab in "ab"},
    "lokr_t2": ("lokr", "t2"),
    "diff": ("diff", "diff"),
    "diff_b": ("bias", "diff"),
    "alpha": ("scale", "alpha"),
    "dora_scale": ("scale", "magnitude"),
    "lora_magnitude_vector": ("scale", "magnitude"),
}
"""The end of a key -> (kind of adapter, field of it). "scale" fields belong to whichever kind is there."""

_KINDS: dict[str, type[Adapter]] = {"lora": LoraAdapter, "loha": LohaAdapter, "lokr": LokrAdapter, "diff": DiffAdapter}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What one file says. `adapters` maps (module name as written in the file, "weight" or "bias") to an adapter."""

    path: Path
    adapters: Mapping[tuple[str, str], Adapter]
    unknown_keys: tuple[str, ...]


def read_lora_file(path: str | Path) -> LoraFile:
    """Reads a LoRA file into our own memory and closes it. Raises LoraFileError with the file's name and what to do."""
    path = Path(path)
    if not path.is_file():
        raise LoraFileError(f"{path}: no such file; check the name or refresh the list")
    if path.suffix.lower() != ".safetensors":
        raise LoraFileError(
            f"{path.name}: expected a .safetensors file; convert it first, other formats can carry code that runs on loading"
        )
    tensors, key = {}, ""
    try:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # safe_open has no iterator of its own
                tensors[key] = own_copy(file.get_tensor(key))
    except LoraMismatchError as error:
        raise LoraFileError(f"{path.name}: {key}: {error}") from None
    except (SafetensorError, OSError) as error:
        raise LoraFileError(f"{path.name}: not a readable safetensors file ({error}); download it again") from error
    return parse_tensors(path, tensors)


def parse_tensors(path: Path, tensors: Tensors) -> LoraFile:
    """Groups the tensors of one file into adapters."""
    groups: dict[str, dict[str, dict[str, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    unknown = []
    for written, tensor in tensors.items():
        # PEFT puts the adapter's own name between: lora_A.default.weight, lora_A.style.weight.
        key = re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", written)
        for suffix, (kind, field) in _FIELDS.items():
            if key.endswith("." + suffix):
                groups[key[: -len(suffix) - 1]][kind][field] = tensor
                break
        else:
            unknown.append(written)
    adapters: dict[tuple[str, str], Adapter] = {}
    for module, kinds in groups.items():
        scale: dict[str, Any] = dict(kinds.pop("scale", {}))
        if "alpha" in scale:
            if scale["alpha"].numel() != 1:
                raise LoraFileError(
                    f"{path.name}: {module}.alpha has {scale['alpha'].numel()} values instead of one; the file is damaged"
                )
            scale["alpha"] = float(scale["alpha"])
        if "bias" in kinds:
            adapters[module, "bias"] = DiffAdapter(kinds.pop("bias")["diff"])
        if len(kinds) > 1:
            raise LoraFileError(
                f"{path.name}: {module} is described as {' and '.join(sorted(kinds))} at once; the file is damaged"
            )
        for kind, fields in kinds.items():
            try:
                adapters[module, "weight"] = _KINDS[kind](**fields, **({} if kind == "diff" else scale))
            except TypeError as error:
                raise LoraFileError(f"{path.name}: {module} is incomplete ({error}); download the file again") from None
    if not adapters:
        raise LoraFileError(f"{path.name}: no LoRA keys found among {len(tensors)} tensors; is this a checkpoint?")
    return LoraFile(path, adapters, tuple(unknown))


_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "text_encoder.",
    "lora_unet_", "lora_transformer_", "lora_te1_", "lora_te2_", "lora_te_", "lycoris_",
)  # fmt: skip


def module_finder(module_names: Iterable[str]) -> Callable[[str], str | None]:
    """A function from a module name in a file to the model's own, or None. Dots and underscores count as equal."""
    by_flat_name: dict[str, str | None] = {}
    for name in module_names:
        flat = name.replace(".", "_")
        # Two modules that differ in dots alone cannot be told apart: neither is guessed.
        by_flat_name[flat] = None if flat in by_flat_name else name

    def find(name: str) -> str | None:
        candidates = [name]
        for prefix in _PREFIXES:
            candidates += [c[len(prefix) :] for c in candidates if c.startswith(prefix)]
        return next((found for c in candidates if (found := by_flat_name.get(c.replace(".", "_"))) is not None), None)

    return find
