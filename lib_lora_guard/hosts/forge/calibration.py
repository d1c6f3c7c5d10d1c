"""Measures the VRAM that loading, applying LoRAs, a step and a decode take while Forge makes images, compares it with what was
predicted for exactly that, and corrects the next predictions (`memory/calibration.py`).

Compared are bytes in use at the peak beside those in use before (`memory/calibration_peaks.py` says why):

load    a model's weights, for one that was not on the card and goes there whole
apply   what the card lacks of LoRA factors; they are brought there in the first call of the model
step    one call of the model: its rows are part of the key, so prompt and negative prompt in one call and in two are apart
decode  the VAE's decoder, one picture, whole

Left out: a call that other extensions work in (ControlNets, patches of attention or blocks), a call after which something
stayed on the card that was not there before, decoding in tiles or several pictures, and whatever ran while another thread
used the card. On every other device than a CUDA card nothing is done at all.

Sources: Forge's `backend/memory_management.py`, `backend/modules/k_model.py`, `backend/sampling/sampling_function.py`,
`backend/patcher/vae.py`, `modules/memmon.py`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Concatenate, Protocol

import torch

from ...memory.calibration import Key, Kind, resolution_bucket, stack_signature
from ...memory.calibration_peaks import Part, Peaks
from ...planning import activations
from ...planning.activations import Activations
from ...runtime.corrections import Corrections
from ...runtime.hooks import P, R
from ...runtime.step_estimates import LATENT_PIXELS, Estimates, shape_of
from ...units import MB
from ...weights.dtype_names import dtype_name
from . import facts
from .facts import is_denoiser, loaded_module, network_name, patches_of, storage_name
from .identifiers import describe
from .types import LoadedModel, LoraLoader, MemoryManagement, Patcher, Vae

log = logging.getLogger(__name__)

FORGES_OPTIONS = frozenset({"cond_or_uncond", "sigmas", "cond_mark", "cond_indices", "uncond_indices"})
"""The options that Forge itself puts into `transformer_options`. Any other comes from an extension that works in the call."""

SETTLED_BYTES = 16 * MB
"""If more than that stayed or went in a call, it was not of the model alone: factors, workspaces, or layers that moved."""


class Monitor(Protocol):
    """`modules.memmon.MemUsageMonitor`: shows the peaks of an image."""

    run_flag: threading.Event


@dataclass
class _Decode:
    """One call of the VAE's decoder."""

    key: Key
    predicted: Activations
    is_whole: bool
    """False in tiles, and for several pictures."""


@dataclass
class _Applied:
    """LoRAs that were put on a model whose next call brings their factors."""

    key: Key
    predicted_bytes: int
    peak_bytes: int
    stays_bytes: int


class _Decoding(threading.local):
    now: _Decode | None = None
    """The decode that this thread is in."""


class ForgeCalibration:
    """Its measuring methods are layers around Forge's functions: `layer(original, *args, **kwargs)`, all of them outermost."""

    def __init__(self, memory: MemoryManagement, corrections: Corrections, peaks: Peaks | None = None) -> None:
        """
        Args:
            memory: Forge's `backend.memory_management`.
            corrections: of the process.
            peaks: for tests.
        """
        self._memory = memory
        self.corrections = corrections
        self.estimates = Estimates(corrections, facts)
        self.peaks = peaks or Peaks()
        self._decoding = _Decoding()
        self._coming: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Key, int, torch.device]] = (
            weakref.WeakKeyDictionary()
        )
        """By model: the prediction of what its next refresh brings, and where."""
        self._applied: weakref.WeakKeyDictionary[torch.nn.Module, _Applied] = weakref.WeakKeyDictionary()

    # -- measuring

    def load_models_gpu(
        self,
        original: Callable[Concatenate[list[Patcher], P], R],
        models: Iterable[Patcher],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Measures `load_models_gpu` so that its peaks are attributed to no part around it. It ends the steps before it, whose
        peaks are recorded first."""
        patchers = list(models)
        device = patchers[0].load_device if patchers else None
        if not self.corrections.open_for(device):
            return original(patchers, *args, **kwargs)
        self.corrections.settle(is_new_picture=any(is_denoiser(one.model) for one in patchers))
        with self.peaks.part(device):
            return original(patchers, *args, **kwargs)

    def model_load(
        self,
        original: Callable[Concatenate[LoadedModel, float, P], R],
        loaded: LoadedModel,
        model_gpu_memory_when_using_cpu_swap: float = -1,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Measures `LoadedModel.model_load` of a model that goes to the card whole."""
        budget, device = model_gpu_memory_when_using_cpu_swap, loaded.device
        if not self.corrections.open_for(device):
            return original(loaded, budget, *args, **kwargs)
        model = loaded.model.model
        predicted = int(self._memory.module_size(model, exclude_device=device))
        is_whole = budget < 0 and not self._memory.module_size(model, include_device=device)
        # As `load_bytes` asks: before the model is packed or baked on its way.
        key = load_key(model)
        with self.peaks.part(device) as part:
            result = original(loaded, budget, *args, **kwargs)
        if is_whole:
            self.corrections.note(key, predicted, part.peak_bytes)
        return result

    def refresh(
        self, original: Callable[Concatenate[LoraLoader, P], R], loader: LoraLoader, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Measures `LoraLoader.refresh`, if `factor_bytes` was asked for its model before."""
        coming = self._coming.pop(loader.model, None)
        if coming is None:
            return original(loader, *args, **kwargs)
        key, predicted, device = coming
        with self.peaks.part(device) as part:
            result = original(loader, *args, **kwargs)
        if part.peak_bytes is not None:
            self._applied[loader.model] = _Applied(key, predicted, part.peak_bytes, part.stays_bytes)
        return result

    def apply_model(
        self,
        original: Callable[Concatenate[torch.nn.Module, P], R],
        model: torch.nn.Module,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Measures one call of the denoiser, `KModel.apply_model(x, t, c_concat, ..., control, transformer_options)`."""
        x = args[0] if args else kwargs.get("x")
        if not isinstance(x, torch.Tensor) or not self.corrections.open_for(x.device):
            return original(model, *args, **kwargs)
        options = kwargs.get("transformer_options")
        is_shared = kwargs.get("control") is not None or (isinstance(options, Mapping) and _has_others(options))
        is_alone = not is_shared and not self._is_swapped(model)
        with self.peaks.part(x.device) as part:
            result = original(model, *args, **kwargs)
        self._after_call(model, x, result, part, is_alone)
        return result

    def _is_swapped(self, model: torch.nn.Module) -> bool:
        """Returns True if layers are copied to the card in each call. These copies are not the step's own: counted as such they
        would keep a model swapped that fits again."""
        loaded = self._memory.current_loaded_models
        return any(loaded_module(one) is model and one.model_accelerated for one in loaded)

    def _after_call(self, model: torch.nn.Module, x: torch.Tensor, result: R, part: Part, is_alone: bool) -> None:
        applied = self._applied.pop(model, None)
        if part.peak_bytes is None:
            return
        returned = result.nelement() * result.element_size() if isinstance(result, torch.Tensor) else 0
        stays = part.stays_bytes - returned
        if applied is not None:
            measured = max(applied.peak_bytes, applied.stays_bytes + stays)
            self.corrections.note(applied.key, applied.predicted_bytes, measured)
        if not is_alone or abs(stays) > SETTLED_BYTES:
            return
        try:
            found = self.estimates.step(model, shape_of(x.shape))
        except (TypeError, ValueError, IndexError, OverflowError):
            # Another extension's model, or a shape that is not a picture's.
            log.debug("a step is not measured", exc_info=True)
            return
        if found is not None:
            self.corrections.note(found[0], found[1].used_bytes, part.peak_bytes)

    def decode_inner(
        self, original: Callable[Concatenate[Vae, P], R], vae: Vae, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Measures `VAE.decode_inner(samples_in)`."""
        samples = args[0] if args else kwargs.get("samples_in")
        decode = None
        if isinstance(samples, torch.Tensor) and self.corrections.open_for(vae.device):
            decode = _decode_of(vae, samples.shape)
        if decode is None:
            return original(vae, *args, **kwargs)
        with self._while_decoding(decode), self.peaks.part(vae.device) as part:
            result = original(vae, *args, **kwargs)
        if decode.is_whole:
            self.corrections.note(decode.key, decode.predicted.used_bytes, part.peak_bytes)
        self.corrections.settle()
        return result

    def decode_tiled(
        self, original: Callable[Concatenate[Vae, P], R], vae: Vae, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Notes that the present decode is in tiles (`VAE.decode_tiled_`): as requested, or after the whole picture ran out of
        memory."""
        decode = self._decoding.now
        if decode is not None:
            decode.is_whole = False
        return original(vae, *args, **kwargs)

    @contextlib.contextmanager
    def _while_decoding(self, decode: _Decode) -> Iterator[None]:
        before, self._decoding.now = self._decoding.now, decode
        try:
            yield
        finally:
            self._decoding.now = before

    def monitor_begins(
        self, original: Callable[Concatenate[Monitor, P], R], monitor: Monitor, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Wraps `MemUsageMonitor.monitor`, which shows the peaks of the image that begins here."""
        if not monitor.run_flag.is_set():
            self.peaks.forget()
        return original(monitor, *args, **kwargs)

    def monitor_reads(
        self,
        original: Callable[Concatenate[Monitor, P], MutableMapping[str, int]],
        monitor: Monitor,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> MutableMapping[str, int]:
        """Wraps `MemUsageMonitor.read`: adds the peaks that the measurements have reset meanwhile."""
        data = original(monitor, *args, **kwargs)
        for name, peak in (("active_peak", self.peaks.active_peak), ("reserved_peak", self.peaks.reserved_peak)):
            if peak and name in data:
                data[name] = max(data[name], peak)
        return data

    # -- correcting

    def factor_bytes(self, patcher: Patcher, predicted_bytes: int) -> int:
        """Corrects a prediction of the VRAM for LoRA factors, and measures the next refresh against it.

        Args:
            patcher: is about to be loaded.
            predicted_bytes: for its factors that are not on the device yet.
        """
        device, stack = patcher.load_device, patches_of(patcher)
        self._coming.pop(patcher.model, None)
        if predicted_bytes <= 0 or not stack or not self.corrections.open_for(device):
            return predicted_bytes
        key = Key(
            Kind.APPLY,
            network_name(patcher.model),
            storage_name(patcher.model),
            stack=stack_signature(describe(identifier)[0] for identifier in stack),
        )
        self._coming[patcher.model] = key, predicted_bytes, device
        return max(0, predicted_bytes + self.corrections.bytes(key, predicted_bytes))

    def load_bytes(self, models: Iterable[torch.nn.Module], device: torch.device) -> int:
        """Returns what to add to the weights of models that are about to be loaded."""
        if not self.corrections.open_for(device):
            return 0
        sizes = [(model, int(self._memory.module_size(model, exclude_device=device))) for model in models]
        return sum(self.corrections.bytes(load_key(model), size) for model, size in sizes)

    def decode_bytes(self) -> int:
        """Returns what to add to the estimate of the decode that this thread is in; 0 outside a decode."""
        decode = self._decoding.now
        if decode is None:
            return 0
        return self.corrections.held(decode.key, decode.predicted) - int(decode.predicted.held_bytes)


def load_key(model: torch.nn.Module) -> Key:
    """Returns the key of a load. Models of one name can have many sizes: text encoders, above all."""
    millions = sum(parameter.nelement() for parameter in model.parameters()) // 1_000_000
    return Key(Kind.LOAD, f"{network_name(model)} {millions}M", storage_name(model))


def _has_others(options: Mapping[str, Any]) -> bool:
    """Returns True if `transformer_options` holds anything that Forge does not put there. Values are never used as booleans:
    arrays raise then."""
    foreign = (value for name, value in options.items() if name not in FORGES_OPTIONS)
    # Nor are they compared: an array's equality is an array.
    return any(
        not (value is None or value is False or (isinstance(value, (dict, list, tuple)) and not value))
        for value in foreign
    )


def _decode_of(vae: Vae, shape: torch.Size) -> _Decode | None:
    """Returns None for another extension's VAE, and for what is no latent."""
    try:
        pictures, height, width = shape_of(shape)
        asked = float(vae.memory_used_decode(shape, vae.vae_dtype))
        used = int(asked * activations.DECODE_WHERE_FORGE_HAS)
        held = int(asked * activations.VAE_HOLDS_WHERE_FORGE_HAS)
        name = f"{type(vae.first_stage_model).__name__} {int(shape[1])}"
        size = resolution_bucket(width * LATENT_PIXELS, height * LATENT_PIXELS)
        key = Key(Kind.DECODE, name, dtype_name(vae.vae_dtype), size)
    except (AttributeError, TypeError, ValueError, IndexError, OverflowError):
        log.debug("a decode is not measured", exc_info=True)
        return None
    return _Decode(key, Activations(used, held), is_whole=pictures == 1)
