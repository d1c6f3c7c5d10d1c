"""An answer of the panel's address, recorded on a real card, whose sentences are keys and facts of the catalogue.

So a picture of the tab has the words of today, in every language. `recorded_answer.json` is the fifth image of a Flux model of
NF4 in Forge, on a card of 12.5 GB that an H200 plays: what a ballast held of the rest is taken off. Its labels and
explanations are left out: they are those of the catalogue. Its files have names as users' files do.
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
EXPLANATIONS = {"text": ("why", "why."), "name": ("about", "panel.about.")}
"""Fields of sentences that may have an explanation: the field of that, and the prefix of its key (instead of `panel.`)."""
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
        explained = {}
        for field, (explanation, prefix) in EXPLANATIONS.items():
            if isinstance(recorded.get(field), dict):
                explained[explanation] = explanation_of(recorded[field], prefix, language)
        return {name: told(one, language) for name, one in recorded.items()} | explained
    return filled(recorded[KEY], recorded[FACTS], language)


def explanation_of(sentence: dict[str, Any], prefix: str, language: str) -> str | None:
    """Returns the explanation of a sentence with its own facts; None if the catalogue has none."""
    # A finding of a rule is wrapped.
    sentence = sentence.get(FACTS, {}).get("says", sentence)
    key = prefix + sentence.get(KEY, "").removeprefix("panel.")
    return filled(key, sentence[FACTS], language) if key in TEXTS else None


def filled(key: str, facts: dict[str, Any], language: str) -> str:
    """Returns a sentence. Numbers of the facts get the form that this sentence gives them."""
    texts = told(facts, language)

    def one(name: str, form: str) -> str:
        return format(float(texts[name]), form) if form else texts[name]

    pieces = string.Formatter().parse(TEXTS[key][language])
    return "".join(text + ("" if name is None else one(name, form or "")) for text, name, form, _ in pieces)
