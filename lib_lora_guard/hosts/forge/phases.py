"""What Forge is doing, written down as it happens: so that the next start can say what a killed process died of.

The phases are those of `recorder.flight_recorder`; here they are laid around Forge's own functions, with the bytes that they
are about to take where these are known before. Sources: Forge's `backend/loader.py`, `backend/patcher/vae.py`,
`modules/sd_models.py`, `modules/restart.py`, `modules/initialize_util.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...memory.readings import MemorySnapshot
from ...recorder.crash import Crash
from ...recorder.crash_report import Precaution, avoid
from ...recorder.flight_recorder import ALIVE, RAM_NEED, VRAM_NEED, FlightRecorder, Phase
from ...weights.storage import dtype_name
from ..hooks import HookSet
from .patches import describe

log = logging.getLogger(__name__)

BETWEEN_SNAPSHOTS_SECONDS = 1.0
"""Of steps, which may be many a second; everything else that has a phase takes longer than a look at the memory."""


Plan = Mapping[str, int | None]
"""Bytes by the names of `flight_recorder`."""


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
        self._exits = HookSet()
        self.others = 0
        """Grows with every phase that begins or ends, but steps: what stays the same while nothing but steps is done."""

    @contextlib.contextmanager
    def phase(self, phase: Phase, patcher: Any = None, plan: Plan | None = None) -> Iterator[None]:
        """`patcher`: of the model that the phase is about."""
        facts: dict[str, Any] = {} if patcher is None else about_model(patcher)
        is_other = phase is not Phase.SAMPLING_STEP
        self.others += is_other
        try:
            with self.recorder.enter(phase, memory=self._memory(phase), plan=plan, **facts):
                yield
        finally:
            self.others += is_other

    def work(self, phase: Phase, ram_bytes: int) -> contextlib.AbstractContextManager[None]:
        """What an engine is about to do (`patching.watching.Watch`)."""
        return self.phase(phase, plan={RAM_NEED: ram_bytes or None})

    def precautions(self, model: Any) -> frozenset[Precaution]:
        """What is planned around, because the last process died of it with a model like this one."""
        return avoid(self._crash, type(model).__name__, _storage(model))

    def lay_around(
        self,
        hooks: HookSet,
        owner: Any,
        name: str,
        phase: Phase,
        plan: Callable[..., Plan | None] = lambda *_, **__: {},
    ) -> None:
        """Hooks a function of the host. `plan` gets what the function gets; None from it means that this call is no such
        phase."""

        def body(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            planned: Plan | None = {}
            try:
                planned = plan(*args, **kwargs)
            except Exception:
                # Another version of the host passes other things; the phase is what matters.
                log.debug("no plan for %s", name, exc_info=True)
            if planned is None:
                return original(*args, **kwargs)
            with self.phase(phase, plan=planned or None):
                return original(*args, **kwargs)

        hooks.add(owner, name, body)

    def close_at_the_end(self) -> None:
        """Closes the recorder at every end that the process itself makes. Forge ends at once, by `os._exit`, which asks
        nobody: at Ctrl+C, at its button "Restart", and when its API is told to end it."""
        atexit.register(self.recorder.close)

        def at_once(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                self.recorder.close()
            finally:
                original(*args, **kwargs)

        self._exits.add(os, "_exit", at_once)

    def _memory(self, phase: Phase) -> dict[str, int | None] | None:
        now = time.monotonic()
        if phase is Phase.SAMPLING_STEP and now - self._last_look < BETWEEN_SNAPSHOTS_SECONDS:
            return None
        self._last_look = now
        try:
            snapshot = self._snapshot()
        except Exception:
            # A record must not be what stops an image.
            log.debug("no look at the memory", exc_info=True)
            return None
        return {ALIVE: snapshot.alive_ram_bytes, **{name: one.bytes for name, one in snapshot.readings()}}


def about_model(patcher: Any) -> dict[str, Any]:
    """Model, storage and LoRAs of a patcher, as the recorder takes them. No prompt, no folder."""
    model = getattr(patcher, "model", None)
    loras = [describe(identifier)[0] for identifier in getattr(patcher, "lora_patches", None) or {}]
    return {"model": type(model).__name__, "storage": _storage(model), "loras": loras}


def reading_plan(state: Any, additional_state_dicts: Sequence[Any] | None = None) -> Plan:
    """Of `forge_loader`, which gets file names: it reads whole files."""
    files = [Path(one) for one in (state, *(additional_state_dicts or ())) if isinstance(one, (str, Path))]
    return {RAM_NEED: sum(file.stat().st_size for file in files if file.is_file())}


def text_encoder_plan(
    guess: Any, component_name: str, lib_name: str, cls_name: str, repo_path: str, state_dict: Mapping[str, Any] | None
) -> Plan | None:
    """Of `load_huggingface_component`, which makes all parts of a model: a text encoder gets memory of its own, beside what
    was read. None for the other parts."""
    if not component_name.startswith("text_encoder"):
        return None
    return {RAM_NEED: sum(getattr(tensor, "nbytes", 0) for tensor in (state_dict or {}).values())}


def moving_plan(memory: Any, patchers: Sequence[Any], device: Any, free_bytes: int) -> Plan:
    """What a device has to hold of models that go there: what is not there yet, and what has to be free beside it."""
    return {VRAM_NEED: free_bytes + sum(int(memory.module_size(p.model, exclude_device=device)) for p in patchers)}


def leaving_plan(memory: Any, loaded: Any) -> Plan:
    """What comes to RAM when a loaded model leaves its device."""
    if loaded.device.type == "cpu":
        return {}
    return {RAM_NEED: int(memory.module_size(loaded.model.model, include_device=loaded.device))}


def decoding_plan(memory: Any, vae: Any, samples: Any) -> Plan:
    """Of `VAE.decode_inner`, by Forge's own estimate."""
    return _vae_plan(memory, vae, vae.memory_used_decode, samples.shape)


def encoding_plan(memory: Any, vae: Any, pixels: Any) -> Plan:
    """Of `VAE.encode_inner`, which gets `(pictures, height, width, colours)` and estimates for colours first."""
    return _vae_plan(memory, vae, vae.memory_used_encode, pixels.movedim(-1, 1).shape)


def _vae_plan(memory: Any, vae: Any, estimate: Callable[..., float], shape: Any) -> Plan:
    if getattr(memory, "VAE_ALWAYS_TILED", False):
        # The estimate is of the whole picture.
        return {}
    return {RAM_NEED if vae.device.type == "cpu" else VRAM_NEED: int(estimate(shape, vae.vae_dtype))}


def _storage(model: Any) -> str:
    kept: Any = getattr(model, "storage_dtype", "")
    return kept if isinstance(kept, str) else dtype_name(kept)
