"""Collects what the names and sizes of a model or of a LoRA file show, in one form for both."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from ..adapters.base import Shape
from ..adapters.file_keys import meaning_of
from ..adapters.kinds import Kind, Size
from .routes import flatten

_ELSEWHERE = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "control_model.", "model_ema.")
_FRONT = re.compile(
    r"^(base_model\.model\.|lycoris_|lora_)?"
    r"(model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\.|prior_unet_|prior_|unet_|transformer_(?!blocks[._]))?"
)
_TEXT = re.compile(r"^(te\d?|text_encoders?(_\d)?|clip_[lgh]|t5(xxl)?|prior_te)[._]|^text_model[._]")
_ATTACHED = ("_lora", "_lora1", "_lora2")
"""Attention processors of old diffusers and XLabs hang the adapter on the layer: `to_q_lora`, `qkv_lora1`."""
_ENDING = re.compile(r"\.(weight|bias|scale)$")


class Evidence:
    """Modules by flat name, without the prefixes of trainers and components."""

    def __init__(self, modules: Mapping[str, Size], text: Mapping[str, Size]) -> None:
        """Keeps the sizes of a model's modules, those of its text encoders apart."""
        self.names = modules
        self._text = text
        self._all, self._all_text = "\n".join(modules), "\n".join(text)

    @classmethod
    def of_model(cls, shapes: Mapping[str, Shape]) -> Evidence:
        """The evidence of a model's parameters, by name."""
        modules = {}
        for name, shape in shapes.items():
            module, _, last = name.rpartition(".")
            if last in ("weight", "scale") and not name.startswith(_ELSEWHERE) and not _TEXT.match(name):
                modules[flatten(_FRONT.sub("", module))] = (shape[0], shape[1] if len(shape) > 1 else None)
        return cls(modules, {})

    @classmethod
    def of_lora(cls, shapes: Mapping[str, Shape]) -> Evidence:
        """The evidence of a LoRA file's tensors, by name. Kinds that show the size of their module give it."""
        parts: dict[str, dict[Kind, dict[str, Shape]]] = defaultdict(dict)
        for key, shape in shapes.items():
            meaning = meaning_of(key, shapes)
            fields = parts[_ENDING.sub("", key) if meaning is None else meaning.module]
            if meaning is not None and meaning.kind is not None and meaning.kind.size is not None:
                fields.setdefault(meaning.kind, {})[meaning.field] = shape
        modules: dict[str, Size] = {}
        text: dict[str, Size] = {}
        for module, kinds in parts.items():
            name = _FRONT.sub("", module).replace(".processor.", ".").replace("_processor_", "_")
            name = flatten(name.rpartition("_lora")[0] if name.endswith(_ATTACHED) else name)
            (text if _TEXT.match(name) else modules)[name] = _size(kinds)
        return cls(modules, text)

    def has(self, pattern: str) -> bool:
        """True if the pattern finds a module's name; `^` and `$` are the ends of a name."""
        return re.search(pattern, self._all, re.MULTILINE) is not None

    def sizes(self, pattern: str) -> set[tuple[int, int]]:
        """`(outputs, inputs)` of all modules whose name the pattern finds and whose sizes are known."""
        return {(o, i) for name, (o, i) in self.names.items() if o and i and re.search(pattern, name)}

    def inputs(self, pattern: str) -> set[int]:
        """Input widths of all modules whose name the pattern finds, where they are known."""
        return {size[1] for name, size in self.names.items() if size[1] and re.search(pattern, name)}

    def text(self, pattern: str) -> bool:
        """The same as `has`, for text encoders."""
        return re.search(pattern, self._all_text, re.MULTILINE) is not None

    def text_inputs(self, pattern: str) -> set[int]:
        """The same as `inputs`, for text encoders."""
        return {size[1] for name, size in self._text.items() if size[1] and re.search(pattern, name)}


def _size(kinds: Mapping[Kind, Mapping[str, Shape]]) -> Size:
    for kind, fields in kinds.items():
        if kind.size is not None:
            return kind.size(fields)
    return None, None
