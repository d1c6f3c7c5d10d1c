"""Failures planted at the k-th operation that needs memory."""

import sys
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_guard.memory.out_of_memory import OutOfMemory


class PlantedError(ValueError):
    """A failure that has nothing to do with memory, although its text speaks of it."""


ERRORS = {
    "gpu": lambda: OutOfMemory[0]("planted: CUDA out of memory. Tried to allocate 2.00 MiB"),
    "ram": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:119] planted: DefaultCPUAllocator: can't allocate memory"
    ),
    "other": lambda: PlantedError("planted: not out of memory, a wrong value"),
}
"""A GPU's allocator, the CPU's, and an error that must come through as what it is."""

WORKSPACE = {torch.ops.aten.addmm_.default, torch.ops.aten.baddbmm_.default}
"""Written in place, and still in need of memory: a matrix library takes a workspace before it starts."""


class Faults(TorchDispatchMode):
    """Counts the operations that need memory: a result in a storage of its own, or a workspace. Number `first` fails, and
    with `for_good` every later one.

    `spared`: names of functions and of source files in which nothing is counted. `only`: what says of an operation's results whether they
    would have been refused (a device that is full while another is not); all of them by default.
    """

    def __init__(self, first=0, error="gpu", for_good=False, spared=(), only=None):
        super().__init__()
        self.first, self.error, self.for_good = first, error, for_good
        self.spared, self.only = frozenset(spared), only
        self.count, self.planted = 0, 0
        self._known = {}

    @classmethod
    def _should_skip_dynamo(cls):
        # Nothing is compiled here; newer versions of torch would load their compiler for this (3 s, and a call in each call).
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.planted and not self.for_good:
            return function(*args, **kwargs)
        if function in WORKSPACE and not self._is_spared():
            # It would fail before it has written anything.
            self._next()
        result = function(*args, **kwargs)
        made = new_tensors(result, (args, kwargs))
        if made and (self.only is None or self.only(made)) and not self._is_spared():
            self._next()
        return result

    def _next(self):
        self.count += 1
        if self.first and (self.count == self.first or (self.for_good and self.count > self.first)):
            self.planted += 1
            raise ERRORS[self.error]()

    def _is_spared(self):
        frame = sys._getframe(2) if self.spared else None
        while frame is not None:
            code = frame.f_code
            if code not in self._known:
                self._known[code] = bool({code.co_name, Path(code.co_filename).name} & self.spared)
            if self._known[code]:
                return True
            frame = frame.f_back
        return False


def new_tensors(result, inputs):
    """The tensors of `result` that lie in memory of their own."""
    # Written out, without torch's tree_leaves and without generators: this runs for every operation of every run.
    if isinstance(result, torch.Tensor):
        storage = result.untyped_storage()
        if result.is_meta or not storage.nbytes() or _has(inputs, storage.data_ptr()):
            return []
        return [result]
    if not isinstance(result, (tuple, list)):
        return []
    return [made for each in result for made in new_tensors(each, inputs)]


def _has(values, address):
    """True where a tensor in these tuples, lists and dicts lies in the storage at this address."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, torch.Tensor):
            if value.untyped_storage().data_ptr() == address:
                return True
        elif isinstance(value, (tuple, list, dict)) and _has(value, address):
            return True
    return False


def is_planted(error):
    """True for an error of ERRORS, for one that was raised from it, and for a merge's own word for want of memory."""
    while error is not None:
        if "planted: " in str(error) or (isinstance(error, MemoryError) and "no memory left" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def passed_the_guard(error):
    """True where the error came out of the guard's own work, not of the host's alone: what the guard puts in the place of the
    host's functions (`hosts`, and a layer's call) is around that too, and the double decodes with the product's `weights`."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(one.filename).parent.name == "patching" and one.name != "call_of_layer" for one in frames)


def is_the_hosts_move(error):
    """True where the host was moving a model and had not come to its LoRAs, and nothing of the guard's own work was in it."""
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    return bool(names & HOSTS_MOVES) and "refresh_loras" not in names and not passed_the_guard(error)


HOSTS_MOVES = {"forge_patch_model", "forge_unpatch_model", "place_in_part"}
"""Functions of the double, and the one that stands in for `forge_patch_model`."""


def every(count, step=1, most=150):
    """Every k up to `count`, or every `step`-th; above `most` a stride that keeps their number below it."""
    return range(1, count + 1, max(step, -(-count // most)))
