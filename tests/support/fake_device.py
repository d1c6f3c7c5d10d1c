"""A host's device and models as `runtime.host` describes them, of bytes alone: no Forge, no tensors."""

import contextlib

import torch

from lib_lora_guard.runtime.host import Swapped

CARD = torch.device("cuda", 0)


class Module(torch.nn.Module):
    """`on`: bytes on the card; `outside`: bytes elsewhere, of which `fixed` cannot run swapped."""

    def __init__(self, on=0, outside=0, fixed=0):
        super().__init__()
        self.on, self.outside, self.fixed = on, outside, fixed


class Model:
    """A model with its stack; `Model(other.model)` is another stack on the same module."""

    load_device = CARD

    def __init__(self, module, loras=()):
        self.model, self.lora_patches = module, dict.fromkeys(loras)


class Placed:
    """A placed model, of which `swappable` bytes may leave."""

    def __init__(self, model, swappable=0, away=0, returns=False):
        self.model, self.module = model, model.model
        self.swappable, self.away, self.returning = swappable, away, returns
        self.error = None
        self.unloaded = False

    def is_for(self, model):
        return model is self.model

    def returns(self):
        return self.returning

    def swappable_bytes(self):
        return self.swappable

    def swapped(self):
        return Swapped(self.module.outside, self.away)

    def copied_bytes(self):
        return 0

    def shrink(self, wanted_bytes):
        if self.error is not None:
            raise self.error
        return self._move(min(wanted_bytes, self.swappable))

    def grow(self, room_bytes):
        return -self._move(-min(max(0, room_bytes), self.away))

    def unload(self):
        self._move(self.module.on)
        self.unloaded = True

    def _move(self, size):
        self.module.on -= size
        self.module.outside += size
        self.away += size
        return size


class Memory:
    """A card of `total` bytes."""

    def __init__(self, total=10_000, rest=0.0):
        self.total, self.rest, self.models = total, rest, []
        self.forgotten = []
        self.calls = []
        self.swapping_known, self.swapping, self.passes_of_models = False, 0, None

    def total_bytes(self, device):
        return self.total

    def free_bytes(self, device):
        forgotten = sum(one.module.on for one in self.forgotten)
        return self.total - forgotten - sum(one.module.on for one in self.models)

    def size_bytes(self, model, on=None, outside=None):
        if outside is not None:
            return model.outside
        return model.on + (0 if on is not None else model.outside)

    def fixed_bytes(self, model, outside):
        return model.fixed

    def inference_bytes(self):
        return self.rest

    def set_inference_bytes(self, size_bytes):
        self.rest = size_bytes

    def placed(self, model):
        return next((one for one in self.models if one.module is model.model), None)

    def placed_on(self, device, but):
        kept = [one.model for one in but]
        return [one for one in self.models if not one.unloaded and not any(one.module is model for model in kept)]

    def take_back(self, device):
        self.calls.append("take back")
        self.models += self.forgotten
        found, self.forgotten = self.forgotten, []
        return [one.model for one in found]

    def drop_abandoned(self):
        self.calls.append("drop")

    def empty_cache(self):
        self.calls.append("empty")

    def passes(self, models):
        return self.passes_of_models

    def knows_swapping(self):
        return self.swapping_known

    def swapping_bytes(self, model):
        return self.swapping


class Ram:
    """RAM of which `room` bytes may be filled (None: unknown), and `fast` of them after a crash."""

    def __init__(self, room=None, fast=None):
        self.room, self.fast, self.careful_with = room, fast, []

    def room_bytes(self):
        return self.room

    @contextlib.contextmanager
    def leaving(self, model, wanted_bytes):
        yield wanted_bytes if self.fast is None else min(wanted_bytes, self.fast)

    def careful(self, doing):
        self.careful_with.append(doing)
        return contextlib.nullcontext()
