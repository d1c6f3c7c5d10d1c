"""The plan of the last load of an image model, kept for the panel. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LastPlan:
    """Memory that a step of `model` needs."""

    model: str
    weights_bytes: int
    """All weights as stored."""
    on_card_bytes: int
    """The weights on the device after that load."""
    factor_bytes: int
    """LoRA factors on the device."""
    step_bytes: int
    """Left free for computing: the larger of "GPU Weights" and the estimate."""
    other_bytes: int = 0
    """ControlNets and the like."""

    @property
    def copied_bytes(self) -> int:
        """Weights that are copied in every step."""
        return max(0, self.weights_bytes - self.on_card_bytes)

    @property
    def device_bytes(self) -> int:
        """Everything on the device in a step, without the copies, of which one layer exists at a time."""
        return self.on_card_bytes + self.factor_bytes + self.step_bytes + self.other_bytes
