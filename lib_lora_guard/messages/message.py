"""Sentences for users: a key of the catalogue and its facts, so that each reader gets their own language.

A Message is a str, its English sentence, so it can be used as text: in an exception, a report, a test. Code that passes
it on unchanged (not inside an f-string) keeps all languages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .catalogue import ENGLISH, TEXTS


class Message(str):
    """A sentence of the catalogue.

    A fact may be a Message or a Joined. Of an exception only the reason is kept: the exception would keep everything
    alive that existed where it was raised.
    """

    __slots__ = ("facts", "key")
    key: str
    facts: Mapping[str, Any]

    def __new__(cls, key: str, facts: Mapping[str, Any] | None = None) -> Message:
        facts = {name: _fact(fact) for name, fact in (facts or {}).items()}
        self = super().__new__(cls, _filled(key, facts, ENGLISH))
        self.key, self.facts = key, facts
        return self

    def text(self, language: str = ENGLISH) -> str:
        """Returns the sentence in `language`; in English if the catalogue lacks it."""
        return str(self) if language == ENGLISH else _filled(self.key, self.facts, language)

    def map(self, convert: Callable[[Any], Any]) -> Message:
        """Returns the same sentence with every fact converted, nested ones included."""
        return Message(self.key, {name: _converted(fact, convert) for name, fact in self.facts.items()})

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]  # str declares the text alone
        return self.key, self.facts


class Joined(str):
    """Sentences or words in sequence. `between` is the catalogue's key of the separator."""

    __slots__ = ("between", "parts")
    parts: tuple[Any, ...]
    between: str

    def __new__(cls, parts: Iterable[Any], between: str = "list.comma") -> Joined:
        parts = tuple(_fact(part) for part in parts)
        self = super().__new__(cls, str(Message(between)).join(str(part) for part in parts))
        self.parts, self.between = parts, between
        return self

    def text(self, language: str = ENGLISH) -> str:
        """Returns the parts in `language`."""
        return Message(self.between).text(language).join(str(in_language(part, language)) for part in self.parts)

    def map(self, convert: Callable[[Any], Any]) -> Joined:
        """Returns the same sequence with every part converted, as `Message.map`."""
        return Joined((_converted(part, convert) for part in self.parts), self.between)

    def __getnewargs__(self) -> tuple[tuple[Any, ...], str]:  # type: ignore[override]  # as above
        return self.parts, self.between


def in_language(fact: Any, language: str) -> Any:
    """Returns `fact` translated if it has translations, else unchanged."""
    return fact.text(language) if isinstance(fact, (Message, Joined)) else fact


def reason(error: BaseException) -> str:
    """Returns the cause of an error as a fact for a sentence: the Message it was raised with, else its text."""
    first = error.args[0] if error.args else None
    said = getattr(error, "message", first)
    return said if isinstance(said, (Message, Joined)) else str(error)


def about(subject: str, what: str) -> Message:
    """Returns the sentence `subject: what`. The subject is a file, a key of a file, or a model."""
    return Message("about.one", {"subject": subject, "what": what})


def without(subject: str, message: str) -> str:
    """Returns `message` without its leading `subject`, for a sentence that has named it already."""
    if isinstance(message, Message) and message.key == "about.one" and message.facts["subject"] == subject:
        what: str = message.facts["what"]
        return what
    return message


def with_error(what: str, error: str) -> Message:
    """Returns `what` followed by the error in brackets."""
    return Message("log.with_error", {"message": what, "error": error})


def say(log: logging.Logger, level: int, key: str, /, *, exc_info: bool = False, **facts: Any) -> None:
    """Logs a sentence of the catalogue. Handlers get the Message itself from `message_of`.

    `exc_info`: adds the error that is being handled.
    """
    if log.isEnabledFor(level):
        log.log(level, "%s", Message(key, facts), exc_info=exc_info, stacklevel=2)


def message_of(record: logging.LogRecord) -> str:
    """Returns the Message of a log record if it has one, else its text."""
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
        # A fact of an unexpected type must not hide the sentence.
        return f"{template} {dict(facts)}"


def _converted(fact: Any, convert: Callable[[Any], Any]) -> Any:
    return fact.map(convert) if isinstance(fact, (Message, Joined)) else convert(fact)
