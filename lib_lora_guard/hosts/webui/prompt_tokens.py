"""Asks the loaded model's own tokenizers whether two ways to write a prompt are one prompt to its text encoders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import MethodType, ModuleType
from typing import Any, NamedTuple, Protocol, TypeAlias

log = logging.getLogger(__name__)

_ENGINES = ("ClassicTextProcessingEngine", "T5TextProcessingEngine")
"""The engines that encode what their `tokenize_line(text)` returns, and read nothing else of a text.

The others of Forge Neo put texts into templates of their own, and their tokenizers keep blanks as tokens.
"""
_ENGINE_ATTRIBUTE = "text_processing_engine"
_READERS_OF_TEXT = ("__call__", "process_texts", "tokenize_line", "tokenize")
"""The methods of an engine that see a text before it is tokens."""


class Chunk(Protocol):
    """What an engine encodes at once: tokens, their weights, the places of embeddings."""

    tokens: list[int]
    multipliers: list[float]


class Emphasis(Protocol):
    """How weights of words act; it also decides how they are read."""

    name: str


class Engine(Protocol):
    """A text encoder with its tokenizer: `backend/text_processing/*_engine.py` of Forge."""

    emphasis: Emphasis

    def tokenize_line(self, line: str) -> Sequence[Chunk] | tuple[Sequence[Chunk], int]: ...


Tokens: TypeAlias = tuple[bool, list[list[dict[str, list[float]]]]]
"""Everything of a text that decides its conditioning: by engine, by chunk, by field of the chunk."""
Code: TypeAlias = Callable[..., Any]
"""A function of the host, or one that another extension has put in its place."""
Schedules: TypeAlias = tuple[Sequence[Sequence[tuple[int, float]]] | None, list[list[tuple[int, Tokens]]]]
"""Which prompts are composed with which weights, and the tokens of each prompt with their last steps."""


class Encoding(NamedTuple):
    """How prompts are encoded."""

    function: Code
    """The function of the WebUI's `modules.prompt_parser` that encodes them."""
    steps: int
    hires_steps: int | None
    old_scheduling: tuple[bool, ...]
    """`use_old_scheduling`; empty for a WebUI without that setting."""


class PromptTokens:
    """Asks the text-processing engines of the WebUI's present model."""

    def __init__(self, prompt_parser: ModuleType, shared: ModuleType) -> None:
        """
        Args:
            prompt_parser: the WebUI's `modules.prompt_parser`.
            shared: the WebUI's `modules.shared`.
        """
        self._parser, self._shared = prompt_parser, shared

    def are_same(self, some: Sequence[str], others: Sequence[str], how: Encoding) -> bool:
        """True if both give the text encoders the same tokens with the same emphasis, at the same steps.

        False also where the engines cannot be asked: another engine, or another extension reads texts.
        """
        try:
            engines = self._engines()
            if not engines or not all(_is_of(code, place) for code, place in self._readers(engines, how.function)):
                return False
            return self._schedules(engines, some, how) == self._schedules(engines, others, how)
        except Exception:
            log.debug("the tokenizers could not be asked", exc_info=True)
            return False

    def _engines(self) -> list[Engine]:
        """Lists the engines of the model; none if there is one that cannot be asked, or that would read weights otherwise."""
        found = [value for name, value in vars(self._shared.sd_model).items() if name.startswith(_ENGINE_ATTRIBUTE)]
        emphasis = self._shared.opts.emphasis
        can_be_asked = all(type(one).__name__ in _ENGINES and one.emphasis.name == emphasis for one in found)
        return found if can_be_asked else []

    def _readers(self, engines: Sequence[Engine], function: Code) -> Iterator[tuple[Code, str]]:
        """Gives each function that a text goes through, and the beginning of the name of the module it should be of."""
        yield function, self._parser.__name__
        yield self._shared.sd_model.get_learned_conditioning, "backend.diffusion_engine."
        for engine in engines:
            for name in _READERS_OF_TEXT:
                if hasattr(engine, name):
                    yield getattr(engine, name), "backend.text_processing."

    def _schedules(self, engines: Sequence[Engine], texts: Sequence[str], how: Encoding) -> Schedules:
        composed = None
        if how.function == self._parser.get_multicond_learned_conditioning:
            composed, texts, _ = self._parser.get_multicond_prompt_list(texts)
        read = self._parser.get_learned_conditioning_prompt_schedules
        schedules = read(texts, how.steps, how.hires_steps, *how.old_scheduling)
        return composed, [[(end, _tokens(engines, text)) for end, text in schedule] for schedule in schedules]


def _tokens(engines: Sequence[Engine], text: str) -> Tokens:
    lines = [engine.tokenize_line(text) for engine in engines]
    # Some return the number of tokens beside the chunks.
    chunks = [line[0] if isinstance(line, tuple) else line for line in lines]
    # SDXL and SD3 put zeros in place of an empty negative prompt, and of no other without tokens.
    return text == "", [[vars(chunk) for chunk in of_engine] for of_engine in chunks]


def _is_of(code: Code, place: str) -> bool:
    """True if the code of a function is of a module whose name begins with `place`: no other program stands around it."""
    function = code.__func__ if isinstance(code, MethodType) else code
    while function.__globals__["__name__"].startswith("torch."):
        function = vars(function)["__wrapped__"]  # torch.inference_mode and such
    return bool(function.__globals__["__name__"].startswith(place))
