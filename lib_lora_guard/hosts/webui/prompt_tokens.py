"""Asks the loaded model's own tokenizers whether two ways to write a prompt are one prompt to its text encoders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeAlias

log = logging.getLogger(__name__)

_ENGINES = ("ClassicTextProcessingEngine", "T5TextProcessingEngine")
"""The engines that encode what their `tokenize_line(text)` returns, and read nothing else of a text.

The others of Forge Neo put texts into templates of their own, and their tokenizers keep blanks as tokens.
"""
_ENGINE_ATTRIBUTE = "text_processing_engine"
_READERS_OF_TEXT = ("__call__", "process_texts", "tokenize_line", "tokenize")
"""The methods of an engine that see a text before it is tokens."""

Tokens: TypeAlias = list[Any]
"""Everything that an engine hands to its text encoder, in containers that can be compared."""


class Engine(Protocol):
    """A text encoder with its tokenizer: `backend/text_processing/*_engine.py` of Forge."""

    emphasis: Any

    def tokenize_line(self, line: str) -> Any: ...


class Encoding(NamedTuple):
    """How prompts are encoded."""

    function: Callable[..., Any]
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
            engines = self._engines(how.function)
            return bool(engines) and self._schedules(engines, some, how) == self._schedules(engines, others, how)
        except Exception:
            log.debug("the tokenizers could not be asked", exc_info=True)
            return False

    def _engines(self, function: Callable[..., Any]) -> list[Engine]:
        model, parser = self._shared.sd_model, self._parser
        engines = [value for name, value in vars(model).items() if name.startswith(_ENGINE_ATTRIBUTE)]
        readers = [(function, parser.__name__), (model.get_learned_conditioning, "backend.diffusion_engine.")]
        for engine in engines:
            if type(engine).__name__ not in _ENGINES or engine.emphasis.name != self._shared.opts.emphasis:
                return []
            found = [getattr(engine, name) for name in _READERS_OF_TEXT if hasattr(engine, name)]
            readers += [(reader, "backend.text_processing.") for reader in found]
        return engines if all(_is_of(reader, place) for reader, place in readers) else []

    def _schedules(self, engines: Sequence[Engine], texts: Sequence[str], how: Encoding) -> list[Any]:
        """Lists which prompts are composed with which weights, and the tokens of each prompt with their last step."""
        composed = None
        if how.function.__name__ == "get_multicond_learned_conditioning":
            composed, texts, _ = self._parser.get_multicond_prompt_list(texts)
        read = self._parser.get_learned_conditioning_prompt_schedules
        schedules = read(texts, how.steps, how.hires_steps, *how.old_scheduling)
        return [composed, [[(end, _tokens(engines, text)) for end, text in schedule] for schedule in schedules]]


def _tokens(engines: Sequence[Engine], text: str) -> Tokens:
    tokens: Tokens = []
    for engine in engines:
        line = engine.tokenize_line(text)
        # Some return the number of tokens beside the chunks.
        chunks = line[0] if isinstance(line, tuple) else line
        tokens.append([vars(chunk) for chunk in chunks])
    # SDXL and SD3 put zeros in place of an empty negative prompt, and of no other without tokens.
    return [text == "", tokens]


def _is_of(function: Callable[..., Any], place: str) -> bool:
    """True if the code of a function is from a module whose name begins with `place`: no other program stands around it."""
    code: Any = getattr(function, "__func__", function)
    while (module := code.__globals__["__name__"]).startswith("torch."):
        code = code.__wrapped__  # torch.inference_mode and such
    return bool(module.startswith(place))
