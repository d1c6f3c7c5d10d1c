"""Random adapters, small models and LoRA files for the tests."""

import torch
from safetensors.torch import save_file


def gen(seed):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=gen(seed)) * scale


def host_value(kind, shape, seed, rank=4, alpha=2.0, dora=None):
    """A patch value of `kind` in the host's tuple form, for a weight of `shape` (2-D unless said)."""
    out, inner = shape[0], shape[1]
    flat_in = torch.Size(shape[1:]).numel()

    def r(*s, n):
        return rand(*s, seed=seed * 100 + n, scale=0.3)

    magnitude = None
    if dora == "output":
        magnitude = rand(out, 1, seed=seed + 7).abs() + 1
    elif dora == "input":
        magnitude = rand(1, inner, seed=seed + 7).abs() + 1
    if kind == "lora":
        up, down = r(out, rank, n=1), r(rank, *shape[1:], n=2)
        return "lora", (up if len(shape) == 2 else up[..., None, None], down, alpha, None, magnitude)
    if kind == "lora_mid":
        return "lora", (
            r(out, rank, 1, 1, n=1),
            r(rank, inner, 1, 1, n=2),
            alpha,
            r(rank, rank, *shape[2:], n=3),
            magnitude,
        )
    if kind == "loha":
        return "loha", (
            r(out, rank, n=1),
            r(rank, flat_in, n=2),
            alpha,
            r(out, rank, n=3),
            r(rank, flat_in, n=4),
            None,
            None,
            magnitude,
        )
    if kind == "loha_mid":
        k = shape[2:]
        return "loha", (
            r(rank, out, n=1),
            r(rank, inner, n=2),
            alpha,
            r(rank, out, n=3),
            r(rank, inner, n=4),
            r(rank, rank, *k, n=5),
            r(rank, rank, *k, n=6),
            magnitude,
        )
    if kind == "lokr":
        return "lokr", (
            r(2, 2, n=1),
            r(out // 2, inner // 2, *shape[2:], n=2),
            alpha,
            None,
            None,
            None,
            None,
            None,
            magnitude,
        )
    if kind == "lokr_factors":
        return "lokr", (
            None,
            None,
            alpha,
            r(2, rank, n=1),
            r(rank, 2, n=2),
            r(out // 2, rank, n=3),
            r(rank, inner // 2, n=4),
            None,
            magnitude,
        )
    if kind == "lokr_mid":
        return "lokr", (
            r(2, 2, n=1),
            None,
            alpha,
            None,
            None,
            r(rank, out // 2, n=3),
            r(rank, inner // 2, n=4),
            r(rank, rank, *shape[2:], n=5),
            magnitude,
        )
    if kind == "lokr_left":
        return "lokr", (
            None,
            r(out // 2, inner // 2, n=2),
            alpha,
            r(2, rank, n=1),
            r(rank, 2, n=3),
            None,
            None,
            None,
            magnitude,
        )
    if kind == "glora_old":
        return "glora", (
            r(rank, flat_in, n=1),
            r(flat_in, rank, n=2),
            r(rank, flat_in, n=3),
            r(out, rank, n=4),
            alpha,
            magnitude,
        )
    if kind == "glora_conv":
        b2 = r(rank, *shape[1:], n=4)
        return "glora", (r(inner, rank, n=1), r(rank, inner, n=2), r(out, rank, n=3), b2, alpha, magnitude)
    if kind == "loha_plain":
        return "loha", (
            r(out, rank, n=1),
            r(rank, flat_in, n=2),
            None,
            r(out, rank, n=3),
            r(rank, flat_in, n=4),
            None,
            None,
            magnitude,
        )
    if kind == "glora":
        return "glora", (
            r(inner, rank, n=1),
            r(rank, inner, n=2),
            r(out, rank, n=3),
            r(rank, inner, n=4),
            alpha,
            magnitude,
        )
    if kind == "diff":
        return (r(*shape, n=1),)
    if kind == "set":
        return "set", (r(*shape, n=1),)
    if kind == "nested":
        return [r(*shape, n=1), [0.7, host_value("lora", shape, seed + 1, rank), 1.0, None, None]]
    raise ValueError(kind)


class Block(torch.nn.Module):
    """A transformer-like block: fused qkv, projection, a convolution, a norm with a raw parameter."""

    def __init__(self, width=32):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.proj = torch.nn.Linear(width, width)
        self.conv = torch.nn.Conv2d(width, width, 3, padding=1)
        self.scale = torch.nn.Parameter(torch.ones(width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(torch.softmax(q @ k.transpose(-1, -2) / 6, -1) @ v) * self.scale
        side = int(x.shape[1] ** 0.5)
        image = x.transpose(1, 2).reshape(x.shape[0], -1, side, side)
        return x + self.conv(image).flatten(2).transpose(1, 2)


class Net(torch.nn.Module):
    def __init__(self, width=32, depth=2, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.blocks = torch.nn.ModuleList(Block(width) for _ in range(depth))
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def write_kohya(path, modules, seed=0, rank=4, alpha=2.0, scale=0.3, extra=None):
    """A kohya file. `modules`: `{"lora_unet_x": (out, in[, k, k])}`; returns `{module: dense delta at strength 1}`."""
    tensors, deltas = {}, {}
    for n, (name, shape) in enumerate(modules.items()):
        up = rand(shape[0], rank, *[1] * (len(shape) - 2), seed=seed * 1000 + 2 * n, scale=scale)
        down = rand(rank, *shape[1:], seed=seed * 1000 + 2 * n + 1, scale=scale)
        tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"] = up, down
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        deltas[name] = (alpha / rank) * (up.flatten(1) @ down.flatten(1)).reshape(shape)
    save_file({**tensors, **(extra or {})}, str(path))
    return deltas
