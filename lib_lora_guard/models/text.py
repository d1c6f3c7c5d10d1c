"""Text encoders: detects those of a model, resolves which one a LoRA file addresses, and lists their module names.

CLIP has transformers' names (with or without `text_model.`: transformers 5 removed it from CLIPTextModel). In SD 2.x
and SDXL checkpoints it has open_clip's, whose `attn.in_proj_weight` fuses query, key and value. T5 and UMT5 have only
transformers' names. Language models (Qwen3, Qwen2.5-VL, Gemma 2, Mistral, Llama) share transformers' layers; what stands
before `layers` differs by class and version. Sources: diffusers' single_file_utils.py, Forge's backend/loader.py, Forge
Neo's backend/nn/llm, and the key maps of kohya, OneTrainer and diffusers files in Forge's
packages_3rdparty/comfyui_lora_collection/lora.py and Neo's modules_forge/packages/comfy/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..adapters.base import Shape
from .architecture import A
from .cosmos import adapter_spellings
from .routes import Spelling, numbers

CLIP_L, CLIP_G, CLIP_H, CLIP, T5, LLM = "clip_l", "clip_g", "clip_h", "clip", "t5", "llm"
"""CLIP stands for an encoder whose width is none of the three, LLM for any language model."""

ANY = "any"
"""A text encoder of a model whose encoders are not known."""
NEEDED: Mapping[A | None, Sequence[str]] = {
    A.SD1: (CLIP_L,),
    A.SD2: (CLIP_H,),
    A.SDXL: (CLIP_L, CLIP_G),
    A.SDXL_REFINER: (CLIP_G,),
    A.SD3: (CLIP_L, CLIP_G, T5),
    A.FLUX: (CLIP_L, T5),
    A.CHROMA: (T5,),
    A.AURAFLOW: (T5,),
    A.WAN: (T5,),
    **dict.fromkeys((A.FLUX2, A.QWEN_IMAGE, A.Z_IMAGE, A.LUMINA2, A.KREA2, A.ANIMA, A.ERNIE_IMAGE), (LLM,)),
}
"""The text encoders that a model runs with. Sources: the pipelines in diffusers and the loaders of Forge and Neo."""

_WIDTHS = {768: CLIP_L, 1280: CLIP_G, 1024: CLIP_H}
_MARK = re.compile(
    r"(?P<prefix>(?:[^.]+\.)*?)(?:(?:text_model\.)?encoder\.layers\.\d+\.(?:self_attn|mlp)\.|transformer\.resblocks\.\d+\."
    r"|(?P<t5>encoder\.block\.\d+\.layer\.)"
    r"|(?P<llm>(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.\d+\.self_attn\.[qkvo]_proj\.))"
)
_CONTAINERS = re.compile(r"(?:(?:transformer|model|language_model)[._])+")
"""Containers around an encoder: ComfyUI and Forge keep one under `transformer.`, language models nest their layers."""
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
    LLM: (),
}
_LLMS = (
    "qwen3", "qwen3_06b", "qwen3_4b", "qwen3_8b", "qwen3vl_4b", "qwen25_7b", "gemma2", "gemma2_2b", "gemma3",
    "mistral3_24b", "ministral3", "ministral3_3b", "llama",
)  # fmt: skip
"""Names of language models in Forge Neo and ComfyUI."""
_T5S = ("t5", "t5xxl", "umt5", "umt5xxl")
_HINTS = {
    "te_": "te", "te1_": "te1", "te2_": "te2", "te3_": "te3", "prior_te_": "te",
    "text_encoder_": "te1", "text_encoder_2_": "te2", "text_encoder_3_": "te3",
    **{f"{before}{kind}_": kind for before in ("", "text_encoders_") for kind in (CLIP_L, CLIP_G, CLIP_H)},
    **{f"{before}{name}_": T5 for before in ("", "text_encoders_") for name in _T5S},
    **{f"{before}{name}_": LLM for before in ("", "text_encoders_") for name in _LLMS},
}  # fmt: skip
"""Maps the beginning of a flat name in a file to the encoder it addresses."""
HINTS = dict(sorted(_HINTS.items(), key=lambda item: -len(item[0])))
"""_HINTS, longest first."""
_HINT = re.compile("|".join(HINTS))

_LAYER = (
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def find_encoders(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Returns the prefix of every text encoder among the parameter names, with its kind: CLIP_L, CLIP_G, CLIP_H, CLIP,
    T5 or LLM.
    """
    found: dict[str, str] = {}
    for name in shapes:
        if ".layer" not in name and ".resblocks." not in name and not name.startswith("layers."):
            continue  # most names of a denoiser
        mark = _MARK.match(name)
        if mark and "vision" not in mark["prefix"]:
            found.setdefault(mark["prefix"], T5 if mark["t5"] else LLM if mark["llm"] else CLIP)
    return {prefix: _which_clip(shapes, prefix) if kind == CLIP else kind for prefix, kind in found.items()}


def missing_encoders(architecture: A | None, found: Iterable[str]) -> list[str]:
    """Returns the kinds of text encoders that a model of this architecture runs with and that were not found.

    Args:
        architecture: If it is not in NEEDED, or None, one encoder of any kind is enough; SD 3 counts its T5.
        found: Kinds, as `find_encoders` returns them.
    """
    kinds = set(found)
    if architecture not in NEEDED:
        return [] if kinds else [ANY]
    # A CLIP of unknown width may be each of the three.
    return [kind for kind in NEEDED[architecture] if kind not in kinds and (CLIP not in kinds or kind in (T5, LLM))]


def inside_containers(name: str) -> int:
    """Returns the length of the containers that a name inside an encoder begins with."""
    found = _CONTAINERS.match(name)
    return found.end() if found else 0


def hint_of(flat: str) -> str:
    """Returns the beginning of a flat name that names an encoder (a key of HINTS); "" if there is none."""
    found = _HINT.match(flat)
    return found[0] if found else ""


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
    if hint == "te1" and [p for p, kind in encoders.items() if kind not in (T5, LLM) and p]:
        wanted.append(CLIP_G)  # SDXL's refiner: the model's first and only CLIP; a lone module may be SDXL's second one
    clip = next((p for kind in wanted for p, found in encoders.items() if found == kind), None)
    others = (T5,) if hint == T5 else (LLM,) if hint == LLM else () if hint in (CLIP_L, CLIP_G, CLIP_H) else (T5, LLM)
    return [*([clip] if clip is not None else []), *(p for p, found in encoders.items() if found in others)]


def spellings(modules: Mapping[str, Shape], kind: str) -> Iterator[Spelling]:
    """Yields all module names of a text encoder of this kind; none for T5, whose modules have one name each."""
    if kind == LLM:
        for module in modules:
            atom = module[inside_containers(module) :]
            yield Spelling(module, (atom,))
            yield Spelling(atom, (atom,))
        yield from adapter_spellings(modules)
    elif kind != T5:
        yield from _clip_spellings(modules)


def _clip_spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    front = "text_model." if any(name.startswith("text_model.") for name in modules) else ""
    layers = numbers(modules, front + "encoder.layers") or numbers(modules, "transformer.resblocks")
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
