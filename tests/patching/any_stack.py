"""A small model in any storage, every patch that fits it, and the weights that a stack of them should give, in float64."""

import random
from dataclasses import dataclass

import torch
from support.gguf_by_hand import BY_HAND
from support.make import Block, host_value, rand

from lib_lora_guard.adapters import BoftAdapter, Ia3Adapter, OftAdapter, PeftOftAdapter, parse_term
from lib_lora_guard.weights import (
    GGUF_DECODERS,
    Nf4Codec,
    PlainCodec,
    Q4_0Codec,
    Q8_0Codec,
    ScaledFp8Codec,
    StoredLinear,
)

WIDTH, WIDE = 32, 256
"""WIDE columns are a whole K-quant block; the other layers take the formats of 32 values a block."""


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.entry = torch.nn.Linear(WIDE, WIDTH)
        self.block = Block(WIDTH)
        self.shift = torch.nn.Parameter(torch.zeros(WIDTH))
        for n, parameter in enumerate(self.parameters()):
            scale = 0.06 if parameter.shape == (WIDTH, WIDE) else 0.18
            parameter.data.copy_(rand(*parameter.shape, seed=1000 + n, scale=scale))
        self.block.norm.weight.data += 1
        self.requires_grad_(False)

    def forward(self, x):
        return self.block(self.entry(x)) + self.shift.to(x.dtype)


def k_quants(shape, bias):
    """A layer of Q4_K blocks written by hand, brought to the size of a common weight: it can only be decoded."""
    rng = random.Random(7)
    rows = [[BY_HAND["Q4_K"](rng)[0] for _ in range(shape[1] // 256)] for _ in range(shape[0])]
    data = torch.tensor([[byte for block in row for byte in block] for row in rows], dtype=torch.uint8)
    # The first two fp16 numbers of a block scale all of it.
    scales = data.view(shape[0], -1, 144)[:, :, :4].contiguous().view(torch.float16)
    scales.mul_(0.01)
    data.view(shape[0], -1, 144)[:, :, :4] = scales.view(torch.uint8)
    return StoredLinear.from_parts(GGUF_DECODERS["Q4_K"], {"data": data}, shape, bias)


def coded(codec):
    return lambda weight, bias: StoredLinear(codec, weight, bias)


def bytes_of_a_file(weight, bias):
    data = weight.contiguous().view(torch.uint8).clone()
    return StoredLinear.from_parts(PlainCodec(torch.float32, "F32"), {"data": data}, weight.shape, bias)


STORAGES = {
    "fp32": None,
    "F32": bytes_of_a_file,
    "bf16": coded(PlainCodec(torch.bfloat16, "bf16")),
    "fp16": coded(PlainCodec(torch.float16, "fp16")),
    "fp8": coded(ScaledFp8Codec()),
    "Q8_0": coded(Q8_0Codec()),
    "Q4_0": coded(Q4_0Codec()),
}


STORAGES_OF_WIDE_ROWS = {**STORAGES, "nf4": coded(Nf4Codec()), "Q4_K": lambda w, b: k_quants(w.shape, b)}


NARROW = {"fp8", "Q8_0", "Q4_0", "nf4", "Q4_K"}


LINEARS = {"entry": STORAGES_OF_WIDE_ROWS, "block.qkv": STORAGES, "block.proj": STORAGES}


def build(storages):
    """`storages`: format by layer; "shift" may be fp8, a small parameter that no LoRA survives in."""
    model = Model()
    for name, storage in storages.items():
        if name == "shift":
            model.shift.data = model.shift.data.to(torch.float8_e4m3fn)
        elif STORAGES_OF_WIDE_ROWS[storage] is not None:
            owner, _, child = name.rpartition(".")
            layer = model.get_submodule(name)
            made = STORAGES_OF_WIDE_ROWS[storage](layer.weight.data, layer.bias.data)
            setattr(model.get_submodule(owner), child, made)
    return model


SHAPES = {name: tuple(p.shape) for name, p in Model().named_parameters()}


X = rand(2, 4, WIDE, seed=5)


IN_FLOAT64 = Model().double()


def cayley(skew):
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def oft_reference(weight, strength, content):
    """Block after block of rows: `W + s (Q^T - I) W`."""
    (blocks,), rows = content, weight.flatten(1).clone()
    size = blocks.shape[1]
    for n, block in enumerate(blocks.to(weight)):
        part = slice(n * size, (n + 1) * size)
        turn = cayley(block - block.T).T
        rows[part] += strength * (turn @ rows[part] - rows[part])
    return rows.reshape(weight.shape)


def peft_oft_reference(weight, strength, content):
    """Columns turned by the exact transform of each block."""
    (packed,), columns = content, weight.flatten(1).clone()
    size = columns.shape[1] // packed.shape[0]
    for n, numbers in enumerate(packed.to(weight)):
        skew, place = weight.new_zeros(size, size), 0
        for i in range(size):
            for j in range(i + 1, size):
                skew[i, j], skew[j, i] = numbers[place], -numbers[place]
                place += 1
        part = slice(n * size, (n + 1) * size)
        columns[:, part] += strength * (columns[:, part] @ cayley(skew) - columns[:, part])
    return columns.reshape(weight.shape)


def boft_reference(weight, strength, content):
    """Stage after stage: a shuffle of the rows as a list of places, blocks of rows, the shuffle back."""
    (blocks,), rows = content, weight.flatten(1).clone()
    for stage, turns in enumerate(blocks.to(weight)):
        size = turns.shape[-1]
        half = 2**stage * (size // 2)
        order = [
            start + side * half + n for start in range(0, len(rows), 2 * half) for n in range(half) for side in (0, 1)
        ]
        mixed = rows[order]
        for n, block in enumerate(turns):
            part = slice(n * size, (n + 1) * size)
            mixed[part] += strength * (cayley(block - block.T) @ mixed[part] - mixed[part])
        rows[order] = mixed.clone()
    return rows.reshape(weight.shape)


def ia3_reference(on_input):
    def apply(weight, strength, content):
        (numbers,) = content
        axis = [1] * weight.dim()
        axis[int(on_input)] = -1
        return weight * (1 + strength * numbers.to(weight).reshape(axis))

    return apply


OWN = {
    "oft": (oft_reference, lambda blocks: OftAdapter(blocks)),
    "peft_oft": (peft_oft_reference, lambda packed: PeftOftAdapter(packed, terms=None)),
    "boft": (boft_reference, lambda blocks: BoftAdapter(blocks)),
    "ia3_rows": (ia3_reference(False), lambda numbers: Ia3Adapter(numbers, on_input=False)),
    "ia3_columns": (ia3_reference(True), lambda numbers: Ia3Adapter(numbers, on_input=True)),
}


REFERENCES = {kind: reference for kind, (reference, _) in OWN.items()}


def turn_rows(delta):
    """A permutation of rows, as the host has it for (shift, scale): bypass can carry it."""
    half = delta.shape[0] // 2
    return torch.cat([delta[half:], delta[:half]])


def halve(delta):
    """No permutation: only the weight side can carry it."""
    return delta * 0.5


@dataclass(frozen=True)
class Patch:
    """`[strength, value, strength_model, offset, function]` of the host without the strength."""

    value: object
    model: float = 1.0
    offset: tuple[int, int, int] | None = None
    function: object = None

    def entry(self, strength):
        return [strength, self.value, self.model, self.offset, self.function]

    def term(self, strength, origin):
        kind = self.value[0] if isinstance(self.value, tuple) else None
        if isinstance(kind, str) and kind in OWN:
            return parse_term(
                [strength, ("lora_guard", (self.adapter,)), self.model, self.offset, self.function], {}, origin
            )
        return parse_term(self.entry(strength), {}, origin)

    @property
    def adapter(self):
        return ADAPTERS.setdefault(id(self.value), OWN[self.value[0]][1](*self.value[1]))


ADAPTERS = {}
"""One adapter object per value, as a host that keeps a parsed file has."""


def variants(key):
    """Every patch that fits `key`, by name, as functions of a seed."""
    shape = SHAPES[key]
    if len(shape) == 1:
        small = {
            "diff": lambda s: Patch((rand(*shape, seed=s, scale=0.1),)),
            "set": lambda s: Patch(("set", (rand(*shape, seed=s, scale=0.3),))),
        }
        return small if not key.endswith("bias") else {**small, "ia3": lambda s: Patch(("ia3_rows", (rand(*shape, seed=s, scale=0.2),)))}  # fmt: skip
    out, inner = shape[:2]

    def value(kind, at=shape, **more):
        return lambda s: Patch(host_value(kind, at, s, **more))

    def changed(kind, at=shape, model=1.0, offset=None, function=None, **more):
        return lambda s: Patch(host_value(kind, at, s, **more), model, offset, function)

    found = {
        "lora": value("lora"),
        "lora_rank_1": value("lora", rank=1, alpha=None),
        "lora_model": changed("lora", model=0.7),
        "lora_rows": changed("lora", (out // 2, *shape[1:]), offset=(0, out // 4, out // 2)),
        "lora_columns": changed("lora", (out, inner // 2, *shape[2:]), offset=(1, inner // 4, inner // 2)),
        "lora_turned": changed("lora", function=turn_rows),
        "lora_halved": changed("lora", function=halve),
        "dora_rows": value("lora", dora="output"),
        "dora_columns": value("lora", dora="input") if out != inner else value("lora", dora="output"),
        "dora_model": changed("lora", model=0.8, dora="output"),
        "loha": value("loha", rank=2),
        "loha_large": value("loha", rank=9),
        "loha_rows": changed("loha", (out // 2, *shape[1:]), offset=(0, 0, out // 2), rank=2),
        "lokr": value("lokr"),
        "lokr_rows": changed("lokr", (out // 2, *shape[1:]), offset=(0, out // 2, out // 2)),
        "lokr_dora": value("lokr", dora="output"),
        "diff": value("diff"),
        "diff_rows": changed("diff", (out // 2, *shape[1:]), offset=(0, 0, out // 2)),
        "set": value("set"),
        "nested": value("nested"),
        "oft": lambda s: Patch(("oft", (rand(out // 4, 4, 4, seed=s, scale=0.2),))),
        "boft": lambda s: Patch(("boft", (rand(2, out // 4, 4, 4, seed=s, scale=0.2),))),
        "ia3_rows": lambda s: Patch(("ia3_rows", (rand(out, seed=s, scale=0.3),))),
        "ia3_columns": lambda s: Patch(("ia3_columns", (rand(inner, seed=s, scale=0.3),))),
    }
    if len(shape) == 2:
        found |= {
            "lokr_factors": value("lokr_factors"),
            "lokr_left": value("lokr_left"),
            "glora": value("glora"),
            "glora_old": value("glora_old"),
            "glora_dora": value("glora", dora="output"),
            "loha_dora": value("loha", dora="output"),
            "peft_oft": lambda s: Patch(("peft_oft", (rand(inner // 4, 6, seed=s, scale=0.2),))),
        }
    else:
        found |= {
            "lora_mid": value("lora_mid"),
            "lora_mid_dora": value("lora_mid", dora="output"),
            "loha_mid": value("loha_mid"),
            "lokr_mid": value("lokr_mid"),
            "glora_conv": value("glora_conv"),
        }
    return found


VARIANTS = {key: variants(key) for key in SHAPES}


PATCHES = {}


def patch_of(key, variant, seed):
    """The same objects whenever the same patch is asked for: an engine knows tensors by what they are."""
    place = (key, variant, seed)
    if place not in PATCHES:
        PATCHES[place] = VARIANTS[key][variant](sorted(SHAPES).index(key) * 100 + seed)
    return PATCHES[place]


MISFIT = Patch(host_value("lora", (WIDTH, WIDTH + 1), 1))
