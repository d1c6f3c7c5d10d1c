"""Text encoders: detects those of a model, resolves which one a LoRA file addresses, and lists their module names.

CLIP has transformers' names (with or without `text_model.`: transformers 5 removed it from CLIPTextModel). In SD 2.x
and SDXL checkpoints it has open_clip's, whose `attn.in_proj_weight` fuses query, key and value. T5 has only
transformers' names. Sources: diffusers' single_file_utils.py, Forge's backend/loader.py, and the key maps of kohya,
OneTrainer and diffusers files in Forge's packages_3rdparty/comfyui_lora_collection/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ..adapters.base import Shape
from .routes import Spelling, numbers

CLIP_L, CLIP_G, CLIP_H, CLIP, T5 = "clip_l", "clip_g", "clip_h", "clip", "t5"
"""CLIP stands for an encoder whose width is none of the three."""

_WIDTHS = {768: CLIP_L, 1280: CLIP_G, 1024: CLIP_H}
_MARK = re.compile(
    r"(?P<prefix>(?:[^.]+\.)*?)(?:(?:text_model\.)?encoder\.layers\.\d+\.(?:self_attn|mlp)\.|transformer\.resblocks\.\d+\."
    r"|(?P<t5>encoder\.block\.\d+\.layer\.))"
)
_NAMED = {
    **{name: name for name in (CLIP_L, CLIP_G, CLIP_H)},
    "text_encoder.": CLIP_L,
    "text_encoder_2.": CLIP_G,
    "embedders.1": CLIP_G,
}
"""The kind by a part of the prefix, if the width is unknown; as in Forge's containers and diffusers' pipelines."""

_INDEX: dict[str, Sequence[str]] = {
    "te": (CLIP_L, CLIP_H, CLIP, CLIP_G),
    "te1": (CLIP_L, CLIP_H, CLIP),
    "te2": (CLIP_G,),
    "te3": (),
    CLIP_L: (CLIP_L, CLIP),
    CLIP_G: (CLIP_G,),
    CLIP_H: (CLIP_H, CLIP),
    T5: (),
}
_HINTS = {
    "te_": "te", "te1_": "te1", "te2_": "te2", "te3_": "te3", "prior_te_": "te",
    "text_encoder_": "te1", "text_encoder_2_": "te2", "text_encoder_3_": "te3",
    "clip_l_": CLIP_L, "clip_g_": CLIP_G, "clip_h_": CLIP_H, "t5_": T5, "t5xxl_": T5,
    "text_encoders_clip_l_": CLIP_L, "text_encoders_clip_g_": CLIP_G, "text_encoders_t5xxl_": T5,
}  # fmt: skip
"""Maps the beginning of a flat name in a file to the encoder it addresses."""
HINTS = dict(sorted(_HINTS.items(), key=lambda item: -len(item[0])))
"""_HINTS, longest first."""

_LAYER = (
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def find_encoders(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Returns the prefix of every text encoder among the parameter names, with its kind: CLIP_L, CLIP_G, CLIP_H, CLIP
    or T5.
    """
    found: dict[str, str] = {}
    for name in shapes:
        mark = _MARK.match(name)
        if mark and "vision" not in mark["prefix"]:
            found.setdefault(mark["prefix"], T5 if mark["t5"] else CLIP)
    return {prefix: kind if kind == T5 else _which_clip(shapes, prefix) for prefix, kind in found.items()}


def _which_clip(shapes: Mapping[str, Shape], prefix: str) -> str:
    for name in ("final_layer_norm.weight", "text_model.final_layer_norm.weight", "ln_final.weight"):
        if (shape := shapes.get(prefix + name)) and shape[0] in _WIDTHS:
            return _WIDTHS[shape[0]]
    return next((kind for said, kind in _NAMED.items() if said in prefix), CLIP)


def candidates(hint: str, encoders: Mapping[str, str]) -> list[str]:
    """Returns the prefixes of the encoders that names with a hint may address, likeliest first.

    Args:
        hint: A value of HINTS.
        encoders: The model's encoders, from `find_encoders`.
    """
    wanted = list(_INDEX[hint])
    if hint == "te1" and [p for p, kind in encoders.items() if kind != T5 and p]:
        wanted.append(CLIP_G)  # SDXL's refiner: the model's first and only CLIP; a lone module may be SDXL's second one
    clip = next((p for kind in wanted for p, found in encoders.items() if found == kind), None)
    t5 = [p for p, found in encoders.items() if found == T5] if hint not in (CLIP_L, CLIP_G, CLIP_H) else []
    return [*([clip] if clip is not None else []), *t5]


def spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields all module names of a CLIP text encoder; none for T5, whose modules have one name each."""
    nested = "text_model." if any(name.startswith("text_model.") for name in modules) else ""
    layers = numbers(modules, nested + "encoder.layers") or numbers(modules, "transformer.resblocks")
    if not layers:
        return
    plain = [("token_embedding", "embeddings.token_embedding"), ("ln_final", "final_layer_norm")]
    for original, atom in (*plain, ("embeddings.position_embedding", "embeddings.position_embedding")):
        yield from _nested(original, atom)
    for n in layers:
        block, theirs = f"encoder.layers.{n}.", f"transformer.resblocks.{n}."
        for original, atom in _LAYER:
            yield from _nested(theirs + original, block + atom)
        query_key_value = tuple(f"{block}self_attn.{x}_proj" for x in "qkv")
        yield Spelling(f"{theirs}attn", query_key_value)
        for atom, letter in zip(query_key_value, "qkv", strict=True):
            # diffusers' first files for text encoders use to_q for the module q_proj
            yield from _nested(f"{block}self_attn.to_{letter}", atom)
        yield from _nested(f"{block}self_attn.to_out", block + "self_attn.out_proj")


def _nested(other: str, atom: str) -> Iterator[Spelling]:
    for name in (other, atom):
        yield Spelling(name, (atom,))
        yield Spelling("text_model." + name, (atom,))
