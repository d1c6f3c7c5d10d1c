"""Encodes a prompt again only where something that the text encoder sees has changed.

Forge keeps the conditioning of the last prompt, and its key holds every LoRA of the prompt: another strength of a LoRA
without text-encoder keys brings the text encoder onto the GPU, encodes the same prompt to the same numbers, and sends it
away again. Here the key holds what lies on the text encoder instead, and more than one prompt is remembered. A prompt
that differs from one of them in blanks alone, as where a `<lora:...>` was taken out, is that one if the tokenizers say so.
A prompt that is the same in all steps is encoded alike for any number of them. `LORA_GUARD_BLANKS=0` in the environment takes
both away, for bug reports.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ...adapters.base import Adapter
from ...adapters.patch_tuples import AdapterTuple
from ...runtime.hooks import Row
from ...runtime.host import LoraPatchers
from ...runtime.prompt_cache import Conds as Encoded
from ...runtime.prompt_cache import Model, PromptCache, Spelling, without_blanks
from .cond_caches import SharedCaches
from .patchers import TuplePatchers
from .prompt_tokens import Code, Encoding, PromptTokens
from .types import CondCache, FromPicture, Patched, PromptProcessing, Tags, TextEncoder

log = logging.getLogger(__name__)

Conds = TypeVar("Conds")
"""Encoded prompts, as the WebUI's samplers take them."""
Key: TypeAlias = tuple[Any, ...]
"""A part of the key under which a conditioning is kept: compared, never looked into."""
_Steps: TypeAlias = tuple[int, int | None]
"""The steps of an image, and those of its hires pass where it is for that one."""
ANY_STEPS: _Steps = (0, None)
"""In the key of what counts in all steps, however many there are."""

_OWN_PACKAGE = __name__.partition(".")[0]
_AESTHETIC_SCORES = ("sdxl_refiner_low_aesthetic_score", "sdxl_refiner_high_aesthetic_score")
"""Forge's options that go into the conditioning of SDXL's refiner."""
_NETWORK_NAMES = ("lora", "lyco")
_OWN_ARGUMENTS = ("te", "unet", "dyn")


class _Asked(NamedTuple):
    """The arguments of `get_conds_with_caching`."""

    function: Code
    prompts: Sequence[str]
    steps: int
    caches: Sequence[CondCache]
    tags: Tags
    hires_steps: int | None


class Conditioning:
    """The two hooks on Forge's `StableDiffusionProcessing`."""

    def __init__(
        self,
        shared: ModuleType,
        caches: SharedCaches,
        meaning: Callable[[], Hashable],
        has_applied: Callable[[Patched], bool] = lambda patcher: True,
        encoding: Callable[[], AbstractContextManager[None]] = nullcontext,
        cache: PromptCache | None = None,
        patchers: LoraPatchers | None = None,
        tokens: PromptTokens | None = None,
        is_left_to_host: Callable[[], bool] = lambda: False,
        loaded: Callable[[], Hashable] = lambda: None,
    ) -> None:
        """
        Args:
            shared: the WebUI's `modules.shared`.
            caches: the WebUI's own, of one conditioning each.
            meaning: returns what else decides how LoRAs act on the text encoder (the guard's mode).
            has_applied: says of a patcher whether its LoRAs lie on the model.
            encoding: is entered while a prompt is encoded.
            cache: of encoded prompts.
            patchers: tells what lies on the text encoder; None for those of Forge.
            tokens: compares two ways to write a prompt; None: another text is another prompt.
            is_left_to_host: True where the host's encoding of the next prompt does more than encode it.
            loaded: returns which files the present model was made of.
        """
        self._is_more_than_encoding, self._loaded = is_left_to_host, loaded
        self._tokens = None if os.environ.get("LORA_GUARD_BLANKS") == "0" else tokens
        self._patchers = patchers or TuplePatchers()
        self._shared, self._caches, self._meaning, self._has_applied = shared, caches, meaning, has_applied
        self._encoding, self._cache = encoding, cache or PromptCache()
        self._numbers = _Numbers()

    def cached_params(
        self,
        original: Callable[..., Key],
        processing: PromptProcessing,
        required_prompts: Sequence[str],
        steps: int,
        extra_network_data: Tags,
        hires_steps: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Key:
        """Stands in place of `cached_params`: the host's key, with what lies on the text encoder instead of the prompt's LoRAs."""
        if self._is_left_to_host():
            return original(processing, required_prompts, steps, extra_network_data, hires_steps, *args, **kwargs)
        try:
            on_text_encoder = self._on_text_encoder()
            data: Key | Tags = (
                self._others(extra_network_data),
                on_text_encoder,
                # A text encoder without LoRAs does the same in every mode.
                self._meaning() if any(on_keys for _, on_keys in on_text_encoder) else None,
                # What SDXL's conditioning holds beside the text, and the host's key does not.
                [getattr(required_prompts, name, None) for name in ("width", "height")],
                [getattr(self._shared.opts, name, None) for name in _AESTHETIC_SCORES],
                self._foreign_hooks(),
                # A hires pass may have a checkpoint or text encoders of its own, which the host's key does not tell.
                None if hires_steps is None else self._loaded(),
            )
        except Exception:
            log.debug("the host's own key for the conditioning is used", exc_info=True)
            data = extra_network_data
        return original(_from_no_picture(processing), required_prompts, steps, data, hires_steps, *args, **kwargs)

    def get_conds_with_caching(
        self,
        original: Callable[..., Conds],
        processing: PromptProcessing,
        function: Callable[..., Conds],
        required_prompts: Sequence[str],
        steps: int,
        caches: Sequence[CondCache],
        extra_network_data: Tags,
        hires_steps: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Conds:
        """Stands in place of `get_conds_with_caching`, which finds in its cache what the guard remembers."""
        asked = _Asked(function, required_prompts, steps, caches, extra_network_data, hires_steps)
        if self._caches.look():
            # The prompt is to be encoded anew, or the host's option says that nothing is kept.
            self._cache.forget()
        host = functools.partial(original, processing, *asked, *args, **kwargs)
        try:
            if self._is_left_to_host():
                return host()
            if not self._caches.are_shared(caches):
                return self._encoded(host, asked)
            return self._remembered(host, processing, asked)
        finally:
            self._caches.look()

    def _remembered(self, host: Callable[[], Conds], processing: PromptProcessing, asked: _Asked) -> Conds:
        """Returns a conditioning out of the host's caches, out of the memory, or a new one, which is kept."""
        memory, prompts, caches = self._cache.of(self._checkpoint()), asked.prompts, asked.caches
        steps, loaded = (asked.steps, asked.hires_steps), self._loaded()
        # Forge Neo has no old scheduling any more.
        knows_old = "use_old_scheduling" in inspect.signature(processing.cached_params).parameters
        old_scheduling = (self._shared.opts.use_old_scheduling,) if knows_old else ()
        how = Encoding(asked.function, asked.steps, asked.hires_steps, old_scheduling)

        def params_of(texts: Sequence[str], steps: _Steps) -> Key:
            return processing.cached_params(texts, steps[0], asked.tags, steps[1], *old_scheduling)

        def key_of(params: Key) -> Key:
            return _name_of(asked.function), getattr(prompts, "is_negative_prompt", None), loaded, params

        def spelling_of(steps: _Steps) -> Spelling | None:
            blankless = None if self._tokens is None else _blankless(prompts)
            return None if blankless is None else Spelling(key_of(params_of(blankless, steps)), list(prompts))

        params = params_of(prompts, steps)
        if any(cache[0] is not None and cache[0] == params for cache in caches):
            return host()
        may_be_of_all_steps = self._tokens is not None and _has_no_schedule(prompts)
        for counts in (ANY_STEPS, steps) if may_be_of_all_steps else (steps,):
            known = memory.find(key_of(params_of(prompts, counts)))
            if known is None and (tokens := self._tokens) and (spelling := spelling_of(counts)):
                known = memory.find_respelled(spelling, functools.partial(_are_same, tokens, prompts, how))
            if known is not None:
                conds = known[0]
                if counts is ANY_STEPS:
                    _end_at(conds, steps[0] if steps[1] is None or any(old_scheduling) else steps[1])
                caches[0][:2] = [params, conds]
                if len(caches[0]) > 2:
                    caches[0][2] = known[1] or {}
                return host()
        conds = self._encoded(host, asked)
        made = caches[0]
        if made[0] is not None and getattr(self._shared.opts, "persistent_cond_cache", True):
            # What lies on the text encoder may have become another while it was encoded.
            is_of_all_steps = may_be_of_all_steps and made[0] == params and _is_of_all_steps(conds)
            key = params_of(prompts, ANY_STEPS) if is_of_all_steps else made[0]
            spelling = spelling_of(ANY_STEPS if is_of_all_steps else steps)
            memory.keep(key_of(key), conds, made[2] if len(made) > 2 else None, spelling)
        return conds

    def _encoded(self, host: Callable[[], Conds], asked: _Asked) -> Conds:
        with self._encoding():
            conds = host()
        if not self._is_encoded_as_asked():
            # The next image tries again, and must not find this one's.
            asked.caches[0][0] = None
        return conds

    def _checkpoint(self) -> Model:
        """Returns the host's entry for the present checkpoint: a refiner takes the model away, and the next image reads it again."""
        model: Model = self._shared.sd_model
        entry: Model | None = getattr(model, "sd_checkpoint_info", None)
        return model if entry is None else entry

    def _text_encoder(self) -> TextEncoder | None:
        found: TextEncoder | None = getattr(self._shared.sd_model.forge_objects, "clip", None)
        return found

    def _on_text_encoder(self) -> list[tuple[str, Key]]:
        """Lists every patch on the text encoder as it is now: which tensors, how strong.

        Raises:
            AttributeError: there is no text encoder.
        """
        encoder: TextEncoder = self._shared.sd_model.forge_objects.clip
        return [
            (name, tuple((key, [self._entry(entry) for entry in entries]) for key, entries in on_keys.items()))
            for name, on_keys in self._patchers.entries(encoder.patcher)
        ]

    def _is_left_to_host(self) -> bool:
        return not self._caches.is_used or self._is_more_than_encoding() or self._is_extension_at_work()

    def _is_extension_at_work(self) -> bool:
        """True if another extension has replaced the forward pass of a layer in the text encoder.

        regional-prompter works there, by settings that no key of the guard knows. Then all is as in the host.
        """
        return any("forward" in vars(module) for module in self._encoder_modules())

    def _foreign_hooks(self) -> list[int]:
        """Lists the hooks of other extensions in the text encoder: one more or one less encodes the prompt anew."""
        return [
            id(hook)
            for module in self._encoder_modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if type(getattr(hook, "__self__", hook)).__module__.partition(".")[0] != _OWN_PACKAGE
        ]

    def _encoder_modules(self) -> Iterator[torch.nn.Module]:
        model = getattr(self._text_encoder(), "cond_stage_model", None)
        return iter(()) if model is None else model.modules()

    def _is_encoded_as_asked(self) -> bool:
        """False if the LoRAs could not be put on the text encoder just now."""
        patcher = getattr(self._text_encoder(), "patcher", None)
        return patcher is None or self._has_applied(patcher)

    def _entry(self, entry: Sequence[Any]) -> Key:
        strength, value, strength_model, offset = entry[:4]
        return strength, strength_model, offset, self._numbers.of(value)

    @staticmethod
    def _others(extra_network_data: Tags) -> list[Key]:
        """Lists what the prompt says beside names and strengths of LoRAs: other networks, arguments of other extensions."""
        others: list[Key] = []
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


def _from_no_picture(processing: PromptProcessing) -> PromptProcessing:
    """Returns a request whose key does not tell which picture an image begins with.

    Forge Neo's does, and a VAE encodes the picture with noise: it is another one each time. The text encoders that see a
    picture are left to the host.
    """
    if not isinstance(processing, FromPicture) or processing.init_latent is None:
        return processing
    other = copy.copy(processing)
    other.init_latent = torch.zeros(1)
    return other


def _are_same(tokens: PromptTokens, prompts: Sequence[str], how: Encoding, texts: Sequence[str]) -> bool:
    return tokens.are_same(texts, prompts, how)


def _has_no_schedule(prompts: Sequence[str]) -> bool:
    """True if no prompt has a bracket, without which the WebUI's own schedules (`[from:to:when]`, `[a|b]`) are not written."""
    return isinstance(prompts, list) and all(isinstance(text, str) and "[" not in text for text in prompts)


def _schedules(conds: Encoded) -> Iterator[list[Encoded]]:
    """Yields the conditionings of each part of each prompt: what is encoded, and the step until which it counts."""
    of_all: Encoded = conds if isinstance(conds, list) else conds.batch
    for of_prompt in of_all:
        parts: list[list[Encoded]] = [part.schedules for part in of_prompt if hasattr(part, "schedules")]
        yield from parts or [of_prompt]


def _is_of_all_steps(conds: Encoded) -> bool:
    """True if every prompt has one conditioning: extensions may read schedules out of other signs than brackets."""
    try:
        return all(len(schedule) == 1 and hasattr(schedule[0], "end_at_step") for schedule in _schedules(conds))
    except (TypeError, AttributeError):
        return False


def _end_at(conds: Encoded, step: int) -> None:
    """Lets conditionings that count in all steps end with the last one of `step`."""
    for schedule in _schedules(conds):
        schedule[0] = schedule[0]._replace(end_at_step=step)


def _blankless(prompts: Sequence[str]) -> Sequence[str] | None:
    """Returns the prompts without blanks, with the sizes and so on that the WebUI's own list of prompts carries.

    None if another extension hands over something else than such a list.
    """
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        return None
    other = copy.copy(prompts)
    other[:] = without_blanks(prompts)
    return other


def _name_of(function: Callable[..., Conds]) -> str:
    """Another extension may hand over something callable that has no name."""
    return getattr(function, "__name__", None) or repr(function)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True


class _Numbers:
    """Numbers tensors. A number is never given twice, as an address would be: keys outlive tensors."""

    def __init__(self) -> None:
        self._numbers: MutableMapping[torch.Tensor, int] = WeakIdKeyDictionary()
        self._next = 0

    def of(self, value: Any) -> Key | int | str:
        if isinstance(value, torch.Tensor):
            if value not in self._numbers:
                self._numbers[value] = self._next = self._next + 1
            return self._numbers[value]
        if isinstance(value, AdapterTuple):
            # What lies in it may still be read from the file.
            return self.of(value.adapter)
        if isinstance(value, Adapter):
            return type(value).__name__, *(self.of(tensor) for tensor in value.tensors())
        if isinstance(value, (list, tuple)):
            return tuple(self.of(part) for part in value)
        return str(value)


_OWNER = "StableDiffusionProcessing"
ROWS: tuple[Row[Conditioning], ...] = (
    Row("modules.processing", f"{_OWNER}.cached_params", lambda c: (c.cached_params,)),
    Row("modules.processing", f"{_OWNER}.get_conds_with_caching", lambda c: (c.get_conds_with_caching,)),
)
