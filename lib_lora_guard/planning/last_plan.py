"""What the last load of an image model was planned with, remembered for the panel. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LastPlan:
    """What a step of `model` needs. `weights_bytes`: all of it as it lies, `on_card_bytes` of it on the device after that load;
    `factor_bytes`: LoRAs beside the weights; `step_bytes`: what is left free for computing, the larger of "GPU Weights" and
    the estimate; `other_bytes`: ControlNets and the like."""

    model: str
    weights_bytes: int
    on_card_bytes: int
    factor_bytes: int
    step_bytes: int
    other_bytes: int = 0

    @property
    def copied_bytes(self) -> int:
        """Weights that are copied in every step."""
        return max(0, self.weights_bytes - self.on_card_bytes)

    @property
    def device_bytes(self) -> int:
        """All that is on the device in a step; without the copies, which come one layer at a time."""
        return self.on_card_bytes + self.factor_bytes + self.step_bytes + self.other_bytes
