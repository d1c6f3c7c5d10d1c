"""Every sentence that users read, by key, in every language. One module per subject; `TEXTS` is all of them.

A new language is a new column here; a test holds that the columns have the same placeholders.
"""

from __future__ import annotations

from . import hosts

ENGLISH, CHINESE = "en", "zh"
LANGUAGES = (ENGLISH, CHINESE)

TEXTS: dict[str, dict[str, str]] = {
    key: dict(zip(LANGUAGES, texts, strict=True)) for module in (hosts,) for key, texts in module.TEXTS.items()
}
