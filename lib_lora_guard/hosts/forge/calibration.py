"""Measures what loading, applying LoRAs, a step and a decode take of the card while Forge makes images, beside what was
predicted for exactly that, and corrects the next predictions by it (`memory/calibration.py`).

What is compared is bytes in use at the peak, beside those in use before (`memory/calibration_peaks.py` says why):

load    a model's weights, for one that was not on the card and goes there whole
apply   what the card lacks of LoRA factors; they are brought there in the first call of the model
step    one call of the model: its rows are part of the key, so prompt and negative prompt in one call and in two are apart
decode  the VAE's decoder, one picture, whole

Left out: a call that others work in too (ControlNets, patches of attention or blocks), one after which something stayed on
the card that was not there before, decoding in tiles or several pictures, and whatever ran while another thread used the
card. On every other device than a CUDA card nothing is done at all.

Sources: Forge's `backend/memory_management.py`, `backend/modules/k_model.py`, `backend/sampling/sampling_function.py`,
`backend/patcher/vae.py`, `modules/memmon.py`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...memory.calibration import Key, Kind, resolution_bucket, stack_signature
from ...memory.calibration_peaks import Part, Peaks
from ...planning import activations
from ...planning.activations import Activations
from ...runtime import corrections as forge_corrections
from ...runtime.corrections import Corrections
from ...runtime.step_estimates import LATENT_PIXELS, Estimates, shape_of, stored_as
from ...weights.dtype_names import dtype_name
from ...weights.storage import MB
from .patches import describe

log = logging.getLogger(__name__)

FORGES_OPTIONS = frozenset({"cond_or_uncond", "sigmas", "cond_mark", "cond_indices", "uncond_indices"})
"""What Forge itself tells the model with each call. Anything more comes from somebody who works in the call."""

SETTLED_BYTES = 16 * MB
"""More than that stayed, or went, in a call: factors, workspaces, or layers that moved. The call was not of the model alone."""

_Original = Callable[..., Any]


@dataclass
class _Decode:
    """One call of the VAE's decoder. `is_whole`: not in tiles, and not several pictures."""

    key: Key
    predicted: Activations
    is_whole: bool


@dataclass
class _Applied:
    """LoRAs that were put on a model whose next call brings their factors."""

    key: Key
    predicted_bytes: int
    peak_bytes: int
    stays_bytes: int


class ForgeCalibration:
    def __init__(self, memory: Any, corrections: Corrections | None = None, peaks: Peaks | None = None) -> None:
        """`memory`: Forge's `backend.memory_management`."""
        self._memory = memory
        self.corrections = corrections or forge_corrections.OF_PROCESS
        self.estimates = Estimates(self.corrections)
        self.peaks = peaks or Peaks()
        self._decoding = threading.local()
        """`.now`: what this thread decodes."""
        self._coming: weakref.WeakKeyDictionary[Any, tuple[Key, int, Any]] = weakref.WeakKeyDictionary()
        """By model: what its next refresh was predicted to bring, and where."""
        self._applied: weakref.WeakKeyDictionary[Any, _Applied] = weakref.WeakKeyDictionary()

    # -- measuring

    def load_models_gpu(self, original: _Original, models: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        """What comes and leaves in here is nobody's; it is the end of the steps before it."""
        patchers = list(models)
        device = patchers[0].load_device if patchers else None
        if not self.corrections.open_for(device):
            return original(patchers, *args, **kwargs)
        self.corrections.settle(is_new_picture=any(hasattr(one.model, "diffusion_model") for one in patchers))
        with self.peaks.part(device):
            return original(patchers, *args, **kwargs)

    def model_load(self, original: _Original, loaded: Any, *args: Any, **kwargs: Any) -> Any:
        device, model = loaded.device, getattr(loaded.model, "model", None)
        if not self.corrections.open_for(device):
            return original(loaded, *args, **kwargs)
        budget = next(iter((*args, *kwargs.values())), -1)
        predicted = int(self._memory.module_size(model, exclude_device=device))
        is_whole = budget < 0 and not self._memory.module_size(model, include_device=device)
        # Before it is packed or baked on its way, as `load_bytes` asks.
        key = load_key(model)
        with self.peaks.part(device) as part:
            result = original(loaded, *args, **kwargs)
        if is_whole:
            self.corrections.note(key, predicted, part.peak_bytes)
        return result

    def refresh(self, original: _Original, loader: Any, *args: Any, **kwargs: Any) -> Any:
        coming = self._coming.pop(loader.model, None)
        if coming is None:
            return original(loader, *args, **kwargs)
        key, predicted, device = coming
        with self.peaks.part(device) as part:
            result = original(loader, *args, **kwargs)
        if part.peak_bytes is not None:
            self._applied[loader.model] = _Applied(key, predicted, part.peak_bytes, part.stays_bytes)
        return result

    def apply_model(self, original: _Original, model: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the denoiser: `(x, t, c_concat, ..., control, transformer_options)`."""
        x = args[0] if args else kwargs.get("x")
        if not isinstance(x, torch.Tensor) or not self.corrections.open_for(x.device):
            return original(model, *args, **kwargs)
        has_company = kwargs.get("control") is not None or _others(kwargs.get("transformer_options"))
        is_alone = not has_company and not self._is_swapped(model)
        with self.peaks.part(x.device) as part:
            result = original(model, *args, **kwargs)
        self._after_call(model, x, result, part, is_alone)
        return result

    def _is_swapped(self, model: Any) -> bool:
        """Layers outside the card are copied there in each call, which is not the step's own: counted as such it would keep
        a model swapped that fits again."""
        loaded = self._memory.current_loaded_models
        return any(getattr(one, "real_model", None) is model and one.model_accelerated for one in loaded)

    def _after_call(self, model: Any, x: torch.Tensor, result: Any, part: Part, is_alone: bool) -> None:
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
            # Another extension's model, or another shape than pictures have.
            log.debug("a step is not measured", exc_info=True)
            return
        if found is not None:
            self.corrections.note(found[0], found[1].used_bytes, part.peak_bytes)

    def decode_inner(self, original: _Original, vae: Any, *args: Any, **kwargs: Any) -> Any:
        samples = args[0] if args else kwargs.get("samples_in")
        device = getattr(vae, "device", None)
        decode = _decode_of(vae, samples) if self.corrections.open_for(device) else None
        if decode is None:
            return original(vae, *args, **kwargs)
        with self._while_decoding(decode), self.peaks.part(device) as part:
            result = original(vae, *args, **kwargs)
        if decode.is_whole:
            self.corrections.note(decode.key, decode.predicted.used_bytes, part.peak_bytes)
        self.corrections.settle()
        return result

    def decode_tiled(self, original: _Original, vae: Any, *args: Any, **kwargs: Any) -> Any:
        """Asked for, or after the whole picture ran out of memory."""
        decode = getattr(self._decoding, "now", None)
        if decode is not None:
            decode.is_whole = False
        return original(vae, *args, **kwargs)

    @contextlib.contextmanager
    def _while_decoding(self, decode: _Decode) -> Iterator[None]:
        before, self._decoding.now = getattr(self._decoding, "now", None), decode
        try:
            yield
        finally:
            self._decoding.now = before

    def monitor_begins(self, original: _Original, monitor: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of `MemUsageMonitor.monitor`: it shows the peaks of the image that begins here."""
        if not monitor.run_flag.is_set():
            self.peaks.forget()
        return original(monitor, *args, **kwargs)

    def monitor_reads(self, original: _Original, monitor: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of `MemUsageMonitor.read`: with the peaks that were reset meanwhile."""
        data = original(monitor, *args, **kwargs)
        for name, peak in (("active_peak", self.peaks.active_peak), ("reserved_peak", self.peaks.reserved_peak)):
            if peak and name in data:
                data[name] = max(data[name], peak)
        return data

    # -- correcting

    def factor_bytes(self, patcher: Any, predicted_bytes: int) -> int:
        """What the factors of a patcher that is about to be loaded take of the device, corrected."""
        device, stack = patcher.load_device, getattr(patcher, "lora_patches", None)
        self._coming.pop(patcher.model, None)
        if predicted_bytes <= 0 or not stack or not self.corrections.open_for(device):
            return predicted_bytes
        key = Key(
            Kind.APPLY,
            _name_of(patcher.model),
            stored_as(patcher.model),
            stack=stack_signature(describe(identifier)[0] for identifier in stack),
        )
        self._coming[patcher.model] = key, predicted_bytes, device
        return max(0, predicted_bytes + self.corrections.bytes(key, predicted_bytes))

    def load_bytes(self, patchers: Iterable[Any], device: Any) -> int:
        """What to add to the weights of models that are about to be loaded."""
        if not self.corrections.open_for(device):
            return 0
        sizes = [(p.model, int(self._memory.module_size(p.model, exclude_device=device))) for p in patchers]
        return sum(self.corrections.bytes(load_key(model), size) for model, size in sizes)

    def decode_bytes(self) -> int:
        """What to add to the estimate of what this thread is about to decode; 0 where it does not."""
        decode = getattr(self._decoding, "now", None)
        if decode is None:
            return 0
        return self.corrections.held(decode.key, decode.predicted) - int(decode.predicted.held_bytes)


def load_key(model: Any) -> Key:
    """Models of one name can be of many sizes: text encoders, above all."""
    millions = sum(parameter.nelement() for parameter in model.parameters()) // 1_000_000
    return Key(Kind.LOAD, f"{_name_of(model)} {millions}M", stored_as(model))


def _name_of(model: Any) -> str:
    return type(getattr(model, "diffusion_model", model)).__name__


def _others(options: Any) -> bool:
    """True where somebody else works in this call. What a patch is made of is their business: it may have no truth."""
    told = (value for name, value in (options or {}).items() if name not in FORGES_OPTIONS)
    # An array has no truth, and whatever equality it likes.
    return any(
        not (value is None or value is False or (isinstance(value, (dict, list, tuple)) and not value))
        for value in told
    )


def _decode_of(vae: Any, samples: Any) -> _Decode | None:
    """None for what is not one of Forge's VAEs, or no latent."""
    try:
        pictures, height, width = shape_of(samples.shape)
        asked = float(vae.memory_used_decode(samples.shape, vae.vae_dtype))
        used = int(asked * activations.DECODE_WHERE_FORGE_HAS)
        held = int(asked * activations.VAE_HOLDS_WHERE_FORGE_HAS)
        name = f"{type(vae.first_stage_model).__name__} {int(samples.shape[1])}"
        size = resolution_bucket(width * LATENT_PIXELS, height * LATENT_PIXELS)
        key = Key(Kind.DECODE, name, dtype_name(vae.vae_dtype), size)
    except (AttributeError, TypeError, ValueError, IndexError, OverflowError):
        log.debug("a decode is not measured", exc_info=True)
        return None
    return _Decode(key, Activations(used, held), is_whole=pictures == 1)
