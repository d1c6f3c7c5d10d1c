"""In which language a reader gets the sentences of the catalogue."""

from __future__ import annotations

import locale
import os
import re
from collections.abc import Mapping

from .catalogue import CHINESE, ENGLISH, LANGUAGES

AUTO = "auto"

_TAG = re.compile(r"(?<![a-z])(zh|chs|cht|chi|zho|cn)(?![a-z])")
_NAMES = ("chinese", "中文", "汉语", "简体", "繁體", "繁体")
"""As translations of the host are named in words."""
_NO_TRANSLATION = ("", "none")


def language_of(setting: str, localization: str | None = None, system: str | None = None) -> str:
    """The catalogue's language for a reader. `setting` ("en", "zh") decides unless it is "auto"; then `localization`, the
    translation chosen in the host ("zh_CN", "zh-Hans (Stable)", "chinese-all-0313"), where there is one; then `system`, the
    locale (see `system_locale`). A reader of another language than ours gets English."""
    if setting in LANGUAGES:
        return setting
    # Who translates the host into some language has said more than the system has.
    said = localization if (localization or "").strip().lower() not in _NO_TRANSLATION else system
    return CHINESE if is_chinese(said or "") else ENGLISH


def is_chinese(name: str) -> bool:
    """True where the name of a locale or of a translation says Chinese, whichever script: who reads one reads the other
    better than English."""
    name = name.lower()
    return any(word in name for word in _NAMES) or _TAG.search(name) is not None


def system_locale(environment: Mapping[str, str] | None = None) -> str:
    """The name of the user's locale: "zh_CN", or "Chinese (Simplified)_China" as Windows says it; "" where none is told."""
    environment = os.environ if environment is None else environment
    # In gettext's order. Programs on Windows are started without these.
    for variable in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        if value := environment.get(variable):
            return value.partition(":")[0]
    try:
        return locale.setlocale(locale.LC_CTYPE) if (known := locale.getlocale()[0]) is None else known
    except (ValueError, locale.Error):
        return ""
