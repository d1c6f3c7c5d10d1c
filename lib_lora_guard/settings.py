"""The user's settings as data. `ui/` shows them, `hosts/` reads them from the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

PREFIX = "lora_guard_"
"""Prefix of every option in the host's config file."""
MODE_OPTION = PREFIX + "mode"
MODE_FIELD = "LoRA Guard mode"
"""The mode in an image's infotext, where it is another than that of a new user."""
AS_SET = ""
"""In place of a mode for one image: that of the settings page."""


class LoraMode(str, Enum):
    """How LoRAs are applied. The value is stored in the host's config file and shown on the settings page."""

    AUTOMATIC = "Automatic"
    FP16 = "fp16 LoRA"
    MERGE = "Merge"
    OWN = "Forge's own"


class Language(str, Enum):
    """The language of texts for users."""

    AUTO = "auto"
    ENGLISH = "en"
    CHINESE = "zh"


LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Settings:
    """One consistent set of settings, with the defaults for a new user. 0 for an allocator number leaves it to torch, None for
    `kept_files_mb` takes a share of this machine's RAM."""

    enable: bool = True
    mode: LoraMode = LoraMode.AUTOMATIC
    kept_files_mb: int | None = None
    log_level: str = "info"
    language: Language = Language.AUTO
    expandable_segments: bool = False
    max_split_size_mb: int = 0
    garbage_collection_threshold: float = 0.0
    plan_residency: bool = True
    pin_swapped: bool = True
    fast_kernels: bool = True
    fast_host_cast: bool = False
    file_backups: bool = True
    merge_from_file: bool = False
    lora_cards: bool = True


def read(options: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Reads the settings from the host's options. Config files are edited by hand and by other versions of this
    program.

    Args:
        options: The host's options; those without PREFIX are ignored.

    Returns:
        The settings, and the names of options with an invalid value, for which the default is used.
    """
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
    """Converts `value` to the setting's type.

    Raises:
        TypeError: It has the wrong type.
        ValueError: It is out of range or unknown.
    """
    if isinstance(getattr(Settings, name), bool):
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
