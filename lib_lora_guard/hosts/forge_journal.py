"""What Forge is doing, written down as it happens: so that the next start can say what a killed process died of.

The phases are those of `reporting.flight_recorder`; here they are laid around Forge's own functions. Sources: Forge's
`backend/modules/k_model.py`, `backend/patcher/vae.py`, `modules/sd_models.py`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..memory.readings import MemorySnapshot
from ..reporting.crash import Crash
from ..reporting.crash_report import Precaution, avoid
from ..reporting.flight_recorder import ALIVE, FlightRecorder, Phase
from ..weights.storage import dtype_name
from .forge_patches import describe
from .hooks import HookSet

log = logging.getLogger(__name__)

BETWEEN_SNAPSHOTS_SECONDS = 1.0
"""Of steps, which may be many a second; everything else that has a phase takes longer than a look at the memory."""


class Journal:
    def __init__(
        self,
        snapshot: Callable[[], MemorySnapshot],
        recorder: FlightRecorder | None = None,
        crash: Crash | None = None,
    ) -> None:
        """`crash`: how the last process ended, where it did not end as it should."""
        self._snapshot, self._crash = snapshot, crash
        self.recorder = recorder or FlightRecorder()
        self._last_look = 0.0

    @contextlib.contextmanager
    def phase(self, phase: Phase, patcher: Any = None, plan: Mapping[str, int | None] | None = None) -> Iterator[None]:
        """`patcher`: of the model that the phase is about."""
        facts: dict[str, Any] = {} if patcher is None else about_model(patcher)
        with self.recorder.enter(phase, memory=self._memory(phase), plan=plan, **facts):
            yield

    def precautions(self, model: Any) -> frozenset[Precaution]:
        """What is planned around, because the last process died of it with a model like this one."""
        return avoid(self._crash, type(model).__name__, _storage(model))

    def lay_around(self, hooks: HookSet, owner: Any, name: str, phase: Phase) -> None:
        """Hooks a function of the host."""

        def body(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return original(*args, **kwargs)

        hooks.add(owner, name, body)

    def _memory(self, phase: Phase) -> dict[str, int | None] | None:
        now = time.monotonic()
        if phase is Phase.SAMPLING_STEP and now - self._last_look < BETWEEN_SNAPSHOTS_SECONDS:
            return None
        self._last_look = now
        try:
            snapshot = self._snapshot()
        except (OSError, RuntimeError):
            log.debug("no look at the memory", exc_info=True)
            return None
        return {ALIVE: snapshot.alive_ram_bytes, **{name: one.bytes for name, one in snapshot.readings()}}


def about_model(patcher: Any) -> dict[str, Any]:
    """Model, storage and LoRAs of a patcher, as the recorder takes them. No prompt, no folder."""
    model = getattr(patcher, "model", None)
    loras = [describe(identifier)[0] for identifier in getattr(patcher, "lora_patches", None) or {}]
    return {"model": type(model).__name__, "storage": _storage(model), "loras": loras}


def _storage(model: Any) -> str:
    kept: Any = getattr(model, "storage_dtype", "")
    return kept if isinstance(kept, str) else dtype_name(kept)
