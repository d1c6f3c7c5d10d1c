"""Module names of Flux.2 (dev and Klein), in the original layout (`double_blocks`, `single_blocks`) and that of diffusers.

Sources: the parameter names of black-forest-labs' checkpoints as diffusers loads them
(convert_flux2_transformer_checkpoint_to_diffusers) and those of LoRA files (lora_conversion_utils.py).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from ..adapters.base import Shape
from .routes import Spelling, both_ways, numbers

_TOP = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    ("single_stream_modulation.lin", "single_stream_modulation.linear"),
    ("final_layer.linear", "proj_out"),
)
ATTENTION = (
    ("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("img_attn.proj", "attn.to_out.0"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
)
"""The attention of a double block, alike in Flux.1 and Flux.2."""
_DOUBLE = (
    *ATTENTION,
    ("img_mlp.0", "ff.linear_in"),
    ("img_mlp.2", "ff.linear_out"),
    ("txt_mlp.0", "ff_context.linear_in"),
    ("txt_mlp.2", "ff_context.linear_out"),
)
_SINGLE = (
    ("linear2", "attn.to_out"),
    ("norm.query_norm", "attn.norm_q"),
    ("norm.key_norm", "attn.norm_k"),
)
_FUSED = ("to_q", "to_k", "to_v", "proj_mlp")
"""The parts of `linear1`, which both layouts keep in one."""
_OWN = [
    f"{name}.{layer}"
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    for layer in ("lin", "linear")
]


def is_flux2(modules: Container[str]) -> bool:
    """True for the modules of a Flux.2 transformer: all its blocks share their modulations."""
    return any(name in modules for name in _OWN)


def spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields all module names of a Flux.2 transformer; none for other models."""
    if not is_flux2(modules):
        return
    for original, atom in _TOP:
        yield from both_ways(original, atom)
    yield Spelling("img_in.proj", ("x_embedder",))  # OneTrainer
    yield from both_ways("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    for n in numbers(modules, "double_blocks") or numbers(modules, "transformer_blocks"):
        block = f"transformer_blocks.{n}."
        for original, *atoms in _DOUBLE:
            yield from both_ways(f"double_blocks.{n}.{original}", *(block + atom for atom in atoms))
    for n in numbers(modules, "single_blocks") or numbers(modules, "single_transformer_blocks"):
        block = f"single_transformer_blocks.{n}."
        fused = tuple(f"{block}attn.{part}" for part in _FUSED)
        yield from both_ways(f"single_blocks.{n}.linear1", *fused)
        yield Spelling(block + "attn.to_qkv_mlp_proj", fused)
        yield Spelling(f"single_blocks.{n}.linear1_qkv", fused[:3])
        for original, atom in _SINGLE:
            yield from both_ways(f"single_blocks.{n}.{original}", block + atom)
