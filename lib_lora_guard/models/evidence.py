"""What the names and sizes of a model or of a LoRA file show, in one form for both."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from ..adapters.base import Shape
from .routes import flatten

Size = tuple[int | None, int | None]
"""`(outputs, inputs)` of a module, None where the file does not say."""

_ELSEWHERE = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "control_model.", "model_ema.")
_FRONT = re.compile(
    r"^(base_model\.model\.|lycoris_|lora_)?"
    r"(model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\.|prior_unet_|prior_|unet_|transformer_(?!blocks[._]))?"
)
_TEXT = re.compile(r"^(te\d?|text_encoders?(_\d)?|clip_[lgh]|t5(xxl)?|prior_te)[._]|^text_model[._]")
_FACTOR = re.compile(r"[._]lora(?:_linear_layer|\d)?[._](?P<side>up|down|A|B)(?:\.[^.]+)?\.weight$")
_TENSOR = re.compile(r"\.(?P<name>lokr_w[12](?:_[ab])?|hada_w1_[ab]|diff)$")
_ENDING = re.compile(
    r"\.(alpha|dora_scale|lora_.*|hada_.*|lokr_.*|b?oft_.*|diff_b|[wb]_norm|set_weight|[ab][12]\.weight|bm\.weight|on_input|ia3_l.*|rescale|scalar|base_layer\.bias|weight|bias|scale)$"
)


class Evidence:
    """Modules by flat name, without the prefixes of trainers and components."""

    def __init__(self, modules: Mapping[str, Size], text: Mapping[str, Size]) -> None:
        self.names = modules
        self._text = text
        self._all, self._all_text = "\n".join(modules), "\n".join(text)

    @classmethod
    def of_model(cls, shapes: Mapping[str, Shape]) -> Evidence:
        modules = {}
        for name, shape in shapes.items():
            module, _, last = name.rpartition(".")
            if last in ("weight", "scale") and not name.startswith(_ELSEWHERE) and not _TEXT.match(name):
                modules[flatten(_FRONT.sub("", module))] = (shape[0], shape[1] if len(shape) > 1 else None)
        return cls(modules, {})

    @classmethod
    def of_lora(cls, shapes: Mapping[str, Shape]) -> Evidence:
        parts: dict[str, dict[str, Shape]] = defaultdict(dict)
        for key, shape in shapes.items():
            if found := _FACTOR.search(key):
                parts[key[: found.start()]]["up" if found["side"] in ("up", "B") else "down"] = shape
            elif found := _TENSOR.search(key):
                parts[key[: found.start()]][found["name"]] = shape
            else:
                parts[_ENDING.sub("", key)]  # a name without a size
        modules: dict[str, Size] = {}
        text: dict[str, Size] = {}
        for module, tensors in parts.items():
            name = _FRONT.sub("", module).replace(".processor.", ".").replace("_processor_", "_")
            name = flatten(re.sub(r"_lora$", "", name))
            (text if _TEXT.match(name) else modules)[name] = _size(tensors)
        return cls(modules, text)

    def has(self, pattern: str) -> bool:
        return re.search(pattern, self._all, re.MULTILINE) is not None

    def sizes(self, pattern: str) -> set[tuple[int, int]]:
        """`(outputs, inputs)` of all modules whose name the pattern finds and whose sizes are known."""
        return {(o, i) for name, (o, i) in self.names.items() if o and i and re.search(pattern, name)}

    def inputs(self, pattern: str) -> set[int]:
        return {size[1] for name, size in self.names.items() if size[1] and re.search(pattern, name)}

    def text(self, pattern: str) -> bool:
        return re.search(pattern, self._all_text, re.MULTILINE) is not None

    def text_inputs(self, pattern: str) -> set[int]:
        return {size[1] for name, size in self._text.items() if size[1] and re.search(pattern, name)}


def _size(tensors: Mapping[str, Shape]) -> Size:
    """Sizes of the whole module from the tensors of an adapter: low rank, LoHa, LoKr or a whole difference."""
    if any(name.startswith("lokr") for name in tensors):
        (out1, in1), (out2, in2) = (_lokr_factor(tensors, side) for side in "12")
        return (out1 * out2 if out1 and out2 else None), (in1 * in2 if in1 and in2 else None)
    whole = tensors.get("diff", ())
    up = tensors.get("up") or tensors.get("hada_w1_a") or whole
    down = tensors.get("down") or tensors.get("hada_w1_b") or whole
    return (up[0] if up else None), (down[1] if len(down) > 1 else None)


def _lokr_factor(tensors: Mapping[str, Shape], side: str) -> Size:
    if whole := tensors.get(f"lokr_w{side}"):
        return whole[0], whole[1] if len(whole) > 1 else None
    a, b = tensors.get(f"lokr_w{side}_a"), tensors.get(f"lokr_w{side}_b")
    return (a[0] if a else None), (b[1] if b and len(b) > 1 else None)
