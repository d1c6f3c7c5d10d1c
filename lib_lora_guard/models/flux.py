"""Module names of Flux.1 and Chroma, in the original layout (`double_blocks`, `single_blocks`) and that of diffusers.

Sources: the parameter names of black-forest-labs' checkpoints as Forge (backend/nn/flux.py, chroma.py) and diffusers
(convert_flux_transformer_checkpoint_to_diffusers) load them. Chroma has a `distilled_guidance_layer` instead of
modulations. Names of modules that a model lacks are never looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

from ..adapters.base import Shape
from . import flux2
from .routes import Spelling, both_ways, numbers

_TOP = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
)
_DOUBLE = (
    ("img_mod.lin", "norm1.linear"),
    ("txt_mod.lin", "norm1_context.linear"),
    *flux2.ATTENTION,
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
)
_SINGLE = (
    ("modulation.lin", "norm.linear"),
    ("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("linear2", "proj_out"),
    ("norm.query_norm", "attn.norm_q"),
    ("norm.key_norm", "attn.norm_k"),
)
_XLABS = {"qkv_lora1": 2, "qkv_lora2": 3, "proj_lora1": 4, "proj_lora2": 5}
"""Maps XLabs' names inside a double block ("processor." removed) to the row of _DOUBLE with its atoms (1: image, 2:
text).
"""


def spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields all module names of a Flux or Chroma transformer; none for other models."""
    if flux2.is_flux2(modules):
        return
    single = {*numbers(modules, "single_blocks"), *numbers(modules, "single_transformer_blocks")}
    double = numbers(modules, "double_blocks")
    if not single and not double:
        return
    for original, atom in _TOP:
        yield from both_ways(original, atom)
    yield Spelling("img_in.proj", ("x_embedder",))  # OneTrainer
    yield from both_ways("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    for n in double or numbers(modules, "transformer_blocks"):
        yield from _double_block(n)
    for n in single:
        yield from _single_block(n)
    guidance = "distilled_guidance_layer."
    for n in numbers(modules, guidance + "layers"):
        for original, atom in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
            yield from both_ways(f"{guidance}layers.{n}.{original}", f"{guidance}layers.{n}.{atom}")


@lru_cache(maxsize=128)
def _double_block(n: int) -> tuple[Spelling, ...]:
    block, made = f"transformer_blocks.{n}.", list[Spelling]()
    for original, *atoms in _DOUBLE:
        made += both_ways(f"double_blocks.{n}.{original}", *[block + atom for atom in atoms])
    for name, row in _XLABS.items():
        made.append(Spelling(f"double_blocks.{n}.{name}", tuple(block + atom for atom in _DOUBLE[row][1:])))
    return tuple(made)


@lru_cache(maxsize=128)
def _single_block(n: int) -> tuple[Spelling, ...]:
    block, made = f"single_transformer_blocks.{n}.", list[Spelling]()
    for original, *atoms in _SINGLE:
        made += both_ways(f"single_blocks.{n}.{original}", *[block + atom for atom in atoms])
    attention = tuple(f"{block}attn.to_{x}" for x in "qkv")
    for name in ("qkv", "linear1_qkv"):  # XLabs, and USO as ComfyUI saves it
        made.append(Spelling(f"single_blocks.{n}.{name}", attention))
    made.append(Spelling(f"single_blocks.{n}.proj", (block + "proj_out",)))
    return tuple(made)
