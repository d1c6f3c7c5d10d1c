"""What LoRA factors take of Neo's memory, and what Neo's journal phases are about to take. Placement stays Neo's own.

Sources: Neo's `backend/memory_management.py` (`load_models_gpu`), `backend/sampling/sampling_function.py` (`sampling_prepare`),
`backend/patcher/vae.py` (`VAE.decode`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Concatenate

import torch

from ...memory import rules
from ...recorder.flight_recorder import KEPT_FREE, RAM_NEED, VRAM_NEED, Phase
from ...runtime.hooks import P, R
from ...runtime.journal import Journal, ModelFacts, Plan
from ...runtime.rule_log import RuleLog
from ...weights.storage import storage_of
from ..webui.models import compute_dtype, storage_name
from .patchers import label_of, loras_of
from .stacks import NeoStacks
from .swapped import Swapped
from .types import MemoryManagement, Patcher, Vae


class NeoSizes:
    """The sizes of Neo's models by where their weights lie. Neo's own function does not tell that."""

    def module_size(
        self,
        module: torch.nn.Module,
        exclude_device: torch.device | None = None,
        include_device: torch.device | None = None,
    ) -> float:
        """Returns the bytes of a model's weights, or of those on one device, or outside of one."""
        return sum(
            storage_of(parameter).bytes
            for parameter in module.parameters()
            if include_device in (None, parameter.device) and parameter.device != exclude_device
        )


class NeoMemory:
    """Adds what factors will take to what Neo keeps free, and writes down what is moved."""

    def __init__(
        self, memory: MemoryManagement, stacks: NeoStacks, journal: Journal, rule_log: RuleLog, swapped: Swapped
    ) -> None:
        """
        Args:
            memory: Neo's.
            stacks: of all models.
            journal: of the process.
            rule_log: gets what the rules change.
            swapped: is told what comes.
        """
        self._memory, self._stacks, self._journal, self._rule_log = memory, stacks, journal, rule_log
        self._swapped = swapped
        self._sizes = NeoSizes()

    def load_models_gpu(
        self,
        original: Callable[Concatenate[Sequence[Patcher], float, bool, float | None, P], R],
        models: Sequence[Patcher],
        memory_required: float = 0,
        force_patch_weights: bool = False,
        minimum_memory_required: float | None = None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Stands in place of `load_models_gpu`. Neo frees room for the first number, and places weights beside the second."""
        memory_required = self._checked(models, memory_required)
        factors = sum(map(self.factor_bytes, models))
        self._rule_log.tell(rules.with_factors(0, factors)[1], models[0].model if models else None)
        least = None if minimum_memory_required is None else minimum_memory_required + factors
        loras = tuple(label_of(lora) for patcher in models for lora in loras_of(patcher))
        first = models[0].model if len(models) == 1 else None
        about = ModelFacts("" if first is None else type(first).__name__, storage_name(first), loras)
        moving = self._moving(models, int(memory_required) + factors)
        with self._journal.phase(Phase.MOVE_TO_GPU, about, moving), self._swapped.coming(models):
            return original(models, memory_required + factors, force_patch_weights, least, *args, **kwargs)

    def _checked(self, models: Sequence[Patcher], asked: float) -> float:
        """Applies the rules for requests: none is larger than the card, negative, or no number."""
        device = next((one.load_device for one in models if one.load_device.type != "cpu"), None)
        if device is None:
            return asked
        usable, finding = rules.request_bytes(asked, self._memory.get_total_memory(device))
        self._rule_log.tell(finding)
        return asked if math.isinf(usable) else usable

    def factor_bytes(self, patcher: Patcher) -> int:
        """Returns the VRAM that a patcher's LoRAs will need beyond what is on the device already. Merged weights need none."""
        loras = loras_of(patcher)
        if not loras or patcher.load_device.type == "cpu":
            return 0
        stack = self._stacks.known(patcher.model)
        if stack is not None and self._stacks.is_current(patcher):
            return max(0, stack.engine.device_bytes() - stack.engine.resident_bytes())
        terms = [term for lora in loras for on_key in lora.asked_terms().values() for term in on_key]
        adapters = {id(term.adapter): term.adapter for term in terms}
        element_bytes = torch.empty(0, dtype=compute_dtype(patcher.model)).element_size()
        numbers = sum(
            tensor.numel() for one in adapters.values() if not one.is_whole_tensor for tensor in one.tensors()
        )
        return numbers * element_bytes

    def decoding_plan(self, vae: Vae, samples: torch.Tensor) -> Plan:
        """Plans for `VAE.decode`, by Neo's own estimate."""
        if getattr(self._memory, "VAE_ALWAYS_TILED", False):
            # The estimate is of the whole picture.
            return {}
        needed = int(vae.memory_used_decode(samples.shape, vae.vae_dtype))
        return {RAM_NEED if vae.device.type == "cpu" else VRAM_NEED: needed}

    def _moving(self, models: Sequence[Patcher], free_bytes: int) -> Plan:
        outside = [self._sizes.module_size(one.model, exclude_device=one.load_device) for one in models]
        return {VRAM_NEED: free_bytes + int(sum(outside)), KEPT_FREE: free_bytes}
