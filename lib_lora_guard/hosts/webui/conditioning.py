"""Which prompts have to be encoded again.

Forge keeps the conditioning of the last prompt, and its key holds every LoRA of the prompt: another strength of a LoRA
without text-encoder keys brings the text encoder onto the GPU, encodes the same prompt to the same numbers, and sends it
away again. Here the key holds what lies on the text encoder instead, and more than one prompt is remembered.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ...adapters.base import Adapter
from ...weights.storage import MB

log = logging.getLogger(__name__)

REMEMBERED_BYTES = 128 * MB
"""RAM for encoded prompts: some 30 of Flux (4 MB each), 200 of SDXL."""

_OWN_PACKAGE = __name__.partition(".")[0]
_AESTHETIC_SCORES = ("sdxl_refiner_low_aesthetic_score", "sdxl_refiner_high_aesthetic_score")
"""Forge's options that go into the conditioning of SDXL's refiner."""
_NETWORK_NAMES = ("lora", "lyco")
_OWN_ARGUMENTS = ("te", "unet", "dyn")


class PromptMemory:
    """Encoded prompts of one model, those used longest ago leave first. Kept in RAM wherever they were made."""

    def __init__(self, limit_bytes: int = REMEMBERED_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._known: list[tuple[Any, _Kept]] = []

    def find(self, key: Any) -> tuple[Any, Any] | None:
        """The conditioning and its infotext entries as they were made, on the same devices."""
        # Keys hold lists and settings of the host, which cannot be hashed; a handful is compared quickly.
        for place, (known, kept) in enumerate(self._known):
            if known == key:
                self._known.append(self._known.pop(place))
                return kept.restored(), copy.copy(kept.infotext)
        return None

    def keep(self, key: Any, conds: Any, infotext: Any) -> None:
        """Forgets what no longer fits. What is not built of known parts is not kept."""
        try:
            kept = _Kept(conds, infotext)
        except _UnknownPartError as error:
            log.debug("conditioning is not remembered: %s", error)
            return
        self._known = [(known, one) for known, one in self._known if known != key]
        if kept.bytes > self._limit_bytes:
            return
        self._known.append((key, kept))
        while sum(one.bytes for _, one in self._known) > self._limit_bytes:
            self._known.pop(0)

    def clear(self) -> None:
        self._known.clear()

    @property
    def bytes(self) -> int:
        return sum(kept.bytes for _, kept in self._known)

    def __len__(self) -> int:
        return len(self._known)


class _UnknownPartError(TypeError):
    """Something in a conditioning that is neither a tensor nor built of what Forge builds one of."""


class _Kept:
    def __init__(self, conds: Any, infotext: Any) -> None:
        self.bytes = 0
        self._devices: dict[int, torch.device] = {}
        self._conds = _mapped(conds, self._to_ram, {})
        self.infotext = copy.copy(infotext)

    def restored(self) -> Any:
        # A copy each time: whoever uses a conditioning may write into it.
        return _mapped(self._conds, lambda t: t.to(self._devices[id(t)], copy=True), {})

    def _to_ram(self, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach().to("cpu", copy=True)
        self._devices[id(kept)] = tensor.device
        self.bytes += kept.numel() * kept.element_size()
        return kept


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor], done: dict[int, Any]) -> Any:
    """`value` with every tensor changed; what occurs twice (the images of a batch) stays one object."""
    if id(value) in done:
        return done[id(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    new: Any
    if isinstance(value, torch.Tensor):
        new = change(value)
    elif isinstance(value, dict):
        new = copy.copy(value)
        new.update({k: _mapped(v, change, done) for k, v in value.items()})
    elif isinstance(value, tuple):
        parts = [_mapped(v, change, done) for v in value]
        new = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    elif type(value) is list:
        new = [_mapped(v, change, done) for v in value]
    elif type(value).__module__.endswith("prompt_parser"):
        new = copy.copy(value)
        vars(new).update({k: _mapped(v, change, done) for k, v in vars(value).items()})
    else:
        raise _UnknownPartError(f"{type(value).__module__}.{type(value).__name__}")
    done[id(value)] = new
    return new


class Conditioning:
    """The two hooks on Forge's `StableDiffusionProcessing`."""

    def __init__(
        self,
        shared: ModuleType,
        meaning: Callable[[], object],
        has_applied: Callable[[Any], bool] = lambda patcher: True,
        encoding: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`meaning`: what else decides how LoRAs act on the text encoder (the guard's mode). `has_applied` says of a patcher
        whether its LoRAs lie on the model. `encoding` is entered while a prompt is encoded."""
        self._shared, self._meaning, self._has_applied = shared, meaning, has_applied
        self._encoding = encoding
        self._memories: weakref.WeakKeyDictionary[Any, PromptMemory] = weakref.WeakKeyDictionary()
        self._numbers = _Numbers()

    def forget(self) -> int:
        """Gives back what is remembered; returns the bytes."""
        memories = list(self._memories.values())
        size = sum(memory.bytes for memory in memories)
        for memory in memories:
            memory.clear()
        return size

    def cached_params(
        self, original: Callable[..., Any], processing: Any, required_prompts: Any, steps: Any, extra_network_data: Any,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The host's key, with what lies on the text encoder in the place of the prompt's LoRAs."""
        if self._is_someone_at_work():
            return original(processing, required_prompts, steps, extra_network_data, *args, **kwargs)
        try:
            data = (
                self._others(extra_network_data),
                self._on_text_encoder(),
                self._meaning(),
                # What SDXL's conditioning holds beside the text, and the host's key does not.
                [getattr(required_prompts, name, None) for name in ("width", "height")],
                [getattr(self._shared.opts, name, None) for name in _AESTHETIC_SCORES],
                self._foreign_hooks(),
            )
        except Exception:
            log.debug("the host's own key for the conditioning is used", exc_info=True)
            data = extra_network_data
        return original(processing, required_prompts, steps, data, *args, **kwargs)

    def get_conds_with_caching(
        self, original: Callable[..., Any], processing: Any, function: Any, required_prompts: Any, steps: Any,
        caches: Any, extra_network_data: Any, hires_steps: Any = None,
    ) -> Any:  # fmt: skip
        """The host's function, which finds what it looks for in its cache where the guard remembers it."""
        everything = (function, required_prompts, steps, caches, extra_network_data, hires_steps)
        if self._is_someone_at_work():
            return original(processing, *everything)
        model = self._shared.sd_model
        memory = self._memories.setdefault(model, PromptMemory())
        if all(cache[0] is None for cache in caches):
            # Emptied: someone wants the prompt encoded anew, or the host's option says that nothing is kept.
            memory.clear()
            key = None
        else:
            old = self._shared.opts.use_old_scheduling
            params = processing.cached_params(required_prompts, steps, extra_network_data, hires_steps, old)
            if any(cache[0] is not None and cache[0] == params for cache in caches):
                return original(processing, *everything)
            key = (_name_of(function), getattr(required_prompts, "is_negative_prompt", None), params)
            known = memory.find(key)
            if known is not None:
                caches[0][:2] = [params, known[0]]
                if len(caches[0]) > 2:
                    caches[0][2] = known[1] or {}
                return original(processing, *everything)
        with self._encoding():
            conds = original(processing, *everything)
        made = caches[0]
        if not self._is_encoded_as_asked():
            # The next image tries again, and must not find this one's.
            made[0] = None
        elif made[0] is not None and getattr(self._shared.opts, "persistent_cond_cache", True):
            key = (_name_of(function), getattr(required_prompts, "is_negative_prompt", None), made[0])
            memory.keep(key, conds, made[2] if len(made) > 2 else None)
        return conds

    def _on_text_encoder(self) -> object:
        """Every patch on the text encoder as it is now: which tensors, how strong."""
        patches: Mapping[Any, Any] = self._shared.sd_model.forge_objects.clip.patcher.lora_patches
        return [
            (str(identifier), [(key, [self._entry(entry) for entry in entries]) for key, entries in on_keys.items()])
            for identifier, on_keys in patches.items()
        ]

    def _is_someone_at_work(self) -> bool:
        """True where another extension has replaced the forward pass of a layer in the text encoder: regional-prompter does
        its work there, by settings that no key of ours knows. Then all is as in the host."""
        return any("forward" in vars(module) for module in self._encoder_modules())

    def _foreign_hooks(self) -> list[int]:
        """Who else listens in the text encoder, or changes what goes through it: one more or one less encodes anew."""
        return [
            id(hook)
            for module in self._encoder_modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if type(getattr(hook, "__self__", hook)).__module__.partition(".")[0] != _OWN_PACKAGE
        ]

    def _encoder_modules(self) -> Iterator[torch.nn.Module]:
        model = getattr(getattr(self._shared.sd_model.forge_objects, "clip", None), "cond_stage_model", None)
        return iter(()) if model is None else model.modules()

    def _is_encoded_as_asked(self) -> bool:
        """False where the LoRAs could not be put on the text encoder just now."""
        patcher = getattr(getattr(self._shared.sd_model.forge_objects, "clip", None), "patcher", None)
        return patcher is None or not hasattr(patcher, "lora_loader") or self._has_applied(patcher)

    def _entry(self, entry: Sequence[Any]) -> object:
        strength, value, strength_model, offset = entry[:4]
        return strength, strength_model, offset, self._numbers.of(value)

    @staticmethod
    def _others(extra_network_data: Any) -> object:
        """What the prompt says beside names and strengths of LoRAs: other networks, arguments that other extensions read."""
        others: list[object] = []
        for network, uses in (extra_network_data or {}).items():
            if network not in _NETWORK_NAMES:
                others.append((network, [use.items for use in uses]))
                continue
            for use in uses:
                foreign = [text for text in use.positional[1:] if not _is_number(text)]
                named = {k: v for k, v in use.named.items() if k not in _OWN_ARGUMENTS or not _is_number(v)}
                if foreign or named:
                    others.append((network, use.items))
        return others


def _name_of(function: Any) -> str:
    """Another extension may hand over something callable that has no name."""
    return getattr(function, "__name__", None) or repr(function)


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True


class _Numbers:
    """A number for each tensor, never given twice: an address would be, and keys outlive tensors."""

    def __init__(self) -> None:
        self._numbers: Any = WeakIdKeyDictionary()
        self._next = 0

    def of(self, value: Any) -> object:
        if isinstance(value, torch.Tensor):
            if value not in self._numbers:
                self._numbers[value] = self._next = self._next + 1
            return self._numbers[value]
        if isinstance(value, Adapter):
            return type(value).__name__, [self.of(tensor) for tensor in value.tensors()]
        if isinstance(value, (list, tuple)):
            return [self.of(part) for part in value]
        return str(value)
