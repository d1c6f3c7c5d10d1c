"""Reads the settings of a LoRA file beside its tensors: PEFT keeps alpha, rsLoRA and the like in a configuration.

Its places: diffusers 0.35 and later write it as JSON into the safetensors metadata (`lora_adapter_metadata`, with the
component's name before each entry where a pipeline was saved); PEFT writes `adapter_config.json` beside the file;
finetrainers writes `lora_config`. Other trainers only state alpha and rank as text (`ss_network_alpha` and
`ss_network_dim` of kohya's sd-scripts, `lora_alpha` and `r`): these count where the rank is the one of the factors. An
alpha without a rank counts where its name says that it is a LoRA's and all factors have one rank (`stated_alpha`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cached_property import cached_property
from ..errors import LoraFileError, LoraMismatchError, Message
from ..files import shown
from ..units import MB
from .base import LARGEST_NUMBER
from .known_settings import not_understood, refusal_of
from .name_patterns import Expression, Patterns

_COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
_DENOISERS = ("unet", "transformer")
_SAVED_UNDER = ("model.diffusion_model.", "diffusion_model.", *(f"{component}." for component in _COMPONENTS))
"""Prefixes that a file has and the model did not have when PEFT was given it."""
_PEFT = "base_model.model."
_FLAT = ("lora_", "lycoris_")
_ALPHAS, _RANKS = ("lora_alpha", "alpha", "network_alpha"), ("r", "rank", "lora_rank", "network_dim")
_OF_KOHYA = "ss_network_alpha", "ss_network_dim"
_ONETRAINER = "ot_revision"
"""OneTrainer writes its own version into every header (`DtypeModelSaverMixin`)."""
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class PeftSettings:
    """The entries of one PEFT configuration that change what the tensors mean.

    Attributes:
        entries: as in the JSON.
        component: the name that stood before each entry; "" for none.
        stated: alpha by rank, from text that is no configuration of PEFT.
        alone: such text for an alpha without a rank, as its name and its value.
        of_onetrainer: the header says that OneTrainer saved the file.
    """

    entries: Mapping[str, Any] = field(default_factory=dict)
    component: str = ""
    stated: Mapping[int, float] = field(default_factory=dict)
    alone: tuple[str, str] | None = None
    of_onetrainer: bool = False

    def with_rank(self, rank: int) -> PeftSettings:
        """The settings of factors that all have one rank: an alpha that stands alone is for it.

        They are the same where the name or the value leaves open if it is this scale: a bare `alpha` may be a strength.
        """
        entry, text = self.alone or ("", "")
        stated: dict[int, float] = {}
        if not entry.endswith(("lora_alpha", "network_alpha")) or not _put(stated, rank, text):
            return self
        return replace(self, stated=stated, alone=None)

    def alpha_for(self, module: str, rank: int) -> float | None:
        """The alpha that gives `alpha / rank` the scale of the configuration; None if it states none.

        Args:
            module: its name as written in the file.
            rank: the rank that the module's factors show.

        Raises:
            LoraMismatchError: the alpha is too large, or no finite number.
            LoraFileError: an entry for some modules is not understood.
        """
        alpha = self._of_pattern("alpha_pattern", module)
        if alpha is None:
            alpha = self.entries.get("lora_alpha", self.entries.get("alpha"))
        if not _is_number(alpha):
            return self.stated.get(rank)
        if not abs(alpha) < LARGEST_NUMBER:
            raise LoraMismatchError.of("lora.no_usable_alpha")
        # rsLoRA (arXiv 2312.03732) divides by the root of the rank.
        return alpha * math.sqrt(rank) if self.entries.get("use_rslora") is True else float(alpha)

    def rank_for(self, module: str) -> int | None:
        """The rank in the configuration, for kinds whose tensors do not show it; None if it states none.

        Raises:
            LoraFileError: an entry for some modules is not understood.
        """
        rank = self._of_pattern("rank_pattern", module)
        rank = self.entries.get("r") if rank is None else rank
        return rank if isinstance(rank, int) and 0 < rank < 1_000_000 else None

    def is_feedforward(self, module: str) -> bool | None:
        """True if an IA3 scales this module's input; None if the configuration does not say.

        Raises:
            LoraFileError: its expression is not understood.
        """
        names = self.entries.get("feedforward_modules")
        if isinstance(names, str):
            return self._feedforward.fits(self._name_for_peft(module))
        if isinstance(names, list):
            name = self._name_for_peft(module)
            return any(name.endswith(end) for end in names if isinstance(end, str))
        return None

    def saves_whole(self, module: str) -> bool:
        """True if the configuration says that the file has this module's parameters whole."""
        names = self.entries.get("modules_to_save")
        if not isinstance(names, list):
            return False
        # PEFT takes every module whose name ends so.
        name = self._name_for_peft(module)
        return any(name.endswith(end) for end in names if isinstance(end, str) and end)

    @property
    def saves_biases(self) -> bool:
        """True if the biases in the file are whole ones."""
        return self.entries.get("bias") in ("all", "lora_only")

    @property
    def cayley_terms(self) -> int | None:
        """Terms of OFT's Neumann series; None for the exact Cayley transform."""
        if self.entries.get("use_cayley_neumann") is False:
            return None
        terms = self.entries.get("num_cayley_neumann_terms", 5)
        return terms if isinstance(terms, int) and 0 < terms < 100 else 5

    @property
    def oft_bound(self) -> float | None:
        """peft's `eps` of a constrained OFT (`coft`); None for an OFT without a bound.

        Raises:
            LoraMismatchError: the bound is no usable number.
        """
        if not self.entries.get("coft"):
            return None
        eps = self.entries.get("eps", 6e-5)
        if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0.0 <= eps < LARGEST_NUMBER:
            raise LoraMismatchError.of("lora.no_usable_eps")
        return float(eps)

    @property
    def shares_blocks(self) -> bool | None:
        """True if one block of an OFT is for the whole input; None if the configuration does not say."""
        shares = self.entries.get("block_share")
        return shares if isinstance(shares, bool) else None

    def _of_pattern(self, entry: str, module: str) -> Any:
        """The number that `alpha_pattern` or `rank_pattern` has for a module, by PEFT's rule; None if it has none."""
        if not self.entries.get(entry):
            return None
        patterns = self._alphas if entry == "alpha_pattern" else self._ranks
        value = None if patterns is None else patterns.first(self._name_for_peft(module))
        if value is not None and not _is_number(value):
            raise LoraFileError.of("lora.pattern_value", module=shown(module), entry=entry, value=shown(str(value)))
        return value

    @cached_property
    def _alphas(self) -> Patterns | None:
        return _patterns(self.entries.get("alpha_pattern"))

    @cached_property
    def _ranks(self) -> Patterns | None:
        return _patterns(self.entries.get("rank_pattern"))

    @cached_property
    def _feedforward(self) -> Expression:
        return Expression(self.entries["feedforward_modules"])

    def _name_for_peft(self, module: str) -> str:
        """The module's name in the model that PEFT was given: patterns begin there.

        Raises:
            LoraFileError: the file's names have no dots, and patterns are made of them.
        """
        if module.startswith(_FLAT) and "." not in module:
            raise LoraFileError.of("lora.pattern_flat", module=shown(module))
        if self.component:
            module = module.removeprefix(f"{self.component}.")
        elif prefix := next((prefix for prefix in _SAVED_UNDER if module.startswith(prefix)), ""):
            module = module[len(prefix) :]
        return module.removeprefix(_PEFT)


def _patterns(entries: Any) -> Patterns | None:
    return Patterns(entries) if isinstance(entries, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class FileSettings:
    """The configurations of one file, by component."""

    def __init__(self, by_component: Mapping[str, PeftSettings], notes: tuple[Message, ...] = ()) -> None:
        """Keeps the configurations; that of the empty name is for all other modules.

        Args:
            by_component: the configurations.
            notes: sentences for users about what was not understood.
        """
        self._by_component = by_component
        self.notes = notes

    def of(self, module: str) -> PeftSettings:
        """The configuration for a module, by the first part of its name; empty if there is none."""
        component = module.partition(".")[0]
        return self._by_component.get(component) or self._by_component.get("") or _NOTHING

    @property
    def has_stated(self) -> bool:
        """True if a scale stands in text that is no configuration of PEFT."""
        return any(settings.stated or settings.alone for settings in self._by_component.values())

    def alone(self) -> list[PeftSettings]:
        """Those with an alpha that stands without a rank."""
        return [settings for settings in self._by_component.values() if settings.alone]

    def with_ranks(self, ranks: Callable[[PeftSettings], Collection[int]]) -> FileSettings:
        """The settings with every alpha that stands alone and is for factors of one rank; itself if there is none.

        Args:
            ranks: returns the ranks of the factors that a component's settings are for.
        """
        found = dict(self._by_component)
        for component, settings in found.items():
            if settings.alone and len(own := ranks(settings)) == 1:
                found[component] = settings.with_rank(*own)
        return self if found == self._by_component else FileSettings(found, self.notes)

    def without_stated(self) -> FileSettings:
        """The settings of a file whose tensors say the scale themselves: text beside them does not count."""
        if not self.has_stated:
            return self
        silent = {part: replace(settings, stated={}, alone=None) for part, settings in self._by_component.items()}
        return FileSettings(silent, self.notes)

    def refusal(self) -> Message | None:
        """Why the file cannot be applied, if its settings say so; None if they do not."""
        found = (refusal_of(settings.entries) for settings in self._by_component.values())
        return next((why for why in found if why is not None), None)


_NOTHING = PeftSettings()


def settings_of(path: Path, metadata: Mapping[str, str]) -> FileSettings:
    """Finds the settings of a file. Text that is not valid JSON is left out with a warning: the tensors may do without.

    Args:
        path: the file; PEFT's configuration lies beside it.
        metadata: the text entries of its header.
    """
    text = metadata.get("lora_adapter_metadata") or _beside(path) or metadata.get("lora_config")
    if not text or isinstance(text, Message):
        return FileSettings(_stated(metadata), (text,) if isinstance(text, Message) else ())
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        return FileSettings(_stated(metadata), (Message("lora.settings_unreadable"),))
    parts: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        component, dot, rest = key.partition(".")
        known = bool(dot) and component in _COMPONENTS
        parts.setdefault(component if known else "", {})[rest if known else key] = value
    settings = {component: PeftSettings(part, component) for component, part in parts.items()}
    denoisers = [settings[component] for component in _DENOISERS if component in settings]
    if "" not in settings and len(denoisers) == 1:
        # A converted file may have the denoiser under another prefix; text encoders keep their own.
        settings["diffusion_model"] = settings["model"] = replace(denoisers[0], component="")
    unknown = [name for part in parts.values() for name in not_understood(part)]
    return FileSettings(settings, tuple(_said(unknown)))


def _beside(path: Path) -> str | Message | None:
    """PEFT's configuration in the folder of its file; a sentence if it cannot be read, None if there is none."""
    if not path.name.startswith("adapter_model"):
        return None
    config = path.with_name("adapter_config.json")
    try:
        if not config.is_file():
            return None
        found = config.stat().st_size
        if found > _MAX_CONFIG_BYTES:
            return Message("lora.config_too_long", {"found_mb": found / MB, "most_mb": _MAX_CONFIG_BYTES / MB})
        return config.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Message("lora.settings_unreadable")


def _said(unknown: list[str]) -> Iterator[Message]:
    if unknown:
        first = ", ".join(shown(name) for name in unknown[:3])
        yield Message("lora.settings_unknown", {"count": len(unknown), "first": first})


def _stated(metadata: Mapping[str, str]) -> dict[str, PeftSettings]:
    """The settings that trainers write as text, by component: an alpha for a rank, or alone."""
    stated: dict[str, PeftSettings] = {}
    for component in ("", *_COMPONENTS):
        dot = f"{component}." if component else ""
        names = [([f"{dot}{key}" for key in _ALPHAS], [f"{dot}{key}" for key in _RANKS])]
        names += [] if component else [([_OF_KOHYA[0]], [_OF_KOHYA[1]])]
        by_rank: dict[int, float] = {}
        alone: tuple[str, str] | None = None
        for alphas, ranks in names:
            entry = next((name for name in alphas if name in metadata), None)
            rank = next((metadata[name] for name in ranks if name in metadata), None)
            if entry is not None and not _put(by_rank, rank, metadata[entry]):
                alone = alone or (entry, metadata[entry])
        if not component:
            _put(by_rank, *_of_convolutions(metadata))
        if by_rank or alone:
            stated[component] = PeftSettings({}, component, by_rank, None if by_rank else alone)
    if _ONETRAINER in metadata:
        stated.setdefault("", _NOTHING)
        stated = {component: replace(settings, of_onetrainer=True) for component, settings in stated.items()}
    return stated


def _of_convolutions(metadata: Mapping[str, str]) -> tuple[Any, Any]:
    """Rank and alpha that kohya's trainers have for convolutions; None for what is not there."""
    try:
        more = json.loads(metadata.get("ss_network_args") or "{}")
    except (ValueError, RecursionError):
        more = None
    return (more.get("conv_dim"), more.get("conv_alpha")) if isinstance(more, dict) else (None, None)


def _put(by_rank: dict[int, float], rank: Any, alpha: Any) -> bool:
    """Puts an alpha to its rank; False if one of them is no usable number."""
    try:
        number, value = int(rank), float(alpha)
    except (TypeError, ValueError, OverflowError):
        return False
    # kohya's sd-scripts take an alpha of 0 for the rank.
    value = value or float(number)
    if number <= 0 or not abs(value) < LARGEST_NUMBER:
        return False
    # Two alphas for one rank: the file does not say which modules have which.
    by_rank[number] = value if by_rank.get(number, value) == value else math.nan
    return True
