"""Checks and corrects the VRAM that has to be free beside the weights while models run.

A host plans with several numbers: the user's setting, the estimate of a step, and what a call reserves beside both. Each can
be out of range, and measured peaks correct the estimates. The sum is one number, for eviction and placement.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..memory import rules
from .host import DeviceMemory, HostModel
from .rule_log import RuleLog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Needs:
    """VRAM to keep free while models run. Predictions and the corrections by measured peaks are kept apart."""

    inference_bytes: int
    """Set by the user."""
    estimate_bytes: int
    """For a step. It comes from `Estimates`, which corrects it itself."""
    hard_bytes: int
    """Needed beside setting and step: ControlNets, LoRA factors."""
    factor_bytes: int = 0
    """The part of `hard_bytes` for LoRA factors that are still to come."""
    estimate_correction_bytes: int = 0
    hard_correction_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """The number that counts. No part of it is below 0."""
        estimate = self.estimate_bytes + self.estimate_correction_bytes
        return max(self.inference_bytes, estimate) + max(0, self.hard_bytes + self.hard_correction_bytes)


class PeakCorrections(Protocol):
    """Corrections by measured peaks. They may be negative."""

    def decode_bytes(self) -> int:
        """Returns what to add to the estimate of the decode that this thread is about to do; 0 for anything else."""
        ...

    def load_bytes(self, models: Iterable[torch.nn.Module], device: torch.device) -> int:
        """Returns what to add to the weights of models that are about to be loaded."""
        ...


class Reservations:
    """Makes the needs of each load."""

    def __init__(self, memory: DeviceMemory, rule_log: RuleLog, corrections: PeakCorrections) -> None:
        """
        Args:
            memory: the host's.
            rule_log: gets what the rules change.
            corrections: by measured peaks.
        """
        self._memory, self._rule_log, self._corrections = memory, rule_log, corrections

    def needs(
        self,
        models: Sequence[HostModel],
        device: torch.device,
        estimate_bytes: float,
        hard_bytes: float,
        factor_bytes: int = 0,
    ) -> Needs:
        """Returns the VRAM that one load has to leave free: its numbers, checked, and the corrections by measured
        peaks. A setting out of range is put right in the host itself.

        Args:
            models: to load, some of them may be placed already.
            device: where they will run.
            estimate_bytes: requested for a step.
            hard_bytes: requested beside the step; `factor_bytes` is a part of it.
            factor_bytes: for LoRA factors that are still to come.
        """
        total = self._memory.total_bytes(device)
        about = models[0].model if models else None
        self._rule_log.tell(rules.with_factors(0, factor_bytes)[1], about)
        estimate, finding = rules.request_bytes(float(estimate_bytes), total)
        self._rule_log.tell(finding)
        inference, finding = rules.inference_bytes(float(self._memory.inference_bytes()), total)
        self._rule_log.tell(finding)
        if finding is not None:
            self._memory.set_inference_bytes(inference)
        hard, finding = rules.request_bytes(float(hard_bytes), total)
        self._rule_log.tell(finding)
        needs = Needs(inference, int(min(estimate, total)), int(min(hard, total)), factor_bytes)
        needs = self._corrected(needs, models, device, total)
        step = needs.estimate_bytes + needs.estimate_correction_bytes
        self._rule_log.tell(rules.room_for_a_step(needs.inference_bytes, step, names_of(models))[1], about)
        return needs

    def _corrected(self, needs: Needs, models: Sequence[HostModel], device: torch.device, total_bytes: int) -> Needs:
        """Adds the corrections, as far as the card goes."""
        coming = [one.model for one in models if self._memory.placed(one) is None]
        estimate = self._corrections.decode_bytes()
        hard = self._corrections.load_bytes(coming, device)
        if estimate or hard:
            room = max(0, total_bytes - needs.free_bytes)
            estimate = min(estimate, room)
            hard = min(hard, max(0, room - max(0, estimate)))
            log.debug("corrected by %d and %d bytes: %s", estimate, hard, needs)
        return replace(needs, estimate_correction_bytes=estimate, hard_correction_bytes=hard)


def names_of(models: Sequence[HostModel]) -> str:
    """Returns the models' class names, for the log."""
    return " + ".join(type(one.model).__name__ for one in models)
