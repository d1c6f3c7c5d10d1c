"""Reads LoRA files into adapters, one per weight. The file is closed again before anything is made of it.

Files are safetensors only: a pickle can run any code. `file_keys` knows the names, `file_settings` what a file says
beside its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import FileFormatError, Joined, LoraFileError, LoraMismatchError, Message, about, reason
from ..files import TensorEntry, open_header, read_tensors, shown
from ..files.safetensors_file import FORMATS
from .base import Adapter, check_values
from .boft import BoftAdapter, PeftBoftAdapter
from .file_keys import meaning_of
from .file_settings import FileSettings, PeftSettings, settings_of
from .glora import GloraAdapter
from .ia3 import Ia3Adapter
from .loha import LohaAdapter
from .lokr import LokrAdapter
from .lora import LoraAdapter
from .oft import OftAdapter, PeftOftAdapter
from .whole import DiffAdapter, SetAdapter

Tensors = Mapping[str, torch.Tensor]
Fields = dict[str, Any]


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What one file says. `adapters` maps (module name as written in the file, "weight" or "bias") to an adapter."""

    path: Path
    adapters: Mapping[tuple[str, str], Adapter]
    unknown_keys: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of all tensors by their names in the file: by these it is told which model the file was made for."""
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_lora_file(path: str | Path, as_trained: bool = False) -> LoraFile:
    """Reads a LoRA file into our own memory and closes it. Raises LoraFileError with the file's name and what to do.

    `as_trained`: DoRA in the meaning of its trainer where the host's differs.
    """
    return _read(Path(path), as_trained, values=True)


def read_lora_header(path: str | Path) -> LoraFile:
    """The same from the header alone: the adapters have shapes and dtypes, on torch's meta device, and no values. Only
    the single numbers (alpha) are read. Raises LoraFileError."""
    return _read(Path(path), as_trained=False, values=False)


def _read(path: Path, as_trained: bool, values: bool) -> LoraFile:
    try:
        header = open_header(path)
        if header.container != "safetensors":
            raise _refusal(shown(path.name), Message("lora.container", {"container": header.container}))
        wanted = [name for name, entry in header.tensors.items() if values or _is_number(name, entry.shape)]
        tensors = read_tensors(header, wanted)
        if not values:
            tensors = {name: tensors.get(name, _without_values(entry)) for name, entry in header.tensors.items()}
    except LoraFileError:
        raise
    except FileFormatError as error:
        raise LoraFileError(reason(error)) from error
    file = parse_tensors(path, tensors, settings_of(path, header.metadata), as_trained)
    return replace(file, metadata=header.metadata)


def _is_number(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith((".alpha", ".on_input", ".scalar")) and math.prod(shape) == 1


def _without_values(entry: TensorEntry) -> torch.Tensor:
    dtype = getattr(torch, FORMATS[entry.format][1] or "uint8", torch.uint8)
    return torch.empty(entry.shape, dtype=dtype, device="meta")


def parse_tensors(
    path: Path, tensors: Tensors, settings: FileSettings | None = None, as_trained: bool = False
) -> LoraFile:
    """Groups the tensors of one file into adapters. Raises LoraFileError for a file that contradicts itself."""
    settings = settings or FileSettings({})
    name = shown(path.name)
    groups, unknown = _group(name, tensors)
    adapters: dict[tuple[str, str], Adapter] = {}

    def put(module: str, parameter: str, adapter: Adapter) -> None:
        if (module, parameter) in adapters:
            raise _refusal(name, Message("lora.two_changes", {"module": shown(module), "parameter": parameter}))
        adapters[module, parameter] = adapter

    for module, kinds in groups.items():
        scale = kinds.pop("scale", {})
        if not kinds:
            unknown += [f"{module}.{key}" for key in scale]
            continue
        weights = [kind for kind in kinds if kind not in ("bias", "lora_bias", "set_bias")]
        if len(weights) > 1:
            kinds_found = Joined(sorted(weights), "list.and")
            raise _refusal(name, Message("lora.two_kinds", {"module": shown(module), "kinds": kinds_found}))
        peft = settings.of(module)
        try:
            weight = _KINDS[weights[0]](kinds[weights[0]], _number_fields(scale), peft, module) if weights else None
            whole = weight is None or isinstance(weight, (DiffAdapter, SetAdapter))
            if weight is not None and not whole and any(tensor.dim() == 0 for tensor in weight.tensors()):
                raise LoraMismatchError.of("lora.single_number")
            bias_scale = weight.scale if isinstance(weight, LoraAdapter) else 1.0
        except (TypeError, KeyError) as error:
            facts = {"module": shown(module), "kind": weights[0], "missing": _missing(error)}
            raise _refusal(name, Message("lora.incomplete", facts)) from None
        except (LoraMismatchError, IndexError, RuntimeError, ZeroDivisionError) as error:
            found = [list(t.shape) for t in kinds[weights[0]].values()]
            facts = {"module": shown(module), "found": str(found), "kind": weights[0], "why": _one_line(error)}
            raise _refusal(name, Message("lora.not_factors", facts)) from None
        if weight is not None:
            if as_trained and getattr(weight, "magnitude", None) is not None:
                weight = replace(weight, as_trained=True)  # type: ignore[call-arg]  # what has a magnitude has this too
            put(module, "weight", weight)
            if weights == ["peft_ia3"] and isinstance(weight, Ia3Adapter) and not weight.on_input:
                # PEFT's factors are for the layer's whole output.
                put(module, "bias", weight)
        if "bias" in kinds:
            put(module, "bias", DiffAdapter(**kinds["bias"]))
        if "lora_bias" in kinds:
            put(module, "bias", DiffAdapter(**kinds["lora_bias"], scale=bias_scale))
        if "set_bias" in kinds:
            put(module, "bias", SetAdapter(**kinds["set_bias"]))
    if not adapters:
        raise _refusal(name, Message("lora.none", {"count": len(tensors)}))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return LoraFile(path, adapters, tuple(unknown), shapes)


def _group(name: str, tensors: Tensors) -> tuple[dict[str, dict[str, Fields]], list[str]]:
    """Fields by module and kind, and the keys that are none."""
    groups: dict[str, dict[str, Fields]] = {}
    written: dict[tuple[str, str, str], str] = {}
    unknown = []
    # BFL's control LoRAs carry whole norms beside their factors.
    has_norms = "img_in.lora_A.weight" in tensors and "single_blocks.0.norm.key_norm.scale" in tensors
    for key, tensor in tensors.items():
        meaning = meaning_of(key)
        if meaning is not None:
            module, kind, field_name = meaning.module, meaning.kind, meaning.field
        elif key.endswith(".weight") and f"{key[:-7]}.on_input" in tensors:
            module, kind, field_name = key[:-7], "ia3", "weight"
        elif has_norms and key.endswith("_norm.scale"):
            module, kind, field_name = key[: -len(".scale")], "set", "value"
        else:
            unknown.append(key)
            continue
        place = (module, kind, field_name)
        if place in written:
            raise _refusal(name, Message("lora.said_twice", {"first": shown(written[place]), "second": shown(key)}))
        written[place] = key
        try:
            check_values(tensor, whole_numbers=field_name in ("alpha", "on_input"))
        except LoraMismatchError as error:
            raise _refusal(name, about(shown(key), reason(error))) from None
        if field_name in ("alpha", "on_input") and tensor.numel() != 1:
            raise _refusal(name, Message("lora.several_values", {"key": shown(key), "count": tensor.numel()}))
        groups.setdefault(module, {}).setdefault(kind, {})[field_name] = tensor
    return groups, unknown


def _number_fields(scale: Mapping[str, torch.Tensor]) -> Fields:
    """alpha as a number; a LyCORIS `scalar` multiplies it."""
    fields: Fields = dict(scale)
    scalar = fields.pop("scalar", None)
    if "alpha" in fields:
        fields["alpha"] = float(fields["alpha"])
        if isinstance(scalar, torch.Tensor) and scalar.numel() == 1:
            fields["alpha"] *= float(scalar)
    rows = fields.pop("row_magnitude", None)
    if isinstance(rows, torch.Tensor):
        fields["magnitude"] = rows.flatten()
    return fields


def _refusal(name: str, what: Message) -> LoraFileError:
    return LoraFileError(about(name, what))


def _one_line(error: Exception) -> str:
    if isinstance(why := reason(error), Message):
        return why
    return shown(str(error).splitlines()[0]) if str(error) else type(error).__name__


def _missing(error: Exception) -> str:
    """The field that a dataclass or a dict did not find, in the words of the file."""
    text = str(error)
    return text.partition(":")[2].strip() or text


def _ranked(kind: Callable[..., Any], rank_of: Callable[[Any], int | None]) -> Callable[..., Adapter]:
    """LoRA-like kinds: without an alpha of its own a module takes that of the file's settings."""

    def make(fields: Fields, scale: Fields, peft: PeftSettings, module: str) -> Adapter:
        adapter: Adapter = kind(**fields, **scale)
        rank = rank_of(adapter)
        if "alpha" not in scale and rank:
            adapter = replace(adapter, alpha=peft.alpha_for(module, rank))  # type: ignore[call-arg]  # all ranked kinds have one
        return adapter

    return make


def _lokr(fields: Fields, scale: Fields, peft: PeftSettings, module: str) -> Adapter:
    adapter = LokrAdapter(**fields, **scale)
    if "alpha" in scale:
        return adapter
    factor = adapter.w2b if adapter.w2 is None and adapter.w2b is not None else adapter.w1b
    if factor is not None and (adapter.w1 is None or adapter.w2 is None):
        return replace(adapter, alpha=peft.alpha_for(module, factor.shape[0]))
    # PEFT scales whole sides too; LyCORIS, and with it the adapter, does not.
    rank = peft.rank_for(module)
    alpha = None if rank is None else peft.alpha_for(module, rank)
    if rank is None or alpha is None or adapter.w1 is None:
        return adapter
    return replace(adapter, w1=adapter.w1.float() * (alpha / rank))


def _glora(fields: Fields, scale: Fields, peft: PeftSettings, module: str) -> Adapter:
    core = fields.pop("core", None)
    if core is not None:
        # A Tucker core, multiplied into the factor that has the kernel without one.
        b2 = fields["b2"]
        made = core.shape[0] * b2[0].numel() * math.prod(core.shape[2:])
        if made > 64 * (core.numel() + b2.numel()):
            raise LoraMismatchError.of("lora.core")
        fields["b2"] = torch.einsum("ri...,ij->rj...", core, b2.flatten(1).to(core))
    return GloraAdapter(**fields, **scale)


def _oft(fields: Fields, scale: Fields, peft: PeftSettings, module: str) -> Adapter:
    scale.pop("magnitude", None)
    kind = BoftAdapter if fields["blocks"].dim() == 4 else OftAdapter
    return kind(**fields, **scale)


def _peft_oft(fields: Fields, scale: Fields, peft: PeftSettings, module: str) -> Adapter:
    return PeftOftAdapter(**fields, terms=peft.cayley_terms)


def _ia3(fields: Fields, scale: Fields, peft: PeftSettings, module: str) -> Adapter:
    return Ia3Adapter(fields["weight"], bool(fields["on_input"]))


def _peft_ia3(fields: Fields, scale: Fields, peft: PeftSettings, module: str) -> Adapter:
    weight = fields["weight"]
    # A linear layer's (1, in) and (out, 1) differ; a convolution's (1, n, 1, 1) does not say which it is.
    on_input = weight.dim() == 2 and weight.shape[0] == 1
    if weight.dim() != 2:
        on_input = bool(peft.is_feedforward(module))
    return Ia3Adapter(weight, on_input, centre=1.0)


def _whole(kind: Callable[..., Adapter]) -> Callable[..., Adapter]:
    return lambda fields, scale, peft, module: kind(**fields)


_KINDS: dict[str, Callable[[Fields, Fields, PeftSettings, str], Adapter]] = {
    "lora": _ranked(LoraAdapter, lambda a: a.down.shape[0] if a.down.dim() else None),
    "loha": _ranked(LohaAdapter, lambda a: a.w1b.shape[0] if a.w1b.dim() else None),
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "peft_oft": _peft_oft,
    "peft_boft": _whole(PeftBoftAdapter),
    "ia3": _ia3,
    "peft_ia3": _peft_ia3,
    "diff": _whole(DiffAdapter),
    "set": _whole(SetAdapter),
}
