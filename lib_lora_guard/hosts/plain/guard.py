"""LoRA Guard on any `torch.nn.Module`, without a WebUI."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import torch

from ...adapters.files import LoraFile, read_lora_file
from ...errors import LoraMismatchError, ModeError, about
from ...files import FileState, shown, state_of
from ...inference_mode import outside_inference
from ...locks import while_locked
from ...models.fit import Target, fit_file
from ...patching.engine import Engine
from ...patching.lora_request import LoraRequest
from ...patching.neighbours import Neighbours
from ...patching.operators import is_compilable
from ...patching.room_to_read import room_now_bytes
from ...planning.mode import Wish, requested
from ...reporting.report import ApplyReport
from .access import PlainAccess
from .stack_argument import read_stack

FileKey: TypeAlias = tuple[str, FileState, bool]
"""A LoRA file at one moment: its path and state on disk, and how it is to be read (as_trained)."""

ENGINE = "_lora_guard_engine"
"""The attribute of a model that holds its engine."""


class LoraGuard:
    """Applies LoRA files to a model and takes them off again.

    >>> guard = LoraGuard(model)
    >>> print(guard.apply([("style.safetensors", 0.8)]))
    >>> guard.remove()

    As a context manager it removes its LoRAs at the end, whatever happened in between. The model is held weakly. A model
    has one stack, which all its guards share; wrapped by torch.compile or DataParallel it is the same model. A guard on a
    part of a model is another one: where both would change a weight, the second is refused. Take LoRAs off before you
    copy, save, convert or reload a model.

    Any thread may apply; a second one waits for the first. Forward passes do not wait: beside a change each weight has its
    old stack or its new one, and a whole pass may have some of both.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: The model. Layers may be dense, of `load_stored`, or quantised by another library (docs/layers.md).

        Raises:
            TypeError: `model` is no module.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"LoraGuard needs a torch.nn.Module, this is a {type(model).__name__}")
        given, model = model, _unwrapped(model)
        # On the model, so that both are freed together, whatever of the model its layers hold.
        self._engine: Engine = _engine_of(model)
        self._access = PlainAccess(model)
        self._is_wrapped_by_compiler = _is_compiled(given)
        self._files: dict[FileKey, LoraFile] = {}
        self._target = Target({})

    @property
    def report(self) -> ApplyReport | None:
        """The report of the stack that is on the model now; None if none was ever applied."""
        return self._engine.report

    def apply(
        self, stack: Sequence[tuple[str | Path, float]], mode: str = "auto", as_trained: bool = False
    ) -> ApplyReport:
        """Replaces the current stack. After an exception the model has the stack it had before.

        An interrupt (Ctrl+C) that comes on the way back to the caller finds the change made; `report` tells what is on the
        model.

        Args:
            stack: Pairs of a LoRA file and its strength, in order.
            mode: "auto" chooses per weight; "bypass", "on_the_fly" and "merge" ask for one mode.
            as_trained: DoRA in the meaning of its trainer instead of Forge's (docs/architecture.md lists the differences).

        Returns:
            The LoRAs that were applied, with the mode of their weights and the memory they take.

        Raises:
            LoraFileError: A file cannot be read.
            LoraMismatchError: A file does not fit the model.
            ModeError: `mode` has another value, asks to merge into low-bit weights, or the model is compiled by a torch
                whose compiler fails on LoRAs (before 2.4) and `mode` is not "merge".
            BusyError: This thread is in the middle of a change, or another guard's LoRA is on one of the weights.
            TypeError: `stack` is no list of pairs, or a strength is no number.
        """
        return self._apply(read_stack(stack), requested(mode), as_trained)

    def _is_compiled(self) -> bool:
        return self._is_wrapped_by_compiler or any(map(_is_compiled, self._access.model.modules()))

    @outside_inference
    def _apply(self, stack: Sequence[tuple[Path, float]], wish: Wish, as_trained: bool) -> ApplyReport:
        found = [self._read(path, as_trained) for path, _ in stack]

        def requests() -> list[LoraRequest]:
            if stack and wish is not Wish.MERGE and not is_compilable() and self._is_compiled():
                raise ModeError.of("mode.compiled", version=torch.__version__)
            shapes = self._access.shapes() | self._engine.unpatched_shapes()
            if self._target.shapes != shapes:
                self._target = Target(shapes)
            return [
                self._request(n, file, strength)
                for n, ((_, file), (_, strength)) in enumerate(zip(found, stack, strict=True))
            ]

        report = self._engine.change(self._access, requests, wish, leave_out=False)
        self._files = {key: file for key, file in found if key is not None}
        return report

    def remove(self) -> ApplyReport:
        """Takes everything off: every weight has its original values, bit for bit.

        Returns:
            The report of the empty stack.
        """
        report = outside_inference(self._engine.change)(self._access, [])
        self._files = {}
        return report

    def drop_device_copies(self) -> None:
        """Frees the copies of the factors on GPUs. The next forward pass makes them again."""
        self._engine.drop_device_copies()

    def __enter__(self) -> LoraGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _read(self, path: Path, as_trained: bool) -> tuple[FileKey | None, LoraFile]:
        """Returns a file with its key: from memory if it is in the present stack and unchanged on disk.

        The key is taken before the file is read: one that is replaced meanwhile is read again at the next change.
        """
        key = _key(path, as_trained)
        known = None if key is None else self._files.get(key)
        return key, known or read_lora_file(path, as_trained, room_now_bytes)

    def _request(self, index: int, file: LoraFile, strength: float) -> LoraRequest:
        name = shown(file.path.name)
        fit = fit_file(file, self._target, strength, index)
        if fit.refused is not None:
            raise LoraMismatchError(about(name, fit.refused))
        if not fit.terms:
            modules = [n for n, _ in self._access.model.named_modules() if n]
            raise LoraMismatchError(
                f"{name}: none of its {len(file.adapters)} modules is in this {self._access.name}; it was made for "
                f"another model (the file has {shown((fit.lost or fit.skipped)[0])}, the model {modules[-1] if modules else 'no layers'})"
            )
        return LoraRequest.of(name, strength, fit)


class PlainEngine(Engine):
    """An engine that lives on its model. A copy or a pickle of the model has None in its place."""

    def __init__(self) -> None:
        super().__init__(neighbours=_neighbours)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


_WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
_neighbours = Neighbours()
"""The engines of all models: two of them may have layers in common."""
_making_an_engine = threading.RLock()


def _is_compiled(module: torch.nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model inside torch's wrappers. A wrapper may be dropped while the model lives on with its LoRAs."""
    while True:
        inner = model.module if isinstance(model, _WRAPPERS) else model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def _engine_of(model: torch.nn.Module) -> Engine:
    def one() -> Engine:
        # A copy of a model has None there.
        engine: Engine | None = model.__dict__.get(ENGINE)
        if engine is None:
            engine = model.__dict__[ENGINE] = PlainEngine()
        return engine

    return while_locked(_making_an_engine, one)


def _key(path: Path, as_trained: bool) -> FileKey | None:
    """Returns the key of a file as it lies there now; None if it cannot be looked at: reading it says why."""
    state = state_of(path)
    try:
        return None if state is None else (str(path.resolve()), state, as_trained)
    except OSError:
        return None
