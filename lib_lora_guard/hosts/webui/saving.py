"""Hands the model's own weights over with their LoRAs merged: to Save UNet, Save Checkpoint and ControlLora.

The host saves a copy of the whole model, made once in memory and once more as bytes. Here a save reads and merges one
weight at a time while it writes.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...errors import HostError, LoraGuardError, named
from ...files import Entry, shown, write_safetensors
from ...messages import say
from ...patching.access import find_owner
from ...patching.deferred import DeferredTensor
from ...patching.engine import Engine
from ...patching.merged_state import Kept, MergedState, MergedWeight
from ...runtime.hooks import HookSet, Row, lay
from ...weights.storage import shares_storage
from ..probing import attribute, module

log = logging.getLogger(__name__)


def install(
    hooks: HookSet, engines: Callable[[], Iterable[Engine]], save_rows: Sequence[Row[Saving]] | None = None
) -> None:
    """Lets what reads the weights of a model get them with their LoRAs, as far as this host has these readers.

    Called when the host's own modules are loaded. A second call does nothing. What is missing is logged.

    Args:
        hooks: gets the hooks that were laid.
        engines: returns the engines of all models at that moment.
        save_rows: the first one is the function that writes files; None for Forge's.
    """
    saving = Saving(engines)
    if _attempt(STATE_DICT_ROWS, saving, hooks, "saving.unpatched"):
        _attempt(save_rows or SAVE_ROWS, saving, hooks, "saving.in_memory")
    _attempt(CONTROL_ROWS, saving, hooks, "saving.control_unpatched")


def _attempt(rows: Sequence[Row[Saving]], saving: Saving, hooks: HookSet, key: str) -> bool:
    try:
        modules = {row.module: module(row.module) for row in rows}
        engines = _engines(modules, rows[0]) if any(row.module == _ENGINES for row in rows) else []
        lay(rows, saving, modules, hooks, [(cls, name, saving.save) for cls, name in engines])
    except HostError as error:
        say(log, logging.WARNING, key, reason=error)
        return False
    return True


def _engines(modules: Mapping[str, ModuleType], writer: Row[Saving]) -> list[tuple[type, str]]:
    """Returns each engine class with the name of each function by which it saves in its own way.

    Raises:
        HostError: one does not save through `safetensors.torch.save_file`: other writers cannot read a deferred tensor.
    """
    safetensors, utils, base = (modules[name] for name in (writer.module, _UTILS, _ENGINES))
    by_name = getattr(safetensors, writer.path, None)
    found = []
    for cls in _family(attribute(base, "ForgeDiffusionEngine")):
        for name in ("save_unet", "save_checkpoint"):
            if name not in vars(cls):
                continue
            used = list(getattr(inspect.unwrap(vars(cls)[name]), "__globals__", {}).values())
            writes = any(value is one for value in used for one in (safetensors, by_name, sys.modules["safetensors"]))
            if not writes or not any(value is utils for value in used):
                raise HostError(f"{cls.__name__}.{name} does not call safetensors.torch.save_file and backend.utils")
            found.append((cls, name))
    return found


class Saving:
    def __init__(self, engines: Callable[[], Iterable[Engine]]) -> None:
        self._engines = engines
        self._present = threading.local()
        """`weights`: the patched weights of the save that this thread is in."""

    def _state(self) -> MergedState:
        engines = list(self._engines())
        return MergedState(
            (a for engine in engines for a in engine.attached.values()),
            (a for engine in engines for a in engine.suspended.values()),
        )

    def save(self, original: Callable[..., Any], engine: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self._present, "weights"):
            return original(engine, filename, *args, **kwargs)
        name = shown(Path(filename).name)
        with _turn(name):
            self._present.weights = []
            try:
                return original(engine, filename, *args, **kwargs)
            except Exception as error:
                say(log, logging.ERROR, "saving.failed", name=name, reason=named(error))
                raise
            finally:
                del self._present.weights

    def state_dict_after_quant(
        self, original: Callable[..., dict[str, torch.Tensor]], model: torch.nn.Module, prefix: str = ""
    ) -> dict[str, torch.Tensor]:
        weights = self._state().of(model)
        if hasattr(self._present, "weights"):
            self._present.weights += weights.values()
            return original(_DeferredModel(model, weights), prefix)
        state = original(model, prefix)
        for key, weight in weights.items():
            if prefix + key in state and not weight.is_in_parameter:
                state[prefix + key] = weight.value()
        return state

    def save_file(
        self, original: Callable[..., Any], tensors: dict[str, torch.Tensor], filename: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not any(isinstance(tensor, DeferredTensor) for tensor in tensors.values()):
            return original(tensors, filename, *args, **kwargs)
        path = Path(filename)
        name, weights = shown(path.name), list(getattr(self._present, "weights", ()))
        for kept, key in ((Kept.ROUNDED, "saving.rounded"), (Kept.LEFT_OUT, "saving.left_out")):
            for stored_as, count in Counter(w.format for w in weights if w.kept is kept).items():
                say(log, logging.WARNING, key, name=name, count=count, format=stored_as)
        entries = [_entry(key, tensor) for key, tensor in tensors.items()]
        metadata = args[0] if args else kwargs.get("metadata")
        write_safetensors(path, entries, metadata, _Interruptible())
        merged = sum(weight.kept is not Kept.LEFT_OUT for weight in weights)
        if merged:
            size = sum(entry.bytes for entry in entries) / (1 << 30)
            say(log, logging.INFO, "saving.done", name=name, gigabytes=size, count=merged)
        return None

    def pre_run(
        self, original: Callable[..., Any], control: Any, model: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """The control model takes over the parameters of the model's first half, without a copy; what is patched there comes
        merged, the rest stays shared."""
        result = original(control, model, *args, **kwargs)
        for key, weight in self._state().of(model.diffusion_model).items():  # type: ignore[arg-type]  # a module in every model of Forge's
            owner = None if weight.is_in_parameter else find_owner(control.control_model, key)
            # Where the ControlLora brings the weight itself, that stays.
            if owner is not None and shares_storage(getattr(*owner), weight.parameter):
                setattr(*owner, torch.nn.Parameter(weight.value(), requires_grad=False))
        return result


class _DeferredModel:
    """A model for the host's function to read: its state dict is calculated when it is written. All else is the model's."""

    def __init__(self, model: torch.nn.Module, weights: dict[str, MergedWeight]) -> None:
        self._model, self._weights = model, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = self._model.state_dict(*args, **kwargs)
        return {key: self._deferred(key, value) for key, value in state.items()}

    def _deferred(self, key: str, value: Any) -> Any:
        weight = self._weights.get(key)
        if not isinstance(value, torch.Tensor):
            return value
        if weight is None or weight.is_in_parameter:
            return DeferredTensor.of(value)
        return DeferredTensor(weight.value, weight.dtype, weight.shape, value.device)


class _Interruptible:
    """Progress of a save that Forge's Interrupt stops. What was pressed before the save is not meant for it."""

    def __init__(self) -> None:
        self._before = self._is_pressed()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if self._is_pressed() and not self._before:
            raise LoraGuardError.of("saving.interrupted")

    def _is_pressed(self) -> bool:
        state = getattr(sys.modules.get("modules.shared"), "state", None)
        return bool(getattr(state, "interrupted", False))


@contextlib.contextmanager
def _turn(name: str) -> Iterator[None]:
    """Holds Forge's queue lock during a save. A save from a button waits for the lock; any other does not, since the
    code that calls it may hold the lock: then the save is part of what is running."""
    lock = getattr(sys.modules.get("modules.call_queue"), "queue_lock", None)
    if lock is None:
        yield
        return
    is_mine = bool(lock.acquire(False))
    if not is_mine and _is_a_button():
        say(log, logging.INFO, "saving.waiting", name=name)
        lock.acquire()
        is_mine = True
    try:
        yield
    finally:
        if is_mine:
            lock.release()


def _is_a_button() -> bool:
    return any(
        frame.f_globals.get("__name__") == "modules.ui_checkpoint_merger" for frame, _ in traceback.walk_stack(None)
    )


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    read = tensor.read if isinstance(tensor, DeferredTensor) else lambda: tensor
    return Entry(name, tensor.dtype, tuple(tensor.size()), read)


def _family(cls: type) -> Iterator[type]:
    yield cls
    child: type
    for child in cls.__subclasses__():
        yield from _family(child)


_SAFETENSORS, _UTILS, _ENGINES = "safetensors.torch", "backend.utils", "backend.diffusion_engine.base"
STATE_DICT_ROWS: tuple[Row[Saving], ...] = (
    Row(_UTILS, "get_state_dict_after_quant", lambda saving: (saving.state_dict_after_quant,)),
)
_ENGINE_ROWS: tuple[Row[Saving], ...] = (
    Row(_UTILS, "get_state_dict_after_quant", lambda saving: (saving.state_dict_after_quant,)),
    Row(_ENGINES, "ForgeDiffusionEngine.save_unet", lambda saving: (saving.save,), is_needed=False),
    Row(_ENGINES, "ForgeDiffusionEngine.save_checkpoint", lambda saving: (saving.save,), is_needed=False),
)
SAVE_ROWS: tuple[Row[Saving], ...] = (
    Row(_SAFETENSORS, "save_file", lambda saving: (saving.save_file,)),
    *_ENGINE_ROWS,
)
NEOS_SAVE_ROWS: tuple[Row[Saving], ...] = (
    Row(_ENGINES, "save_file", lambda saving: (saving.save_file,)),
    *_ENGINE_ROWS,
)
"""Neo's engines have the function under a name of their own."""
"""The engines that derive from this one have rows of their own where they save in their own way."""
CONTROL_ROWS: tuple[Row[Saving], ...] = (
    Row("backend.patcher.controlnet", "ControlLora.pre_run", lambda saving: (saving.pre_run,)),
)
HOOKS = (*STATE_DICT_ROWS, *SAVE_ROWS[:1], *SAVE_ROWS[2:], *CONTROL_ROWS)
