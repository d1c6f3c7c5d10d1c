"""Keeps what is to be said of an image: in the log, and where the host shows the image, each once in an image. That is what
it lacks of its LoRAs, what of them was applied otherwise than asked, and what made it slow; nothing when all is well.

A file is read once for many images, a batch loads its models many times, a second pass reads the prompt again: all of them
tell what they find, and this lets each sentence through once. Under the image a LoRA has one line: what is found later
joins it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..messages import Joined, Message, in_language
from ..messages.catalogue import ENGLISH
from ..reporting.report import ApplyReport, LoraReport, clean_text

log = logging.getLogger(__name__)

Comment = Callable[[str], None]
"""Shows a line of text under an image, or takes one back."""


@dataclass(eq=False)
class _Image:
    """One request for images that is being worked off."""

    request: int
    """The id of the host's object for the request."""
    comment: Comment | None
    """Shows a line under the image; None where the host cannot."""
    take_back: Comment | None
    """Takes a line back that was shown; None where the host cannot."""
    said: set[str] = field(default_factory=set)
    lines: dict[str, tuple[list[Message], str]] = field(default_factory=dict)
    """The sentences on each LoRA, by its name, and the line that shows them."""

    def show(self, message: Message, language: str) -> None:
        """Shows a sentence; in the line of its LoRA, if that has one that can be taken back."""
        if self.comment is None:
            return
        name = str(message.facts.get("name", message))
        sentences, before = self.lines.get(name, ([], ""))
        if before and self.take_back is not None:
            self.take_back(before)
            sentences = joined(sentences, message)
        else:
            sentences = [message]
        line = one_line(sentences[0] if len(sentences) == 1 else Joined(sentences, "list.semicolon"), language)
        self.comment(line)
        self.lines[name] = sentences, line


class ImageWords:
    """What is said of the LoRAs of the image that is being made. Images may stand inside one another."""

    def __init__(self, language: Callable[[], str] = lambda: ENGLISH) -> None:
        """
        Args:
            language: Returns the language of the reader under the image.
        """
        self._language = language
        self._images: list[_Image] = []

    @contextmanager
    def image(self, request: int, comment: Comment | None, take_back: Comment | None = None) -> Iterator[None]:
        """Wraps the work on one request, or a part of it: inside the same request the outer wrapper counts.

        Args:
            request: The id of the host's object for it, which lives for as long as the work does.
            comment: Shows a line under the image; None where the host cannot.
            take_back: Takes a line back that was shown; None where the host cannot.
        """
        if any(image.request == request for image in self._images[-1:]):
            yield
            return
        image = _Image(request, comment, take_back)
        self._images.append(image)
        try:
            yield
        finally:
            self._images.remove(image)

    @property
    def is_open(self) -> bool:
        """True while an image is being made."""
        return bool(self._images)

    @property
    def is_shown(self) -> bool:
        """True if what is told now is shown under an image."""
        return self.is_open and self._images[-1].comment is not None

    def tell(
        self, message: Message, level: int = logging.WARNING, is_logged: bool = False, once: str | None = None
    ) -> None:
        """Says a sentence in the log and under the image, unless this image has said it. Never raises.

        Args:
            message: The sentence, with the LoRA's name if it is about one.
            level: Of the log line.
            is_logged: True if another line of the log says the same already.
            once: Names what is said once in an image though its numbers differ; None for the sentence itself.
        """
        once = message if once is None else once
        image = self._images[-1] if self._images else None
        if image is not None and once in image.said:
            return
        if not is_logged:
            log.log(level, "%s", message)
        if image is None:
            return
        image.said.add(once)
        try:
            image.show(message, self._language())
        except Exception:
            # The image counts, not what is said of it.
            log.debug("nothing can be shown under the image", exc_info=True)

    def tell_of(self, reports: Sequence[ApplyReport], is_logged: bool = False) -> None:
        """Says what the models lack of their LoRAs, and what is applied otherwise than asked, as their last change reports it.

        Args:
            reports: Of the models of the image.
            is_logged: True if the log has the reports already.
        """
        for report in reports:
            for lora in report.loras:
                message = lacking(lora, report.model)
                if message is not None:
                    self.tell(message, is_logged=is_logged)
            for message in report.otherwise:
                self.tell(message, is_logged=True)


def lacking(lora: LoraReport, model: str) -> Message | None:
    """Returns the sentence on a LoRA that a model lacks, or a part of it; None if the model has all that was asked for."""
    name = clean_text(lora.label)
    if lora.refused is not None:
        return Message("host.left_out_of_model", {"name": name, "model": model, "why": clean_text(lora.refused)})
    if lora.lost:
        facts = {"name": name, "model": model, "count": len(lora.lost), "first": clean_text(lora.lost[0])}
        return Message("host.lost_on_model", facts)
    return None


def joined(sentences: Sequence[Message], message: Message) -> list[Message]:
    """Returns the sentences with one more; the same sentence on two models is one that names both."""
    for place, other in enumerate(sentences):
        if other.key == message.key and _but_model(other) == _but_model(message):
            models = Joined([other.facts.get("model", ""), message.facts.get("model", "")], "list.names")
            return [
                *sentences[:place],
                Message(message.key, {**message.facts, "model": models}),
                *sentences[place + 1 :],
            ]
    return [*sentences, message]


def _but_model(message: Message) -> dict[str, object]:
    return {name: fact for name, fact in message.facts.items() if name != "model"}


def one_line(message: str, language: str) -> str:
    """Returns a sentence as one line of plain text: hosts show each line by itself, and escape it for their page."""
    text = str(in_language(message, language))
    return "LoRA Guard: " + "".join(character if character.isprintable() else " " for character in text)
