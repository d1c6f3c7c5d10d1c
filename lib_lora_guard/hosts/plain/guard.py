"""LoRA Guard on any `torch.nn.Module`, without a WebUI."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from ...adapters.files import LoraFile, read_lora_file
from ...errors import LoraMismatchError, about
from ...files import FileState, is_file, shown, state_of
from ...models.fit import Target, fit_file
from ...patching.engine import Engine, LoraRequest
from ...patching.room_to_read import room_now_bytes
from ...planning.mode import requested
from ...reporting.report import ApplyReport
from .access import PlainAccess
from .stack_argument import read_stack


class LoraGuard:
    """Applies LoRA files to a model and takes them off again.

    >>> guard = LoraGuard(model)
    >>> print(guard.apply([("style.safetensors", 0.8)]))
    >>> guard.remove()

    As a context manager it removes its LoRAs at the end, whatever happened in between. The model is held weakly. A model
    has one stack, which all its guards share. Take LoRAs off before you copy, save, convert or reload a model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: The model. Linear layers made by `load_stored` may have low-bit weights; all others are dense.

        Raises:
            TypeError: `model` is no module.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"LoraGuard needs a torch.nn.Module, this is a {type(model).__name__}")
        self._engine = _engines.setdefault(model, Engine())
        self._access = PlainAccess(model)
        self._files: dict[_FileKey, LoraFile] = {}
        self._target = Target({})

    def apply(
        self, stack: Sequence[tuple[str | Path, float]], mode: str = "auto", as_trained: bool = False
    ) -> ApplyReport:
        """Replaces the current stack. After an exception the model has the stack it had before.

        Args:
            stack: Pairs of a LoRA file and its strength, in order.
            mode: "auto" chooses per weight; "bypass", "on_the_fly" and "merge" ask for one mode.
            as_trained: DoRA in the meaning of its trainer instead of Forge's (docs/architecture.md lists the differences).

        Returns:
            The LoRAs that were applied, with the mode of their weights and the memory they take.

        Raises:
            LoraFileError: A file cannot be read.
            LoraMismatchError: A file does not fit the model.
            ModeError: `mode` has another value, or asks to merge into low-bit weights.
            TypeError: `stack` is no list of pairs, or a strength is no number.
        """
        wish = requested(mode)
        stack = read_stack(stack)
        # Tensors made in inference mode could never be changed or differentiated outside it.
        with torch.inference_mode(False), torch.no_grad():
            keyed = [self._read(Path(path), as_trained) for path, _ in stack]
            files = [file for _, file in keyed]
            shapes = self._access.shapes() | self._engine.unpatched_shapes()
            if self._target.shapes != shapes:
                self._target = Target(shapes)
            requests = [
                self._request(n, file, float(strength))
                for n, (file, (_, strength)) in enumerate(zip(files, stack, strict=True))
            ]
            report = self._engine.change(self._access, requests, wish, leave_out=False)
        self._files = dict(keyed)
        return report

    def remove(self) -> ApplyReport:
        """Takes everything off: every weight has its original values, bit for bit.

        Returns:
            The report of the empty stack.
        """
        with torch.inference_mode(False), torch.no_grad():
            report = self._engine.change(self._access, [])
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

    def _read(self, path: Path, as_trained: bool) -> tuple[_FileKey, LoraFile]:
        """Returns a file and its key: from memory if it is in the present stack and unchanged on disk."""
        # The state before it is read: a file that changes afterwards is another one at the next call.
        key = (str(path.resolve()), state_of(path), as_trained) if is_file(path) else (str(path), None, as_trained)
        known = self._files.get(key)
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


_engines: weakref.WeakKeyDictionary[torch.nn.Module, Engine] = weakref.WeakKeyDictionary()
"""One engine per model: of two, neither would know what the other has done to a weight."""


_FileKey = tuple[str, "FileState | None", bool]
"""The path, the state on disk, and as_trained."""
