"""One LoRA file from a random number: modules, spellings, dtypes, settings, and what is wrong with it."""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import container, dtypes, models, modules, names, settings
from .container import Entry


@dataclass
class FuzzFile:
    """A file and what is known of it.

    Attributes:
        model, storage: The model it is for.
        wanted: Parameters with the functions that give their patched weights, where these are known.
        must_apply: Every trainer's program would apply it.
        facts: What it is made of, for the counts of a run.
    """

    path: Path
    model: str
    storage: str
    header_bytes: int = 0
    tensor_bytes: int = 0
    wanted: list | None = None
    must_apply: bool = False
    facts: Counter = field(default_factory=Counter)


MUTATIONS = (
    "drop", "transpose", "scalar", "vector", "empty", "extra_dim", "wider", "huge_rank", "nan", "inf", "huge", "zero", "tiny", "alpha",
    "rank", "swap", "many_values", "renamed", "dims_1",
)  # fmt: skip


OFF = ("damage", "wrong", "settings", "dtypes", "spelling", "places", "kinds", "twice")
"""In what a file may be other than a trainer's."""


def make_file(folder, rng: random.Random) -> FuzzFile:
    """Of ten files three are sound, five are wrong in one thing, two in several."""
    model, storage = models.choose(rng)
    file = FuzzFile(folder / "x.safetensors", model, storage)
    kind = rng.random()
    off = set() if kind < 0.3 else {rng.choice(OFF)} if kind < 0.8 else {one for one in OFF if rng.random() < 0.35}
    file.facts.update(f"off: {one}" for one in off or ("nothing",))
    tensors, wanted, more = _tensors(rng, file, off)
    if "wrong" in off:
        _mutate(rng, tensors, file)
    damage = rng.choice(list(container.DAMAGE)) if "damage" in off and tensors else container.INTACT
    if damage:
        file.facts[f"damage: {damage}"] += 1
    written, config = settings.metadata(rng, more, "settings" in off)
    if written or config:
        file.facts["settings"] += 1
    if not (off & {"damage", "wrong", "settings", "twice"} or more or config or written.keys() - {"format"}):
        file.wanted = wanted
    file.must_apply = not off
    entries = []
    for name, (tensor, dtype, is_fixed) in tensors.items():
        dtype, raw, _ = dtypes.encoded(tensor, dtype, rng) if not is_fixed else (*_as_it_is(tensor), None)
        entries.append(Entry(name, dtype, list(tensor.shape), raw))
        file.facts[f"dtype: {dtype}"] += 1
    if rng.random() < 0.5:
        rng.shuffle(entries)
    if config is not None:
        file.path = folder / "adapter_model.safetensors"
        (folder / "adapter_config.json").write_text(config, encoding="utf-8", errors="replace")
    elif rng.random() < 0.05:
        file.path = folder / rng.choice(ODD_NAMES)
    made = container.file_bytes(entries, written, damage, rng)
    file.path.write_bytes(made)
    length = int.from_bytes(made[:8], "little")
    file.header_bytes, file.tensor_bytes = min(length, len(made)), len(made)
    return file


ODD_NAMES = (
    "b\u00f6se \U0001f4a5.safetensors",
    "a b'(1).safetensors",
    "-x.safetensors",
    "x" * 200 + ".safetensors",
    "x.sft",
    "x",
)


def _as_it_is(tensor):
    known = {torch.bool: "BOOL", torch.float32: "F32"}
    return known[tensor.dtype], tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _dtype_chooser(rng, is_odd):
    """One dtype for the factors of a file, or one for each tensor."""
    one = rng.choice(dtypes.ALL if is_odd else ("F32", "F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2"))
    return (lambda: rng.choice(dtypes.ALL)) if is_odd and rng.random() < 0.3 else lambda: one


def _fitting(place):
    """Kinds that have a place in a module."""
    if len(place.shape) < 2 or 0 in place.shape:
        kinds = ("diff", "set_weight") if place.key.endswith((".weight", ".scale")) else ("diff",)
    elif not place.is_plain:
        kinds = ("diff",)
    else:
        kinds = (
            *SOUND,
            "lora",
            "lora",
            *(("lora_mid", "loha_tucker") if len(place.shape) > 2 else ("glora", "oft_of_peft")),
        )
        kinds += ("boft",) * (place.shape[0] % 4 == 0) + ("boft_of_peft",) * (
            place.shape[1] % 4 == 0 and len(place.shape) == 2
        )
    return (*kinds, "bias") if place.has_bias and place.rows is None else kinds


SOUND = ("lora", "dora", "loha", "lokr", "oft", "ia3", "diff", "set_weight")
"""Kinds for every linear layer and convolution."""


def _tensors(rng, file, off):
    """`{name: (tensor, dtype, written as it is)}`, the formulas or None, and settings that belong to it."""
    values, places = modules.Values(rng), models.places_of(file.model)
    chosen = rng.sample(places, min(rng.choice((1, 1, 2, 3, 6, 20)), len(places)))
    only = rng.choice(list(modules.KINDS)) if rng.random() < 0.5 else None
    spelling = rng.choice(list(names.SPELLINGS) if "spelling" in off else sorted(names.WITH_PLACE))
    dtype = _dtype_chooser(rng, "dtypes" in off)
    mixed, is_flat = "spelling" in off and rng.random() < 0.2, "spelling" in off and rng.random() < 0.15
    tensors, more, wanted, parts = {}, {}, [], {}
    for place in chosen:
        if not off & {"places", "kinds"} and parts.setdefault(place.key, place.rows) != place.rows:
            continue
        allowed = list(modules.KINDS) if off & {"places", "kinds"} else _fitting(place)
        if "kinds" in off and rng.random() < 0.5:
            allowed = (
                "other",
                "lonely",
                "scalar",
                "embedding",
                "lora_bias",
                "ia3_of_peft",
                "whole",
                "saved",
                "set_bias",
                "oft_of_parts",
                "oft_ready",
            )
        kind = only if only in allowed else rng.choice(allowed)
        made = modules.make(kind, values, rng, place.shape)
        more |= made.more
        written = rng.choice(list(names.SPELLINGS)) if mixed else spelling
        if "spelling" not in off:
            written = names.for_place(written, place, file.model)
        file.facts.update((f"kind: {kind}", f"spelling: {written}"))
        field_dtype, numbers = dtype(), {}
        for end, tensor in made.tensors.items():
            one = field_dtype if "dtypes" not in off or rng.random() < 0.9 else dtype()
            if end in made.singles and ("dtypes" not in off or rng.random() < 0.8):
                one = rng.choice(("F32", "F32", "F16", "BF16", "I64", "F64"))
            if one == "I64":
                tensor = tensor / 30
            tensors[names.key(written, place.name, end, is_flat)] = (tensor, one, end in made.fixed)
            numbers[end] = tensor.double() if end in made.fixed else dtypes.encoded(tensor, one, rng)[2]
        if made.wanted is not None and all(number is not None for number in numbers.values()):
            wanted.append(
                (place.key if made.parameter == "weight" else f"{place.name}.bias", place.rows, made.wanted, numbers)
            )
    if "twice" in off and tensors:
        _say_twice(rng, tensors)
    if off & {"spelling", "places", "kinds", "dtypes"} or file.storage != "fp32":
        wanted = None
    return tensors, wanted, more


def _say_twice(rng, tensors):
    """The same modules in another spelling: all of them, or one field; the same tensors, or others."""
    before = list(tensors)
    for name in before if rng.random() < 0.5 else [rng.choice(before)]:
        tensor, dtype, fixed = tensors[name]
        other = rng.choice(("module.", "base_model.model.", "lora_unet_", "diffusion_model.")) + name
        if "." in name and rng.random() < 0.5:
            module, _, end = name.partition(".lora") if ".lora" in name else name.rpartition(".")
            other = f"lora_unet_{module.replace('.', '_')}." + (f"lora{end}" if ".lora" in name else end)
        tensors.setdefault(
            other,
            (tensor if rng.random() < 0.5 else tensor * 2 if tensor.dtype != torch.bool else tensor, dtype, fixed),
        )


def _mutate(rng, tensors, file):
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not tensors:
            return
        how, name = rng.choice(MUTATIONS), rng.choice(list(tensors))
        file.facts[f"wrong: {how}"] += 1
        tensor, dtype, fixed = tensors[name]
        tensor = _changed(how, rng, tensor)
        if how == "drop":
            del tensors[name]
            continue
        if how == "renamed":
            del tensors[name]
            name = name + rng.choice(("x", ".weight", ".0", "_")) if rng.random() < 0.5 else name[1:]
        elif how == "swap":
            other = rng.choice(list(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
            continue
        elif how == "alpha":
            name = name.rpartition(".")[0] + ".alpha"
            tensor, dtype = (
                torch.tensor(rng.choice((0.0, -4.0, 1e30, 3e38, float("nan"), float("inf"), 1e-40))),
                rng.choice(("F32", "F64", "F16", "BF16")),
            )
        if how == "huge" and dtype in dtypes.FLOATS and rng.random() < 0.5:
            tensor, dtype = tensor.double() * 1e60, "F64"
        tensors[name] = (
            tensor,
            dtype,
            False if how == "alpha" else fixed and tensor.dtype in (torch.bool, torch.float32),
        )


def _changed(how, rng, tensor):
    shape = tensor.shape
    if how == "transpose":
        return tensor.mT.contiguous() if tensor.dim() > 1 else tensor
    if how == "scalar":
        return tensor.flatten()[0].clone() if tensor.numel() else tensor
    if how == "vector":
        return tensor.flatten()
    if how == "empty":
        return tensor[..., :0] if tensor.dim() else torch.zeros(0)
    if how == "extra_dim":
        return tensor[None] if rng.random() < 0.5 else tensor[..., None]
    if how == "dims_1":
        return tensor.reshape(*shape, *[1] * rng.choice((1, 2, 4)))
    if how == "wider":
        return torch.cat([tensor, tensor], rng.randrange(tensor.dim())) if tensor.dim() else tensor
    if how == "huge_rank" and tensor.dim() == 2:
        return tensor.repeat_interleave(rng.choice((16, 200)), rng.randrange(2))
    if how == "rank" and tensor.dim() > 1 and tensor.numel():
        return tensor.narrow(rng.randrange(2), 0, 1).clone()
    if how == "many_values":
        return torch.zeros(rng.choice((2, 3, 7, 1000)))
    if how in ("nan", "inf", "huge") and tensor.numel() and tensor.is_floating_point():
        tensor = tensor.clone()
        tensor.view(-1)[rng.randrange(tensor.numel())] = {"nan": float("nan"), "inf": float("inf"), "huge": 3e38}[how]
    if how == "zero":
        return torch.zeros_like(tensor)
    if how == "tiny":
        return tensor * 1e-38 if tensor.is_floating_point() else tensor
    return tensor


def good_file(path, model):
    """A sound LoRA on two modules of a model, for the places before and behind the one that is looked at."""
    rng = random.Random(f"good {model} {path.name}")
    values = modules.Values(rng)
    pairs = [p for p in models.places_of(model) if p.is_plain and p.rows is None and len(p.shape) == 2][:2]
    entries = []
    for place in pairs:
        for end, tensor in modules.lora(values, rng, place.shape, "kohya").tensors.items():
            dtype, raw, _ = dtypes.encoded(tensor, "F32", rng)
            entries.append(Entry(names.key("kohya", place.name, end), dtype, list(tensor.shape), raw))
    path.write_bytes(container.file_bytes(entries, {}))
    return path


def describe(path):
    """The header of a file in a line, as far as it can be read."""
    try:
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        return str({k: (v if k == "__metadata__" else (v["dtype"], v["shape"])) for k, v in header.items()})[:1500]
    except Exception as error:
        return f"{type(error).__name__}: no readable header"
