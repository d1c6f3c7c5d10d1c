"""Sentences for users: a key of the catalogue and the facts that go into it, so that each reader gets their own language.

A Message is its English sentence, so that it goes wherever text goes: into an exception, a report, a test. What passes it on
whole (no f-string around it) passes on every language.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .catalogue import ENGLISH, TEXTS


class Message(str):
    """A sentence of the catalogue. A fact may itself be a Message or a Joined; of an exception its reason is kept, for the
    exception holds on to everything that was alive where it was raised."""

    __slots__ = ("facts", "key")
    key: str
    facts: Mapping[str, Any]

    def __new__(cls, key: str, facts: Mapping[str, Any] | None = None) -> Message:
        facts = {name: _fact(fact) for name, fact in (facts or {}).items()}
        self = super().__new__(cls, _filled(key, facts, ENGLISH))
        self.key, self.facts = key, facts
        return self

    def text(self, language: str = ENGLISH) -> str:
        """The sentence in `language`; in English where the catalogue has no other."""
        return str(self) if language == ENGLISH else _filled(self.key, self.facts, language)

    def map(self, convert: Callable[[Any], Any]) -> Message:
        """The same sentence with every fact converted, those of sentences inside it too."""
        return Message(self.key, {name: _converted(fact, convert) for name, fact in self.facts.items()})

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]  # str says: the text alone
        return self.key, self.facts


class Joined(str):
    """Sentences or words one after another; `between` is the catalogue's key of what stands between two of them."""

    __slots__ = ("between", "parts")
    parts: tuple[Any, ...]
    between: str

    def __new__(cls, parts: Iterable[Any], between: str = "list.comma") -> Joined:
        parts = tuple(_fact(part) for part in parts)
        self = super().__new__(cls, str(Message(between)).join(str(part) for part in parts))
        self.parts, self.between = parts, between
        return self

    def text(self, language: str = ENGLISH) -> str:
        return Message(self.between).text(language).join(str(in_language(part, language)) for part in self.parts)

    def map(self, convert: Callable[[Any], Any]) -> Joined:
        return Joined((_converted(part, convert) for part in self.parts), self.between)

    def __getnewargs__(self) -> tuple[tuple[Any, ...], str]:  # type: ignore[override]  # as above
        return self.parts, self.between


def in_language(fact: Any, language: str) -> Any:
    """`fact` as it goes into a sentence: translated where it has translations, as it is otherwise."""
    return fact.text(language) if isinstance(fact, (Message, Joined)) else fact


def reason(error: BaseException) -> str:
    """Why, as a fact for a sentence: the Message that an error was raised with, else its text."""
    first = error.args[0] if error.args else None
    said = getattr(error, "message", first)
    return said if isinstance(said, (Message, Joined)) else str(error)


def about(subject: str, what: str) -> Message:
    """`subject: what`, for a file, a key of it, or a model."""
    return Message("about.one", {"subject": subject, "what": what})


def without(subject: str, message: str) -> str:
    """What `message` says, without naming the subject it is about: for a sentence that has named it already."""
    if isinstance(message, Message) and message.key == "about.one" and message.facts["subject"] == subject:
        what: str = message.facts["what"]
        return what
    return message


def with_error(what: str, error: str) -> Message:
    """`what`, and in brackets the error it came from."""
    return Message("log.with_error", {"message": what, "error": error})


def say(log: logging.Logger, level: int, key: str, /, *, exc_info: bool = False, **facts: Any) -> None:
    """Logs a sentence of the catalogue; handlers find the Message itself with `message_of`. `exc_info`: the error being
    handled is named after it."""
    if log.isEnabledFor(level):
        log.log(level, "%s", Message(key, facts), exc_info=exc_info, stacklevel=2)


def message_of(record: logging.LogRecord) -> str:
    """What a log record says: the Message where there is one, else the text."""
    if record.msg == "%s" and isinstance(record.args, tuple) and isinstance(record.args[0], Message):
        return record.args[0]
    return record.getMessage()


def _fact(fact: Any) -> Any:
    return reason(fact) if isinstance(fact, BaseException) else fact


def _filled(key: str, facts: Mapping[str, Any], language: str) -> str:
    texts = TEXTS[key]
    template = texts.get(language, texts[ENGLISH])
    try:
        return template.format(**{name: in_language(fact, language) for name, fact in facts.items()})
    except (LookupError, TypeError, ValueError):
        # A fact of an unexpected kind must not stop what the sentence is about.
        return f"{template} {dict(facts)}"


def _converted(fact: Any, convert: Callable[[Any], Any]) -> Any:
    return fact.map(convert) if isinstance(fact, (Message, Joined)) else convert(fact)
