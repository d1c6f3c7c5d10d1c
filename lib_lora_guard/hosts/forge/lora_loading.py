"""The LoRAs of the models that Forge loads: VRAM for their factors before a load, their refresh in it, what is said after it.

Source: Forge's `backend/memory_management.py` and `backend/patcher/base.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Concatenate

import torch

from ...runtime.hooks import P, R
from ...units import MB
from ...weights.storage import WIDE_DTYPES
from ..webui.lora_files import LoraFiles
from .calibration import ForgeCalibration
from .facts import compute_dtype, is_denoiser, loader_of, patches_of, storage_dtype
from .patches import are_there
from .stacks import ForgeStacks
from .types import LoadedModel, Patcher

SURPLUS_BYTES = 32 * MB
"""Of factors. Less is not worth that the others go over the link again."""


class LoraLoading:
    """The LoRA side of a load. Two of its methods stand in place of Forge's functions of their names."""

    def __init__(
        self,
        stacks: ForgeStacks,
        files: LoraFiles,
        calibration: ForgeCalibration,
    ) -> None:
        """
        Args:
            stacks: of all models.
            files: what was read of the prompt's LoRAs.
            calibration: corrects predictions by measured peaks.
        """
        self._stacks, self._files, self._calibration = stacks, files, calibration

    def has_online_lora(
        self, original: Callable[Concatenate[Patcher, P], bool], patcher: Patcher, *args: P.args, **kwargs: P.kwargs
    ) -> bool:
        """Stands in place of `ModelPatcher.has_online_lora`. True makes Forge reserve and move the factors itself; the guard
        does both for the stacks that it applies. Forge looks into all patches then: not where the values of a file never came."""
        patches = patcher.lora_patches
        return bool(patches) and self._stacks.is_left_to_host(patcher) and are_there(patches)

    def model_load(
        self, original: Callable[Concatenate[LoadedModel, P], R], loaded: LoadedModel, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Stands in place of `LoadedModel.model_load`: parameters that lie in RAM when it begins are the backups of the
        merges made in it."""
        with self._stacks.loading(loaded.model):
            return original(loaded, *args, **kwargs)

    @contextlib.contextmanager
    def moving_away(self, patcher: Patcher) -> Iterator[None]:
        """Wraps a model's move off its device: merges are lifted before it, and copies of factors are dropped after it."""
        loader = loader_of(patcher)
        self._stacks.before_move(loader)
        try:
            yield
        finally:
            self._stacks.drop_device_copies(loader)

    def coming_bytes(self, patcher: Patcher) -> int:
        """Returns what `factor_bytes` predicts, corrected by measured peaks. Asked once before a load: the next refresh is
        measured against it."""
        return self._calibration.factor_bytes(patcher, self.factor_bytes(patcher))

    def factor_bytes(self, patcher: Patcher) -> int:
        """Returns the VRAM that the coming refresh of `patcher` will need for factors beyond what they take already."""
        return max(0, self._stack_bytes(patcher) - self._stacks.resident_bytes(loader_of(patcher)))

    def drop_surplus(self, patchers: Iterable[Patcher]) -> None:
        """Frees the factors of stacks that are about to be replaced, where the new one takes less: room is made for the model
        before its LoRAs are changed, and would be counted without what they give back. What the new stack keeps of them comes
        again with the rest of it.

        Not of a stack that only grows, or gets other strengths: none of its factors leaves, whatever the two numbers say. What is
        there may be of another dtype than what is foreseen.
        """
        for patcher in patchers:
            loader = loader_of(patcher)
            resident = self._stacks.resident_bytes(loader)
            # Before all else: a model without LoRAs is the usual one.
            if resident < SURPLUS_BYTES or self._stacks.is_current(patcher) or not self._stacks.takes_off(patcher):
                continue
            if resident - self._stack_bytes(patcher) >= SURPLUS_BYTES:
                self._stacks.drop_device_copies(loader)

    def _stack_bytes(self, patcher: Patcher) -> int:
        """Returns the VRAM that the factors of a patcher's stack take."""
        patches = patches_of(patcher)
        if not patches or patcher.load_device.type == "cpu" or self._stacks.is_left_to_host(patcher):
            return 0
        element_bytes = torch.empty(0, dtype=compute_dtype(patcher.model)).element_size()
        stored = storage_dtype(patcher.model)
        merges = stored is None or stored in WIDE_DTYPES
        return self._stacks.reader.device_elements(patches, merges) * element_bytes

    def step_bytes(self, patcher: Patcher) -> int:
        """Returns the VRAM that the factors of `patcher` take in a step: those on the device, and those still to come."""
        applied = self._stacks.applied_bytes(patcher)
        if applied is not None:
            return applied
        return self._stacks.resident_bytes(loader_of(patcher)) + self.factor_bytes(patcher)

    def handed_over(self, patchers: Iterable[Patcher]) -> None:
        """Called for models that another patcher had: its LoRAs must not pass for those of the new one."""
        for patcher in patchers:
            self._stacks.invalidate(patcher)

    def after_load(self, handed_over: Sequence[Patcher], already_loaded: Sequence[Patcher]) -> None:
        """Refreshes what Forge does not: it refreshes a patcher when it loads it and never again. Tries again what failed,
        and logs again what is left out."""
        for patcher in (*handed_over, *already_loaded):
            if loader_of(patcher) is not None:
                self._stacks.remind(patcher)
        if any(is_denoiser(patcher.model) for patcher in already_loaded):
            self._files.remind()
