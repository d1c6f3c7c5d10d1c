"""Collects what the names and sizes of a model or of a LoRA file show, in one form for both.

Blocks of a model are alike: of each module only the ones in the first and in the last block are looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache

from ..adapters.base import Shape
from ..adapters.file_keys import meaning_of
from ..adapters.kinds import Kind, Size
from ..adapters.module_names import without_prefixes
from .routes import flatten
from .wrappers import unwrapped

_ELSEWHERE = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "control_model.", "model_ema.")
_TEXT = re.compile(
    r"^(te\d?|text_encoders?(_\d)?|clip_[lgh]|u?mt5(xxl)?|t5(xxl)?|prior_te|qwen\w+|gemma\w+|mi(ni)?stral\w*|llama\w*)[._]"
    r"|^text_model[._]|^(model[._])?(language_model[._])?(model[._])?layers[._]\d+[._]self_attn[._][qkvo]_proj"
)
_ATTACHED = ("_lora", "_lora1", "_lora2")
"""Attention processors of old diffusers and XLabs hang the adapter on the layer: `to_q_lora`, `qkv_lora1`."""
_ENDING = re.compile(r"\.(?:in_proj_)?(weight|bias|scale)$")
_BLOCK = re.compile(r"s[._](\d{1,4})[._]")
"""The number of a block: `double_blocks.12.`, `layers_3_`."""


class Evidence:
    """Modules by flat name, without the prefixes of trainers, wrappers and components."""

    def __init__(
        self, modules: Mapping[str, Size], text: Mapping[str, Size], blocks: Mapping[str, set[int]] | None = None
    ) -> None:
        """Keeps the sizes of a model's modules, those of its text encoders apart.

        Args:
            modules: Modules of the first and the last block.
            text: The same of the text encoders.
            blocks: The numbers of all blocks by the name of their stack, `transformer_blocks`.
        """
        self.names = modules
        self._text = text
        self._all, self._all_text = "\n".join(["", *modules, ""]), "\n".join(["", *text, ""])
        self._blocks = blocks or {}

    @classmethod
    def of_model(cls, shapes: Mapping[str, Shape]) -> Evidence:
        """The evidence of a model's parameters, by name."""
        own = unwrapped(shapes)
        kept, blocks = _of_first_and_last_block(name for name in own if name.endswith((".weight", ".scale")))
        modules = {}
        for name in kept:
            module = name.rpartition(".")[0]
            if not name.startswith(_ELSEWHERE) and not _TEXT.match(name):
                shape = shapes[own[name]]
                modules[flatten(without_prefixes(module))] = (shape[0], shape[1] if len(shape) > 1 else None)
        return cls(modules, {}, blocks)

    @classmethod
    def of_lora(cls, shapes: Mapping[str, Shape]) -> Evidence:
        """The evidence of a LoRA file's tensors, by name. Kinds that show the size of their module give it."""
        kept, blocks = _of_first_and_last_block(shapes)
        parts: dict[str, dict[Kind, dict[str, Shape]]] = defaultdict(dict)
        for key in kept:
            shape = shapes[key]
            meaning = meaning_of(key, shapes)
            fields = parts[_ENDING.sub("", key) if meaning is None else meaning.module]
            if meaning is not None and meaning.kind is not None and meaning.kind.size is not None:
                fields.setdefault(meaning.kind, {})[meaning.field] = shape
        modules: dict[str, Size] = {}
        text: dict[str, Size] = {}
        for module, kinds in parts.items():
            name = without_prefixes(module).replace(".processor.", ".").replace("_processor_", "_")
            name = flatten(name.rpartition("_lora")[0] if name.endswith(_ATTACHED) else name).rstrip("_")
            (text if _TEXT.match(name) else modules)[name] = _size(kinds)
        return cls(modules, text, blocks)

    def has(self, pattern: str) -> bool:
        """True if the pattern finds a module's name; `^` and `$` are the ends of a name."""
        return _in_lines(pattern).search(self._all) is not None

    def sizes(self, pattern: str) -> set[tuple[int, int]]:
        """`(outputs, inputs)` of all modules whose name the pattern finds and whose sizes are known."""
        if not self.has(pattern):
            return set()
        return {(o, i) for name, (o, i) in self.names.items() if o and i and re.search(pattern, name)}

    def inputs(self, pattern: str) -> set[int]:
        """Input widths of all modules whose name the pattern finds, where they are known."""
        if not self.has(pattern):
            return set()
        return {size[1] for name, size in self.names.items() if size[1] and re.search(pattern, name)}

    def blocks(self, stack: str) -> set[int]:
        """Numbers of the blocks in a stack: those of `double_blocks`."""
        return self._blocks.get(stack, set())

    def text(self, pattern: str) -> bool:
        """The same as `has`, for text encoders."""
        return _in_lines(pattern).search(self._all_text) is not None

    def text_inputs(self, pattern: str) -> set[int]:
        """The same as `inputs`, for text encoders."""
        if not self.text(pattern):
            return set()
        return {size[1] for name, size in self._text.items() if size[1] and re.search(pattern, name)}


def _of_first_and_last_block(names: Iterable[str]) -> tuple[dict[str, None], dict[str, set[int]]]:
    """Picks the names that differ in more than the number of their block, and of the others the first and the last.

    Returns:
        The names in order, and the numbers of all blocks by the flat name of their stack without prefixes.
    """
    kept: dict[str, None] = {}
    alike: dict[tuple[str, str], dict[int, str]] = {}
    split = _BLOCK.split
    for name in names:
        parts = split(name, 1)
        if len(parts) == 1:
            kept[name] = None
            continue
        before, number, after = parts
        by_number = alike.get((before, after))
        if by_number is None:
            alike[before, after] = {int(number): name}
        else:
            by_number[int(number)] = name
    stacks: dict[str, set[int]] = defaultdict(set)
    for (before, _), by_number in alike.items():
        for number in (min(by_number), max(by_number)):
            kept[by_number[number]] = None
        stacks[before].update(by_number)
    blocks: dict[str, set[int]] = defaultdict(set)
    for before, numbers in stacks.items():
        blocks[flatten(without_prefixes(before + "s_"))[:-1]] |= numbers
    return kept, blocks


@lru_cache(maxsize=512)
def _in_lines(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern for names that each stand in a line: ends of lines are found faster than `^` in MULTILINE."""
    return re.compile(_START.sub("\n", pattern).replace("$", "(?=\n)"))


_START = re.compile(r"(?<!\[)\^")


def _size(kinds: Mapping[Kind, Mapping[str, Shape]]) -> Size:
    for kind, fields in kinds.items():
        if kind.size is not None:
            return kind.size(fields)
    return None, None
