"""Module names of Lumina 2 and Z-Image: one transformer in two widths, with one original layout and two of diffusers.

The original layout fuses query, key and value in `attention.qkv`; both layouts of diffusers have them apart. Trainers of
Z-Image write diffusers' names under every prefix. Sources: the parameter names of Alpha-VLLM's and Tongyi-MAI's
checkpoints as Forge Neo (backend/nn/lumina.py) and diffusers (convert_lumina2_to_diffusers,
convert_z_image_transformer_checkpoint_to_diffusers) load them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..adapters.base import Shape
from .routes import Spelling, both_ways, numbers

_TOP = (
    ("x_embedder", "all_x_embedder.2-1", "x_embedder"),
    ("t_embedder.mlp.0", "t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    ("cap_embedder.0", "cap_embedder.0", "time_caption_embed.caption_embedder.0"),
    ("cap_embedder.1", "cap_embedder.1", "time_caption_embed.caption_embedder.1"),
    ("final_layer.linear", "all_final_layer.2-1.linear", "norm_out.linear_2"),
    ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1", "norm_out.linear_1"),
)
"""The original name, that of diffusers' Z-Image (the atom), that of diffusers' Lumina 2."""
_STACKS = ("noise_refiner", "context_refiner", "layers")
_QKV = "attention.qkv"
_BLOCK = (
    ("attention.out", "attention.to_out.0", "attn.to_out.0"),
    ("attention.q_norm", "attention.norm_q", "attn.norm_q"),
    ("attention.k_norm", "attention.norm_k", "attn.norm_k"),
    ("feed_forward.w1", "feed_forward.w1", "feed_forward.linear_1"),
    ("feed_forward.w2", "feed_forward.w2", "feed_forward.linear_2"),
    ("feed_forward.w3", "feed_forward.w3", "feed_forward.linear_3"),
    ("attention_norm2", "attention_norm2", "norm2"),
    ("adaLN_modulation.0", "adaLN_modulation.0", "adaLN_modulation.0"),
    ("adaLN_modulation.1", "adaLN_modulation.1", "norm1.linear"),
)
"""Z-Image's modulation is `.0`, Lumina's `.1`."""


def spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields all module names of a Lumina 2 or Z-Image transformer; none for other models."""
    blocks = {stack: numbers(modules, stack) for stack in _STACKS}
    if not any(_is_block(modules, f"{stack}.{n[0]}.") for stack, n in blocks.items() if n):
        return
    for original, atom, other in _TOP:
        yield from both_ways(original, atom)
        yield Spelling(other, (atom,))
    for stack, n in ((stack, n) for stack, found in blocks.items() for n in found):
        block = f"{stack}.{n}."
        atoms = tuple(f"{block}attention.to_{x}" for x in "qkv")
        yield from both_ways(block + _QKV, *atoms)
        for atom, letter in zip(atoms, "qkv", strict=True):
            yield Spelling(f"{block}attn.to_{letter}", (atom,))
        for original, atom, other in _BLOCK:
            yield from both_ways(block + original, block + atom)
            yield Spelling(block + other, (block + atom,))
        # The refiner of the text has no modulation: there the norm stands alone in diffusers' Lumina 2.
        norm = "norm1" if stack == "context_refiner" else "norm1.norm"
        yield from both_ways(block + "attention_norm1", block + "attention_norm1")
        yield Spelling(block + norm, (block + "attention_norm1",))


def _is_block(modules: Mapping[str, Shape], block: str) -> bool:
    return any(block + name in modules for name in (_QKV, "attention.to_q", "attn.to_q"))
