"""One small model in the double's layers, in every storage, and LoRAs for it."""

import math
import os
import random
from types import SimpleNamespace

import torch
from contract.host import Host
from support.gguf_by_hand import BY_HAND
from support.make import host_value, rand
from torch.nn.functional import linear

from lib_lora_guard.weights import GGUF_DECODERS, Nf4Codec, Q4_0Codec
from lib_lora_guard.weights.bnb4 import from_quant_state

STORAGES = ("bf16", "fp8", "scaled_fp8", "nf4", "Q8_0", "Q4_0", "Q4_K")
WIDE = ("bf16",)
DEVICE = torch.device(os.environ.get("LORA_GUARD_FAULTS_DEVICE", "cpu"))
"""With "cuda" moving a weight is an allocation too."""


WIDE_ROWS, WIDTH = 256, 32
"""256 columns are one block of a K-quant; the other layers take the formats of 32 and 64 values a block."""


class Model(torch.nn.Module):
    """Three linear layers, a convolution, a norm and a parameter that no layer owns."""

    def __init__(self):
        super().__init__()
        self.entry = torch.nn.Linear(WIDE_ROWS, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = torch.nn.Linear(WIDTH, WIDTH)
        self.conv = torch.nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.scale = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        x = self.entry(x)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(torch.softmax(q @ k.transpose(-1, -2) / 6, -1) @ v) * self.scale.to(x.dtype)
        image = x.transpose(1, 2).reshape(x.shape[0], -1, 4, 4)
        return x + self.conv(image).flatten(2).transpose(1, 2)


LINEARS = ("entry", "qkv", "proj")
SHAPES = {name: tuple(p.shape) for name, p in Model().named_parameters()}


def dense_state():
    """Weights of common sizes, the same ones every time."""
    state = {}
    for n, (name, shape) in enumerate(SHAPES.items()):
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        state[name] = rand(*shape, seed=1000 + n, scale=scale) + (name in ("norm.weight", "scale"))
    return state


class FaultHost(Host):
    """The double, with the formats that it has no layers of its own for."""

    def __init__(self):
        super().__init__()
        operations, gguf, utils = self.operations, self.gguf, self.operations.utils

        class BnbLinear(operations.ForgeOperations.Linear):
            def _load_from_state_dict(self, state_dict, prefix, *args):
                self.weight = state_dict[prefix + "weight"]
                self.bias = torch.nn.Parameter(state_dict[prefix + "bias"], requires_grad=False)
                del self.dummy

            def _apply(self, fn, recurse=True):
                # As the host's: the state moves with the bytes, where Module's own moves `data` alone.
                for name, parameter in list(self.named_parameters(recurse=False)):
                    setattr(self, name, utils.tensor2parameter(fn(parameter)))
                return self

            def forward(self, x):
                weight, bias = operations.weights_manual_cast(self, x, weight_fn=decoded_bnb)
                return linear(x, weight, bias)

        class Families:
            Linear = BnbLinear
            Conv1d, Conv2d, Conv3d, LayerNorm = (
                getattr(operations.ForgeOperations, name) for name in ("Conv1d", "Conv2d", "Conv3d", "LayerNorm")
            )

        operations.ForgeOperationsBNB4bits = Families
        self.formats = {"Q8_0": gguf.Q8_0, **{name: blocks_of(name) for name in ("Q4_0", "Q4_K")}}

    def make(self, storage, device=DEVICE):
        """A patcher of a model stored as `storage`, which is loaded."""
        state, settings = self._stored(dense_state(), storage)
        with self.operations.using_forge_operations(**settings), torch.random.fork_rng(devices=[]):
            model = Model()
        model.load_state_dict(state, strict=False)
        model.requires_grad_(False)
        model.storage_dtype = settings["dtype"] if storage in ("bf16", "fp8", "scaled_fp8") else storage
        return self.load(self.base.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu")))

    def _stored(self, state, storage):
        settings = {"dtype": torch.bfloat16, "manual_cast_enabled": True}
        if storage == "bf16":
            return {k: v.to(torch.bfloat16) for k, v in state.items()}, settings
        if storage in ("fp8", "scaled_fp8"):
            fp8 = torch.float8_e4m3fn
            stored = {k: v.to(fp8) if k != "scale" else v for k, v in state.items()}
            for name in LINEARS if storage == "scaled_fp8" else ():
                scale = state[f"{name}.weight"].abs().max() / 448
                stored[f"{name}.weight"] = (state[f"{name}.weight"] / scale).to(fp8)
                stored[f"{name}.scale_weight"] = scale.reshape(1)
            return stored, {**settings, "dtype": fp8}
        if storage == "nf4":
            matrices = {f"{name}.weight": bnb_parameter(state[f"{name}.weight"]) for name in LINEARS}
            return {**state, **matrices}, {**settings, "operations": self.operations.ForgeOperationsBNB4bits}
        matrices = {f"{name}.weight": self._blocks(state[f"{name}.weight"], storage) for name in LINEARS}
        biases = {f"{name}.bias": self._gguf_parameter(state[f"{name}.bias"], "F32") for name in LINEARS}
        return {**state, **matrices, **biases}, {**settings, "bnb_dtype": "gguf"}

    def _blocks(self, weight, kind):
        if kind == "Q4_K" and weight.shape[1] % WIDE_ROWS == 0:
            return self.gguf.ParameterGGUF(k_blocks(weight.shape), self.formats[kind], weight.shape)
        if kind == "Q4_0":
            return self.gguf.ParameterGGUF(Q4_0Codec().encode(weight)["data"], self.formats[kind], weight.shape)
        # A K-quant has no place for narrow rows; files store those as Q8_0.
        return self._gguf_parameter(weight, "Q8_0")


def blocks_of(name):
    """A format class as the host has them; the product's own decoder reads the blocks, for it is not what is tested."""
    decoder = GGUF_DECODERS[name]

    class Blocks:
        @classmethod
        def bake(cls, parameter):
            if not parameter.baked:
                parameter.data = parameter.data.view(torch.uint8).reshape(-1, decoder.block_bytes)
                parameter.baked = True

        @classmethod
        def dequantize_pytorch(cls, parameter):
            rows = parameter.data.reshape(parameter.shape[0], -1)
            return decoder.decode({"data": rows}, parameter.computation_dtype)

    Blocks.__name__ = name
    return Blocks


def k_blocks(shape):
    """Q4_K blocks written by hand, brought to the size of a common weight."""
    rng = random.Random(7)
    data = [[byte for _ in range(shape[1] // 256) for byte in BY_HAND["Q4_K"](rng)[0]] for _ in range(shape[0])]
    data = torch.tensor(data, dtype=torch.uint8)
    # The first two fp16 numbers of a block scale all of it.
    blocks = data.view(shape[0], -1, 144)
    scales = blocks[:, :, :4].contiguous().view(torch.float16).mul_(0.002)
    blocks[:, :, :4] = scales.view(torch.uint8)
    return data


class BnbParameter(torch.nn.Parameter):
    """What bitsandbytes leaves on a weight: packed bytes, and the state that says what they mean."""

    def __new__(cls, data, *args, **kwargs):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, state):
        self.bnb_quantized, self.quant_type, self.quant_state = True, "nf4", state

    def to(self, *args, **kwargs):
        state = SimpleNamespace(**vars(self.quant_state))
        state.absmax = state.absmax.to(*args, **kwargs)
        return BnbParameter(self.data.to(*args, **kwargs), state)


def bnb_parameter(weight):
    """Blocks of 64 run over the weight as one long row."""
    parts = Nf4Codec().encode(weight.reshape(-1, 64))
    state = SimpleNamespace(
        absmax=parts["absmax"].flatten(), quant_type="nf4", shape=tuple(weight.shape), blocksize=64, state2=None
    )
    return BnbParameter(parts["data"].reshape(-1, 1), state)


def decoded_bnb(parameter):
    decoder, parts = from_quant_state(parameter.data, parameter.quant_state)
    return decoder.decode(parts, torch.float32)


def loras():
    """Three: one on every layer, on a norm and a bias, which are merged; one with a DoRA and a kind that only the weight side
    has; one to change to, with a parameter that no layer call reaches."""

    def patch(kind, name, seed, **more):
        return host_value(kind, SHAPES[name], seed, **more)

    def small(name, seed):
        return (rand(*SHAPES[name], seed=seed, scale=0.05),)

    first = {f"{name}.weight": patch("lora", f"{name}.weight", n) for n, name in enumerate((*LINEARS, "conv"))}
    first |= {"norm.weight": small("norm.weight", 10), "proj.bias": small("proj.bias", 11)}
    second = {
        "proj.weight": patch("lora", "proj.weight", 20, dora="output"),
        "qkv.weight": patch("glora", "qkv.weight", 21),
    }
    third = {
        "entry.weight": patch("loha", "entry.weight", 30, rank=2),
        "conv.weight": patch("lora", "conv.weight", 31),
        "scale": small("scale", 32),
    }
    return first, second, third


TOKENS = rand(1, 16, WIDE_ROWS, seed=5).to(DEVICE)
