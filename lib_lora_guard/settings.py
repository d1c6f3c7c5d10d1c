"""What the user can set, as data. How it is shown is in `ui/`, where the host keeps it in `hosts/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

PREFIX = "lora_guard_"
"""Before the name of every option in the host's config file."""


class LoraMode(str, Enum):
    """How LoRAs reach the model. The value is what the host's config file and the settings page hold."""

    AUTOMATIC = "Automatic"
    FP16 = "fp16 LoRA"
    MERGE = "Merge"
    OWN = "Forge's own"


class Language(str, Enum):
    AUTO = "auto"
    ENGLISH = "en"
    CHINESE = "zh"


LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Settings:
    """One consistent set; the defaults are what a new user gets. 0 for an allocator number leaves it to torch."""

    enable: bool = True
    mode: LoraMode = LoraMode.AUTOMATIC
    kept_files_mb: int = 1024
    log_level: str = "info"
    language: Language = Language.AUTO
    expandable_segments: bool = False
    max_split_size_mb: int = 0
    garbage_collection_threshold: float = 0.0


def read(options: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The settings in the host's options (names with PREFIX; others are ignored), and the names of those whose value makes
    no sense: for these the default holds. A config file is edited by hand, and by other versions of this program."""
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for setting in fields(Settings):
        name = PREFIX + setting.name
        if options.get(name) is None:
            continue
        try:
            values[setting.name] = _valid(setting.name, options[name])
        except (TypeError, ValueError):
            wrong.append(name)
    return Settings(**values), wrong


def _valid(name: str, value: Any) -> Any:
    """`value` in the setting's type. Raises ValueError or TypeError where it is not one."""
    if name in ("enable", "expandable_segments"):
        if not isinstance(value, bool):
            raise TypeError(name)
        return value
    if name == "mode":
        return LoraMode(value)
    if name == "language":
        return Language(value)
    if name == "log_level":
        if value not in LOG_LEVELS:
            raise ValueError(name)
        return value
    number = float(value)
    if name == "garbage_collection_threshold":
        if not 0 <= number < 1:
            raise ValueError(name)
        return number
    if not 0 <= number <= 1 << 20 or number != int(number):
        raise ValueError(name)
    return int(number)
