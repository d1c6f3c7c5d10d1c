"""Strengths that change over the steps of an image, in Forge: `<lora:name:0@0,1@1:hr=0.5>`.

Forge's own LoRA extension reads numbers alone. It gets the strengths of the first step, and patchers and prompts are made
with these; while the model samples, the strengths of the running one are set before each step, and set back after it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...adapters.base import LARGEST_NUMBER
from ...errors import HostError
from ...messages import Joined, Message, reason, say
from ...planning.schedule import HIRES_NAMES, NAMES, Schedule, ScheduleError, Strengths, check_rank, read_strengths
from ...reporting.report import clean_text
from ...runtime.hooks import HookSet, Row, lay
from ...runtime.host import StepStrengths
from ...runtime.image_words import ImageWords
from .types import comments_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScheduleHost:
    """The parts of Forge this stands on."""

    lora_network: Any
    """Forge's `extra_networks_lora` module: what a `<lora:...>` tag does."""
    extra_networks: Any
    samplers: Any
    callbacks: Any


def probe() -> ScheduleHost:
    """Raises HostError where one of the parts is missing."""
    names = ("extra_networks_lora", "modules.extra_networks", "modules.sd_samplers_common", "modules.script_callbacks")
    for name in names:
        if name not in sys.modules:
            raise HostError(f"{name} is not loaded, so strengths cannot change over the steps")
    host = ScheduleHost(*(sys.modules[name] for name in names))
    wanted = [
        (host.lora_network, "ExtraNetworkLora"),
        (getattr(host.lora_network, "networks", None), "loaded_networks"),
        (host.extra_networks, "extra_network_aliases"),
        (getattr(host.samplers, "Sampler", None), "launch_sampling"),
        (host.callbacks, "on_cfg_denoiser"),
        (host.callbacks, "on_app_started"),
    ]
    for owner, name in wanted:
        if not hasattr(owner, name):
            raise HostError(f"{getattr(owner, '__name__', owner)}.{name} is missing")
    return host


@dataclass(frozen=True)
class Followed:
    """A LoRA of the present pass whose strength on the U-Net changes."""

    name: str
    schedule: Schedule


class Schedules:
    """The schedules of the pass that is being made."""

    def __init__(self, strengths: StepStrengths[Any], words: ImageWords | None = None) -> None:
        """
        Args:
            strengths: Changes them between two steps.
            words: Says which tags are not understood.
        """
        self.strengths, self._words = strengths, words or ImageWords()
        self.left_out: dict[str, str] = {}
        """LoRAs of the present pass whose tag is not understood, with the reason."""
        self._network_class: type | None = None
        self._networks: Any = None
        self._followed: dict[tuple[str, float], Followed] = {}
        self._is_said = False

    def register(self, host: ScheduleHost) -> None:
        """Registers the callbacks before each step and at the start of the WebUI."""
        self._network_class, self._networks = host.lora_network.ExtraNetworkLora, host.lora_network.networks
        host.callbacks.on_cfg_denoiser(self.before_step)
        host.callbacks.on_app_started(lambda *_: _add_alias(host.extra_networks))
        # Switched on in a WebUI that runs, the guard sees no start any more.
        _add_alias(host.extra_networks)

    def forget(self) -> None:
        """Restores the strengths when the guard goes."""
        self.strengths.restore()
        self._followed, self._network_class = {}, None

    def activate(self, original: Callable[..., Any], network: Any, p: Any, params_list: list[Any]) -> Any:
        """Stands in place of `ExtraNetworkLora.activate`, which is called for every batch, for the hires pass and for a
        refiner. A tag that is not understood is named, and the others are handed on."""
        with self._words.image(id(p), *comments_of(p)):
            return self._activate(original, network, p, params_list)

    def _activate(self, original: Callable[..., Any], network: Any, p: Any, params_list: list[Any]) -> Any:
        self._followed, self.left_out = {}, {}
        if type(network) is not self._network_class:
            # Another extension is the prompt's LoRA network (sd-webui-loractl) and has read the tags already.
            return original(network, p, params_list)
        hires = bool(getattr(p, "is_hr_pass", False)) or _is_for_hires(p, params_list)
        read: list[Any] = []
        followed: list[tuple[str, float, Schedule]] = []
        for params in params_list:
            try:
                strengths = _strengths(params)
            except ScheduleError as error:
                self._leave_out(params, error)
                continue
            if strengths is None:
                read.append(params)
                continue
            name = str(params.positional[0])
            text, model = (strengths.hires_text, strengths.hires_model) if hires else (strengths.text, strengths.model)
            read.append(_with_numbers(params, text.start, model.start))
            if not model.is_constant:
                followed.append((name, model.start, model))
        result = original(network, p, read)
        files = {net.mentioned_name: net.network_on_disk.filename for net in self._networks.loaded_networks}
        self._followed = {
            (files[name], start): Followed(clean_text(name), schedule)
            for name, start, schedule in followed
            if name in files
        }
        return result

    def _leave_out(self, params: Any, error: ScheduleError) -> None:
        """Names a tag that is not understood. Handed on it would make the host drop all LoRAs of the prompt."""
        tag = clean_text(f"<lora:{':'.join(map(str, params.items))}>")
        name = clean_text(str(params.positional[0])) if params.positional else tag
        why = clean_text(reason(error))
        self.left_out[name] = why
        self._words.tell(Message("schedules.left_out", {"name": name, "why": why, "tag": tag}))

    def launch_sampling(self, original: Callable[..., Any], sampler: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps the sampling of one pass: whatever ends it, the model has the strengths of its patcher again."""
        self._is_said = False
        try:
            return original(sampler, *args, **kwargs)
        finally:
            self.strengths.restore()

    def before_step(self, params: Any) -> None:
        """Forge's callback before each call of the U-Net; a sampler may make two in one step."""
        if not self._followed and not self.strengths.are_changed:
            return
        patcher = params.denoiser.inner_model.inner_model.forge_objects.unet
        step, steps = int(params.sampling_step), int(params.total_sampling_steps)
        strengths: dict[int, float] = {}
        for place, lora in enumerate(self.strengths.loras(patcher)):
            one = None if lora is None else self._followed.get(lora)
            if one is not None:
                strengths[place] = one.schedule.at(step, steps)
        if strengths and not self._is_said:
            self._is_said = True
            loras = Joined((f"{one.name} {one.schedule}" for one in self._followed.values()), "list.semicolon")
            say(log, logging.INFO, "schedules.follows", steps=steps, loras=loras)
        self.strengths.set(patcher, strengths)


def _strengths(params: Any) -> Strengths | None:
    """Returns the strengths of a tag; None where Forge itself understands all of it.

    Raises:
        ScheduleError: The tag has no name, or something else stands where a strength or the rank of a DyLoRA belongs.
    """
    if not params.positional:
        raise ScheduleError.of("schedules.no_name")
    check_rank(params.positional[1:], params.named)
    if _host_can_read(params):
        return None
    return read_strengths([str(item) for item in params.positional[1:3]], params.named)


def _host_can_read(params: Any) -> bool:
    """True where Forge itself understands all strengths of a tag."""
    if any(params.named.get(name) for name in HIRES_NAMES):
        return False
    try:
        numbers = [
            float(text)
            for text in (
                *params.positional[1:3],
                *(params.named[name] for name in ("te", "unet") if name in params.named),
            )
        ]
    except (TypeError, ValueError):
        return False
    # Forge takes "nan" for a number; the LoRA's file is not what is wrong then.
    return all(abs(number) < LARGEST_NUMBER for number in numbers)


def _with_numbers(params: Any, text: float, model: float) -> Any:
    """The same tag with one strength for the text encoder and one for the model, as Forge reads them."""
    others = [f"{name}={value}" for name, value in params.named.items() if name not in NAMES]
    return type(params)(items=[params.positional[0], repr(text), repr(model), *params.positional[3:], *others])


def _is_for_hires(p: Any, params_list: Iterable[Any]) -> bool:
    """Recognises the hires prompt's tags: Forge encodes that prompt before the first pass, with the tags it has read
    out of it."""
    of_hires = [params for tags in (getattr(p, "hr_extra_network_data", None) or {}).values() for params in tags]
    return any(params is other for params in params_list for other in of_hires)


def _add_alias(extra_networks: Any) -> None:
    """Adds `<loractl:...>`, sd-webui-loractl's other name for a LoRA tag."""
    lora = extra_networks.extra_network_registry.get("lora")
    if lora is not None and "loractl" not in extra_networks.extra_network_registry:
        extra_networks.extra_network_aliases.setdefault("loractl", lora)


def install(schedules: Schedules, hooks: HookSet, host: ScheduleHost) -> None:
    """Lays the hooks that are not there yet, and registers the callbacks.

    Called each time the WebUI runs the extension's scripts: the callbacks are gone then, the hooks are not.
    """
    modules = {"extra_networks_lora": host.lora_network, "modules.sd_samplers_common": host.samplers}
    lay(ROWS, schedules, modules, hooks)
    schedules.register(host)


ROWS: tuple[Row[Schedules], ...] = (
    Row("extra_networks_lora", "ExtraNetworkLora.activate", lambda schedules: (schedules.activate,)),
    Row("modules.sd_samplers_common", "Sampler.launch_sampling", lambda schedules: (schedules.launch_sampling,)),
)
