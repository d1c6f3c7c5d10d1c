"""An answer of the panel's address, recorded on a real card, whose sentences are keys and facts of the catalogue.

So a picture of the tab has the words of today, in every language. `recorded_answer.json` is the fifth image of a Flux model of
NF4 in Forge, on a card of 12.5 GB that an H200 plays: what a ballast held of the rest is taken off. Its labels are left out,
and its files have names as users' files do.
"""

import json
import string
from pathlib import Path
from typing import Any

from lib_lora_guard.messages.catalogue import TEXTS
from lib_lora_guard.ui.panel import labels

RECORDED = Path(__file__).with_suffix(".json")
LABELS, LANGUAGE = "labels", "language"
"""Fields of an answer that are those of its reader."""
KEY, FACTS = "key", "facts"
"""Fields of a sentence. Facts are texts in their final form, sentences or lists."""
BETWEEN, PARTS = "between", "parts"
"""Fields of a list, as `Joined` has them."""


def answer_in(language: str, recorded: Path = RECORDED) -> dict[str, Any]:
    """Returns a recorded answer as a reader of `language` gets it."""
    answer: dict[str, Any] = told(json.loads(recorded.read_text(encoding="utf-8")), language)
    return {**answer, LANGUAGE: language, LABELS: labels(language)}


def told(recorded: Any, language: str) -> Any:
    """Returns a part of a recorded answer with its sentences in `language`."""
    if isinstance(recorded, list):
        return [told(one, language) for one in recorded]
    if not isinstance(recorded, dict):
        return recorded
    if BETWEEN in recorded:
        return TEXTS[recorded[BETWEEN]][language].join(told(recorded[PARTS], language))
    if FACTS not in recorded:
        return {name: told(one, language) for name, one in recorded.items()}
    facts = told(recorded[FACTS], language)
    pieces = string.Formatter().parse(TEXTS[recorded[KEY]][language])
    return "".join(text + ("" if name is None else facts[name]) for text, name, _, _ in pieces)
