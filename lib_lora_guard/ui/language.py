"""Chooses the reader's language if the setting leaves it open."""

from __future__ import annotations

from ..messages.catalogue import ENGLISH
from ..messages.languages import language_of
from ..settings import Language


def reader_language(wanted: Language, *hints: str | None) -> str:
    """Returns the chosen language, or with AUTO that of the first hint that names one.

    `hints`: the WebUI's localization ("zh_CN", "None"), an Accept-Language header ("zh-CN,zh;q=0.9,en;q=0.8").
    """
    if wanted is not Language.AUTO:
        return str(wanted.value)
    for hint in hints:
        first = (hint or "").split(",")[0].split(";")[0].strip()
        if first.lower() not in ("", "none", "*"):
            return language_of(Language.AUTO.value, first)
    return ENGLISH
