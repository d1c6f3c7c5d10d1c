"""Small models that the files are applied to, in every storage, with the names that files may have for their modules."""

import functools
import random
from dataclasses import dataclass

import torch
from support.make import Block, rand
from support.original_layouts import Checkpoint, bfl, ldm_unet, open_clip

from lib_lora_guard.weights import Nf4Codec, PlainCodec, Q4_0Codec, Q8_0Codec, ScaledFp8Codec, StoredLinear


@dataclass(frozen=True)
class Place:
    """A module that a file may patch.

    Attributes:
        name: Dotted, as in the model; "" for a bare parameter.
        shape: Of its weight, or of the parameter.
        key: The parameter.
        has_bias: A difference for its bias has a place.
        rows: `(first, count)` where the name means a part of the weight.
        is_plain: A linear layer or a convolution without groups: every kind of matrix fits.
    """

    name: str
    shape: tuple
    key: str
    has_bias: bool = False
    rows: tuple | None = None
    is_plain: bool = True


@functools.cache
def some(*shape, dtype=torch.float32):
    """Inputs of a layer."""
    return rand(*shape, seed=len(shape)).to(dtype)


class Zoo(torch.nn.Module):
    """One of every layer that people have: also those that no LoRA of a known trainer touches."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(32)])
        self.entry = torch.nn.Linear(256, 32)
        self.img_in = torch.nn.Linear(16, 24)
        self.conv1 = torch.nn.Conv1d(8, 12, 3)
        self.conv3 = torch.nn.Conv3d(4, 6, 2)
        self.grouped = torch.nn.Conv2d(8, 8, 3, groups=4)
        self.deep = torch.nn.Conv2d(8, 8, 3, groups=8, padding_mode="reflect", padding=1)
        self.strided = torch.nn.Conv2d(8, 16, 3, stride=2, dilation=2, padding="valid")
        self.back = torch.nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.group = torch.nn.GroupNorm(2, 8)
        self.table = torch.nn.Embedding(20, 16)
        self.attn = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.mix = torch.nn.Bilinear(4, 4, 8)
        self.temperature = torch.nn.Parameter(torch.tensor(0.5))
        self.pad = torch.nn.Parameter(torch.zeros(1, 16))
        self.nothing = torch.nn.Parameter(torch.zeros(0, 16))
        self.none = torch.nn.Parameter(torch.zeros(16, 0))
        fill(self)

    def forward(self, dtype):
        def x(*shape):
            return some(*shape, dtype=dtype)

        image = x(1, 8, 6, 6)
        tokens = x(1, 3, 16)
        return [
            self.blocks[0](self.entry(x(1, 4, 256))),
            self.img_in(tokens), self.conv1(x(1, 8, 5)), self.conv3(x(1, 4, 3, 3, 3)), self.grouped(image), self.deep(image),
            self.strided(image), self.back(image), self.group(image), self.table(torch.arange(20)),
            self.attn(tokens, tokens, tokens)[0], self.mix(x(2, 4), x(2, 4)), self.temperature * 1, self.pad + 0,
        ]  # fmt: skip


class Blocks(torch.nn.Module):
    """The model of the double of Forge, which is small enough that most files there meet it."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(32), Block(32)])
        fill(self)

    def forward(self, dtype):
        x = some(1, 4, 32, dtype=dtype)
        return [block(x) for block in self.blocks]


class Tree(torch.nn.Module):
    """Layers of given names and shapes; its forward pass calls each of them once."""

    def __init__(self, shapes):
        super().__init__()
        for key in shapes:
            owner, _, last = key.rpartition(".")
            if last == "weight" and len(shapes[key]) > 1:
                self._put(owner, _layer(shapes[key], f"{owner}.bias" in shapes))
        for key, shape in shapes.items():
            owner, _, last = key.rpartition(".")
            module = self._at(owner)
            if getattr(module, last, None) is None:
                setattr(module, last, torch.nn.Parameter(torch.zeros(shape)))
        fill(self)

    def _at(self, path):
        module = self
        for part in path.split(".") if path else ():
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        return module

    def _put(self, path, layer):
        owner, _, last = path.rpartition(".")
        self._at(owner).add_module(last, layer)

    def forward(self, dtype):
        found = []
        for layer in self.modules():
            if isinstance(layer, torch.nn.Conv2d):
                found.append(layer(some(1, layer.in_channels, 3, 3, dtype=dtype)))
            elif isinstance(layer, (torch.nn.Linear, StoredLinear)):
                found.append(layer(some(2, layer.in_features, dtype=dtype)))
            else:
                found += [p.float() for p in layer.parameters(recurse=False)]
        return found


def _layer(shape, bias):
    if len(shape) == 4:
        return torch.nn.Conv2d(shape[1], shape[0], shape[2:], padding=shape[2] // 2, bias=bias)
    return torch.nn.Linear(shape[1], shape[0], bias=bias)


def fill(model):
    for n, parameter in enumerate(model.parameters()):
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(n))
    model.requires_grad_(False).eval()


STORAGES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "scaled fp8": ScaledFp8Codec(),
    "Q8_0": Q8_0Codec(),
    "Q4_0": Q4_0Codec(),
    "NF4": Nf4Codec(),
    "F8 plain": PlainCodec(torch.float8_e4m3fn, "fp8"),
}
"""A dtype of the whole model, or a codec for the linear layers that fit it."""


def store(model, storage):
    how = STORAGES[storage]
    if isinstance(how, torch.dtype):
        return model.to(how)
    columns = {"NF4": 64, "scaled fp8": 1, "F8 plain": 1}.get(storage, 32)
    for path, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and layer.in_features % columns == 0:
            owner, _, last = path.rpartition(".")
            bias = None if layer.bias is None else layer.bias.data
            setattr(model.get_submodule(owner) if owner else model, last, StoredLinear(how, layer.weight.data, bias))
    return model


def _shapes(layers, convolutions=False):
    return Checkpoint(layers).shapes


@functools.cache
def shapes_of(name):
    if name in WRITTEN_OUT:
        return {k: tuple(p.shape) for k, p in WRITTEN_OUT[name]().named_parameters()}
    if name == "flux":
        return _shapes(bfl(HIDDEN, 1, 1))
    if name == "unet":
        found = {}
        for key, shape in _shapes(ldm_unet((4, 8), (1, 0), 1, 768, per_level=1)).items():
            kernel = (
                (3, 3)
                if len(shape) == 2
                and any(p in key for p in ("in_layers.2", "out_layers.3", ".op.", "input_blocks.0.0", ".conv."))
                else ()
            )
            found[key] = (*shape, *kernel)
        return found
    return _shapes(open_clip(32, 1))


HIDDEN = 32
"""Of the small Flux."""
WRITTEN_OUT = {"zoo": Zoo, "blocks": Blocks}
MODELS = ("zoo", "zoo", "zoo", "blocks", "blocks", "flux", "unet", "clip")


@functools.cache
def places_of(name):
    """Every module with a weight, every bare parameter, and names that mean a part of a fused weight."""
    shapes, found = shapes_of(name), []
    for key, shape in shapes.items():
        owner, _, last = key.rpartition(".")
        if last == "weight":
            plain = len(shape) > 1 and not any(
                word in owner for word in ("grouped", "deep", "back", "table", "mix", "token_embedding", "out_proj")
            )
            found.append(Place(owner, shape, key, shapes.get(f"{owner}.bias") == shape[:1], is_plain=plain))
        elif last != "bias":
            found.append(Place(key, shape, key, is_plain=False))
    if name == "flux":
        for n, part in enumerate(("to_q", "to_k", "to_v")):
            found.append(
                Place(
                    f"transformer_blocks.0.attn.{part}",
                    (HIDDEN, HIDDEN),
                    "double_blocks.0.img_attn.qkv.weight",
                    rows=(HIDDEN * n, HIDDEN),
                )
            )
            found.append(
                Place(
                    f"double_blocks.0.txt_attn.qkv.{n}",
                    (HIDDEN, HIDDEN),
                    "double_blocks.0.txt_attn.qkv.weight",
                    rows=(HIDDEN * n, HIDDEN),
                )
            )
    return tuple(found)


class Subject:
    """A model in one storage: its bits and its outputs without a LoRA."""

    def __init__(self, name, storage):
        self.name, self.storage = name, storage
        self.model = store(WRITTEN_OUT[name]() if name in WRITTEN_OUT else Tree(shapes_of(name)), storage)
        self.dtype = next(
            p.dtype for p in self.model.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16)
        )
        self.objects = {k: (p, p.data_ptr()) for k, p in self._tensors()}
        self.bits = {k: _bits(p).clone() for k, p in self._tensors()}
        self.base = self.outputs()

    def _tensors(self):
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def outputs(self):
        with torch.no_grad():
            return [out.detach().clone() for out in self.model(self.dtype)]

    def differences(self):
        """Everything in which the model is not as it was made; empty if nothing is."""
        now = dict(self._tensors())
        found = [f"{k} is gone" for k in self.bits.keys() - now.keys()] + [
            f"{k} is new" for k in now.keys() - self.bits.keys()
        ]
        for key, tensor in now.items():
            if key in self.bits and (tensor.dtype, tensor.shape) != (
                self.objects[key][0].dtype,
                self.objects[key][0].shape,
            ):
                found.append(f"{key} has another dtype or shape")
            elif key in self.bits and not torch.equal(_bits(tensor), self.bits[key]):
                found.append(f"{key} has other bits")
        for path, layer in self.model.named_modules():
            if (
                layer._forward_hooks
                or layer._forward_pre_hooks
                or "forward" in layer.__dict__
                or getattr(layer, "weight_terms", None)
            ):
                found.append(f"{path} has something attached")
        if not found and not all(same(a, b) for a, b in zip(self.outputs(), self.base, strict=True)):
            found.append("its outputs are others")
        return found


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@functools.cache
def subject(name, storage):
    return Subject(name, storage)


def choose(rng: random.Random):
    return rng.choice(MODELS), rng.choice(("fp32", "fp32", "fp32", *STORAGES))
