"""Reads the settings of a LoRA file beside its tensors: PEFT keeps alpha, rsLoRA and the like in a configuration.

Its places: diffusers 0.35 and later write it as JSON into the safetensors metadata (`lora_adapter_metadata`, with the
component's name before each entry where a pipeline was saved); PEFT writes `adapter_config.json` beside the file.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoraMismatchError
from ..files import shown
from ..messages import say
from .base import LARGEST_NUMBER

log = logging.getLogger(__name__)

_COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class PeftSettings:
    """The entries of one PEFT configuration that change what the tensors mean."""

    entries: Mapping[str, Any] = field(default_factory=dict)

    def alpha_for(self, module: str, rank: int) -> float | None:
        """The alpha that gives `alpha / rank` the scale of the configuration; None if it states none.

        Args:
            module: its name as written in the file.
            rank: the rank that the module's factors show.

        Raises:
            LoraMismatchError: the alpha is too large, or no finite number.
        """
        alpha = _match(self.entries.get("alpha_pattern"), module)
        if alpha is None:
            alpha = self.entries.get("lora_alpha", self.entries.get("alpha"))
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            return None
        if not abs(alpha) < LARGEST_NUMBER:
            raise LoraMismatchError.of("lora.no_usable_alpha")
        # rsLoRA (arXiv 2312.03732) divides by the root of the rank.
        return alpha * math.sqrt(rank) if self.entries.get("use_rslora") is True else float(alpha)

    def rank_for(self, module: str) -> int | None:
        """The rank in the configuration, for kinds whose tensors do not show it; None if it states none."""
        rank = _match(self.entries.get("rank_pattern"), module)
        rank = self.entries.get("r") if rank is None else rank
        return rank if isinstance(rank, int) and 0 < rank < 1_000_000 else None

    def is_feedforward(self, module: str) -> bool | None:
        """True if an IA3 scales this module's input; None if the configuration does not say."""
        names = self.entries.get("feedforward_modules")
        if isinstance(names, str):
            return _matches(names, module)
        if isinstance(names, list):
            ends = {module[start:] for start in (0, *(n + 1 for n, c in enumerate(module) if c == "."))}
            return any(name in ends for name in names if isinstance(name, str))
        return None

    @property
    def cayley_terms(self) -> int | None:
        """Terms of OFT's Neumann series; None for the exact Cayley transform."""
        if self.entries.get("use_cayley_neumann") is False:
            return None
        terms = self.entries.get("num_cayley_neumann_terms", 5)
        return terms if isinstance(terms, int) and 0 < terms < 100 else 5


class FileSettings:
    """The configurations of one file, by component."""

    def __init__(self, by_component: Mapping[str, PeftSettings]) -> None:
        """Keeps the configurations; that of the empty name is for all other modules."""
        self._by_component = by_component

    def of(self, module: str) -> PeftSettings:
        """The configuration for a module, by the first part of its name; empty if there is none."""
        component = module.partition(".")[0]
        return self._by_component.get(component) or self._by_component.get("") or PeftSettings()


def settings_of(path: Path, metadata: Mapping[str, str]) -> FileSettings:
    """Finds the settings of a file. Text that is not valid JSON is left out with a warning: the tensors may do without.

    Args:
        path: the file; PEFT's configuration lies beside it.
        metadata: the text entries of its header.
    """
    text = metadata.get("lora_adapter_metadata")
    if text is None and path.name.startswith("adapter_model"):
        beside = path.with_name("adapter_config.json")
        if beside.is_file() and beside.stat().st_size <= _MAX_CONFIG_BYTES:
            text = beside.read_text(encoding="utf-8", errors="replace")
    if not text:
        return FileSettings({})
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        say(log, logging.WARNING, "lora.settings_unreadable", name=shown(path.name))
        return FileSettings({})
    parts: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        component, dot, rest = key.partition(".")
        known = bool(dot) and component in _COMPONENTS
        parts.setdefault(component if known else "", {})[rest if known else key] = value
    return FileSettings({component: PeftSettings(part) for component, part in parts.items()})


def _match(pattern: Any, module: str) -> int | float | None:
    """The number for a module by PEFT's rule: a key is the end of the module's path, or a regular expression for it."""
    if not isinstance(pattern, dict):
        return None
    for start in (0, *(n + 1 for n, c in enumerate(module) if c == ".")):
        for key in (module[start:], f"^{module[start:]}", f"{module[start:]}$", f"^{module[start:]}$"):
            if isinstance(value := pattern.get(key), (int, float)):
                return value
    wild = [key for key in pattern if isinstance(key, str) and ".*" in key]
    if len(wild) > MOST_EXPRESSIONS:
        return None
    values = ((pattern[key], key) for key in wild)
    return next((v for v, key in values if isinstance(v, (int, float)) and _matches(f".*{key}", module)), None)


MOST_EXPRESSIONS, LONGEST_EXPRESSION = 64, 200
"""A file must not choose expressions that run for minutes; PEFT's own patterns are names."""


def _matches(expression: str, module: str) -> bool:
    # Only `.*`, `^`, `$` and escaped dots are understood.
    plain = expression.replace("^", "").removesuffix("$").replace(".*", "*").replace("\\.", ".")
    if len(plain) > LONGEST_EXPRESSION or set(plain) & set("\\[](){}|+?$"):
        return False
    return fnmatch.fnmatchcase(module, plain)
