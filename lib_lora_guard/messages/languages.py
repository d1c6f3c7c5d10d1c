"""Chooses the language of the catalogue for a reader."""

from __future__ import annotations

import locale
import os
import re
from collections.abc import Mapping

from .catalogue import CHINESE, ENGLISH, LANGUAGES

AUTO = "auto"

_TAG = re.compile(r"(?<![a-z])(zh|chs|cht|chi|zho|cn)(?![a-z])")
_NAMES = ("chinese", "中文", "汉语", "简体", "繁體", "繁体")
"""Translations of the host that are named in words."""
_NO_TRANSLATION = ("", "none")


def language_of(setting: str, localization: str | None = None, system: str | None = None) -> str:
    """Returns the catalogue's language for a reader; English for a reader of any language it lacks.

    Args:
        setting: "en" or "zh" decides; "auto" uses the other arguments.
        localization: The translation chosen in the host ("zh_CN", "zh-Hans (Stable)", "chinese-all-0313"), if any.
        system: The locale (see `system_locale`), used without a localization.
    """
    if setting in LANGUAGES:
        return setting
    # A translated host says more about its reader than the system's locale.
    named = localization if (localization or "").strip().lower() not in _NO_TRANSLATION else system
    return CHINESE if is_chinese(named or "") else ENGLISH


def is_chinese(name: str) -> bool:
    """True if the name of a locale or translation means Chinese, in any script: readers of one prefer the other to
    English.
    """
    name = name.lower()
    return any(word in name for word in _NAMES) or _TAG.search(name) is not None


def system_locale(environment: Mapping[str, str] | None = None) -> str:
    """Returns the user's locale: "zh_CN", or "Chinese (Simplified)_China" as Windows writes it; "" if unknown."""
    environment = os.environ if environment is None else environment
    # In gettext's order. Windows starts programs without these variables.
    for variable in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        if value := environment.get(variable):
            return value.partition(":")[0]
    try:
        return locale.setlocale(locale.LC_CTYPE) if (known := locale.getlocale()[0]) is None else known
    except (ValueError, locale.Error):
        return ""
