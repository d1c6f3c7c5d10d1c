"""A model, LoRAs written tensor by tensor, and what a hostile LoRA may do to it: nothing, cheaply, in one line."""

import torch
from safetensors.torch import save_file

from lib_lora_guard.adapters.files import read_lora_file
from lib_lora_guard.errors import LoraFileError, LoraGuardError, LoraMismatchError
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.models.matching import match_file
from lib_lora_guard.models.names import NameMap
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.planning.mode import Wish
from support.machine_speed import CpuTime, assert_within

from .live_memory import LiveMemory
from .make import rand

MOST_SECONDS, MOST_BYTES = 1.0, 50_000_000
"""What a file below 1 MB may cost, in reading, applying and one call of the model; CPU time of this process alone."""
LONGEST_MESSAGE = 500


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(16, 24)
        self.sq = torch.nn.Linear(16, 16)
        self.conv = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.conv_in = torch.nn.Conv2d(4, 320, 3, padding=1)
        self.conv_out = torch.nn.Conv2d(320, 4, 3, padding=1)
        self.img_in = torch.nn.Linear(16, 24)
        self.norm = torch.nn.LayerNorm(16)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data.copy_(rand(*parameter.shape, seed=seed, scale=0.1))
        self.requires_grad_(False)

    def forward(self):
        tokens, image, wide = rand(3, 16, seed=1), rand(1, 4, 5, 5, seed=2), rand(1, 320, 4, 4, seed=3)
        small = [layer(tokens) for layer in (self.lin, self.sq, self.img_in, self.norm)]
        return [*small, self.conv(image), self.conv_in(image), self.conv_out(wide)]


def t(*shape, value=0.1):
    return torch.full(shape, value)


def number(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype)


def module(name, **fields):
    """Tensors of one module. Keywords: `__` stands for a dot."""
    return {f"{name}.{field.replace('__', '.')}": tensor for field, tensor in fields.items()}


def lora(name="lin", out=24, inner=16, rank=2, **more):
    return module(name, lora_up__weight=t(out, rank), lora_down__weight=t(rank, inner), **more)


def loha(name, a1, b1, a2, b2, **more):
    return module(name, hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2, **more)


def glora(name, a1, a2, b1, b2, **more):
    return module(name, a1__weight=a1, a2__weight=a2, b1__weight=b1, b2__weight=b2, **more)


LORA = lora()
UP, DOWN = "lin.lora_up.weight", "lin.lora_down.weight"


def save(path, tensors, settings=None):
    metadata = None if settings is None else {"lora_adapter_metadata": settings}
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, str(path), metadata=metadata)
    return path


def assert_fit_to_show(message):
    assert message.isprintable(), "one line, and nothing that steers a console"
    assert len(message) < LONGEST_MESSAGE


class cheap:
    """The block takes no more than the limits above."""

    def __enter__(self):
        self.spent, self.memory = CpuTime(), LiveMemory()
        self.memory.__enter__()
        self.spent.__enter__()

    def __exit__(self, kind, error, trace):
        self.spent.__exit__(kind, error, trace)
        self.memory.__exit__(kind, error, trace)
        if error is None or isinstance(error, LoraGuardError):
            assert_within(self.spent.seconds, MOST_SECONDS)
            assert self.memory.peak_bytes <= MOST_BYTES, f"{self.memory.peak_bytes / 1e6:.0f} MB"


def requests(access, *paths):
    """The files as the engine takes them, labelled by their names."""
    shapes = access.shapes()
    names = NameMap(shapes)
    stack = []
    for origin, path in enumerate(paths):
        match = match_file(read_lora_file(path), names, shapes, 1.0, origin)
        stack.append(LoraRequest(path.stem, 1.0, match.terms, tuple(match.skipped), tuple(match.lost)))
    return stack


def assert_harmless(path, good, wish=Wish.AUTO):
    """Refused as a file, or left out, or applied as what it says; at no great cost, and the other LoRA has its effect.

    Gives the sentence that is said about the file, None where it was applied whole.
    """
    model, engine = Model(), Engine()
    access = PlainAccess(model)
    base = model()
    try:
        with cheap():
            stack = requests(access, path, good)
    except (LoraFileError, LoraMismatchError) as error:
        assert_fit_to_show(str(error))
        return str(error)
    with cheap():
        report = engine.change(access, stack, wish)
    assert_fit_to_show(report.line())
    hostile, sound = report.loras
    assert (sound.used, sound.refused) == (1, None)
    with cheap():
        patched = model()
    alone = Model()
    Engine().change(PlainAccess(alone), requests(PlainAccess(alone), good), wish)
    assert not torch.equal(patched[1], base[1])
    if hostile.refused is not None:
        assert all(torch.equal(a, b) for a, b in zip(patched, alone(), strict=True)), "left out, but not wholly"
    engine.change(access, [])
    assert all(torch.equal(a, b) for a, b in zip(model(), base, strict=True))
    return hostile.refused or next(iter(hostile.lost), None)
