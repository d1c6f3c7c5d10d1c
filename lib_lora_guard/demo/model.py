"""A transformer with the shape of Flux (double-stream and single-stream blocks), our own code, for demo and benchmarks.

Shapes as in the published Flux.1 checkpoints (state-dict keys and sizes): fused qkv, query/key RMS norms with a raw
`scale`, one modulation layer per stream, `linear1` of single blocks = qkv + MLP. Built from `torch.nn.Linear`: a host
that replaces torch's layers while a model is constructed (Forge does) gets its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class FluxShape:
    """Sizes of one model. The default is the demo's (about 110 M parameters); `FLUX_DEV` is the real model's (11.9 G)."""

    hidden: int = 768
    heads: int = 6
    double: int = 3
    single: int = 5
    context: int = 768
    vector: int = 256
    channels: int = 64


FLUX_DEV = FluxShape(hidden=3072, heads=24, double=19, single=38, context=4096, vector=768, channels=64)


class RmsNorm(nn.Module):
    """Divides by the root mean square over the last dimension; `scale` is a raw parameter without a layer of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (x * inverse.to(x.dtype)) * self.scale.to(x)


class Embedder(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(inputs, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out_layer(functional.silu(self.in_layer(x)))
        return result


class Modulation(nn.Module):
    """Computes `count` triples of shift, scale and gate from the conditioning vector; `lin` receives one token."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden, 3 * count * hidden)
        self.count = count

    def forward(self, vector: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        parts = self.lin(functional.silu(vector))[:, None].chunk(3 * self.count, -1)
        return [(parts[3 * i], parts[3 * i + 1], parts[3 * i + 2]) for i in range(self.count)]


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = nn.ModuleDict({"query_norm": RmsNorm(hidden // heads), "key_norm": RmsNorm(hidden // heads)})
        self.proj = nn.Linear(hidden, hidden)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def split_heads(qkv: torch.Tensor, heads: int, norm: nn.ModuleDict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return norm["query_norm"](q), norm["key_norm"](k), v


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Image and text tokens with separate weights, joined in attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(hidden, 2))
            self.add_module(f"{stream}_attn", Attention(hidden, heads))
            mlp = nn.Sequential(
                nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden)
            )
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, img: torch.Tensor, txt: torch.Tensor, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        streams = {"txt": txt, "img": img}
        mods = {name: self.get_submodule(f"{name}_mod")(vector) for name in streams}
        heads = []
        for name, x in streams.items():
            attention = cast("Attention", self.get_submodule(f"{name}_attn"))
            shift, scale, _ = mods[name][0]
            heads.append(split_heads(attention.qkv(modulate(x, shift, scale)), self.heads, attention.norm))
        joined = attend(*(torch.cat(pair, 2) for pair in zip(*heads, strict=True)))
        parts = dict(zip(streams, torch.split(joined, [txt.shape[1], img.shape[1]], 1), strict=True))
        for name, x in streams.items():
            x = x + mods[name][0][2] * self.get_submodule(f"{name}_attn").get_submodule("proj")(parts[name])
            shift, scale, gate = mods[name][1]
            streams[name] = x + gate * self.get_submodule(f"{name}_mlp")(modulate(x, shift, scale))
        return streams["img"], streams["txt"]


class SingleBlock(nn.Module):
    """All tokens in one fused layer: qkv and the first half of the MLP."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.hidden = heads, hidden
        self.linear1 = nn.Linear(hidden, 7 * hidden)
        self.linear2 = nn.Linear(5 * hidden, hidden)
        self.norm = nn.ModuleDict({"query_norm": RmsNorm(hidden // heads), "key_norm": RmsNorm(hidden // heads)})
        self.modulation = Modulation(hidden, 1)

    def forward(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(vector)[0]
        qkv, mlp = torch.split(self.linear1(modulate(x, shift, scale)), [3 * self.hidden, 4 * self.hidden], -1)
        attention = attend(*split_heads(qkv, self.heads, self.norm))
        return torch.addcmul(
            x, gate, self.linear2(torch.cat([attention, functional.gelu(mlp, approximate="tanh")], -1))
        )


class FluxShaped(nn.Module):
    """The whole model.

    `forward(latents (b, tokens, channels), time (b,), context (b, n, context), vector (b, vector))` returns the
    latents' shape.
    """

    def __init__(self, shape: FluxShape) -> None:
        super().__init__()
        self.shape = shape
        hidden = shape.hidden
        self.img_in = nn.Linear(shape.channels, hidden)
        self.txt_in = nn.Linear(shape.context, hidden)
        self.time_in = Embedder(256, hidden)
        self.vector_in = Embedder(shape.vector, hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden, shape.heads) for _ in range(shape.double))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden, shape.heads) for _ in range(shape.single))
        self.final_layer = nn.Linear(hidden, shape.channels)

    def forward(
        self, latents: torch.Tensor, time: torch.Tensor, context: torch.Tensor, vector: torch.Tensor
    ) -> torch.Tensor:
        img, txt = self.img_in(latents), self.txt_in(context)
        conditioning = self.time_in(_frequencies(time).to(img.dtype)) + self.vector_in(vector)
        for block in self.double_blocks:
            img, txt = block(img, txt, conditioning)
        x = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            x = block(x, conditioning)
        result: torch.Tensor = self.final_layer(functional.layer_norm(x[:, txt.shape[1] :], x.shape[-1:]))
        return result


def _frequencies(time: torch.Tensor) -> torch.Tensor:
    rates = torch.exp(-math.log(10000) * torch.arange(128, device=time.device) / 128)
    angles = time.float()[:, None] * 1000 * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def lora_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns `(out, in)` by module name for the layers that a Flux LoRA is trained on: all matrices inside the blocks."""
    result = {}
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and "_blocks." in name and parameter.dim() == 2:
            result[name.removesuffix(".weight")] = (int(parameter.shape[0]), int(parameter.shape[1]))
    return result


def random_inputs(
    shape: FluxShape, tokens: int, text_tokens: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Returns latents, time, context and vector for one forward pass with a batch of 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    time = torch.full((1,), 0.5, dtype=dtype, device=device)
    return normal(1, tokens, shape.channels), time, normal(1, text_tokens, shape.context), normal(1, shape.vector)
