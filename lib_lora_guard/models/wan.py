"""Module names of Wan 2.1 and 2.2, in the original layout (`self_attn`, `cross_attn`) and that of diffusers.

Both layouts call the blocks `blocks`; norm2 of diffusers is norm3 of the original. Modulations are parameters of their
own. Sources: the parameter names of Wan-AI's checkpoints as Forge Neo (backend/nn/wan.py) and diffusers
(convert_wan_transformer_to_diffusers) load them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..adapters.base import Shape
from .routes import Spelling, both_ways, numbers

_TOP = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)
_ATTENTION = (
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
    ("k_img", "add_k_proj"),
    ("v_img", "add_v_proj"),
    ("norm_k_img", "norm_added_k"),
)
_BLOCK = (
    *((f"self_attn.{theirs}", f"attn1.{ours}") for theirs, ours in _ATTENTION[:6]),
    *((f"cross_attn.{theirs}", f"attn2.{ours}") for theirs, ours in _ATTENTION),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),
    ("modulation", "scale_shift_table"),
    ("before_proj", "proj_in"),
    ("after_proj", "proj_out"),
)
"""The last two stand only in the blocks of VACE."""


def spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields all module names of a Wan transformer; none for other models."""
    blocks = numbers(modules, "blocks")
    if not blocks or not any(f"blocks.{blocks[0]}.{name}" in modules for name in ("self_attn.q", "attn1.to_q")):
        return
    for original, atom in _TOP:
        yield from both_ways(original, atom)
    for stack, found in (("blocks", blocks), ("vace_blocks", numbers(modules, "vace_blocks"))):
        for n in found:
            for original, atom in _BLOCK:
                yield from both_ways(f"{stack}.{n}.{original}", f"{stack}.{n}.{atom}")
