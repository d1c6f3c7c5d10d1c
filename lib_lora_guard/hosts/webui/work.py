"""Asks the WebUI what it is doing, for the panel: its own count of steps, and the name of the checkpoint.

Sources: `modules/shared_state.py` (`State`), `modules/sd_models.py` (`SdModelData`, `CheckpointInfo`). Asks nothing that would
load a model.
"""

from __future__ import annotations

from typing import Protocol

from ...runtime.status import Work


class State(Protocol):
    """The host's count of the present pass."""

    sampling_step: int
    sampling_steps: int


class CheckpointInfo(Protocol):
    """A checkpoint file."""

    name_for_extra: str


class SdModel(Protocol):
    """The loaded checkpoint. Before the first is loaded, the host has an object without these facts."""

    sd_checkpoint_info: CheckpointInfo


def work_of_host() -> Work:
    """Returns what the host says of itself; nothing where it says it in another way."""
    return Work(_checkpoint(), _steps())


def _steps() -> tuple[int, int] | None:
    try:
        from modules import shared

        state: State = shared.state
        done, of = int(state.sampling_step), int(state.sampling_steps)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return (done, of) if of > 0 else None


def _checkpoint() -> str | None:
    try:
        from modules import sd_models

        model: SdModel = sd_models.model_data.sd_model
        return str(model.sd_checkpoint_info.name_for_extra)
    except (ImportError, AttributeError):
        return None
