"""Module names of Stable Diffusion 3 and 3.5, in the original layout (`joint_blocks`) and that of diffusers.

Sources: the parameter names of Stability's checkpoints as Forge (backend/nn/mmditx.py) and diffusers
(convert_sd3_transformer_checkpoint_to_diffusers) load them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..adapters.base import Shape
from .routes import Spelling, both_ways, numbers

_TOP = (
    ("x_embedder.proj", "pos_embed.proj"),
    ("context_embedder", "context_embedder"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
)
_BLOCK = (
    ("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("x_block.attn.proj", "attn.to_out.0"),
    ("x_block.attn.ln_q", "attn.norm_q"),
    ("x_block.attn.ln_k", "attn.norm_k"),
    ("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
    ("x_block.attn2.proj", "attn2.to_out.0"),
    ("x_block.attn2.ln_q", "attn2.norm_q"),
    ("x_block.attn2.ln_k", "attn2.norm_k"),
    ("x_block.adaLN_modulation.1", "norm1.linear"),
    ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"),
    ("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("context_block.attn.proj", "attn.to_add_out"),
    ("context_block.attn.ln_q", "attn.norm_added_q"),
    ("context_block.attn.ln_k", "attn.norm_added_k"),
    ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
)


def spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields all module names of an SD3 transformer; none for other models."""
    joint = numbers(modules, "joint_blocks")
    if not joint and "pos_embed.proj" not in modules:
        return
    for original, atom in _TOP:
        yield from both_ways(original, atom)
    yield from both_ways("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    for n in joint or numbers(modules, "transformer_blocks"):
        block = f"transformer_blocks.{n}."
        for original, *atoms in _BLOCK:
            yield from both_ways(f"joint_blocks.{n}.{original}", *(block + atom for atom in atoms))
        original, atom = f"joint_blocks.{n}.context_block.adaLN_modulation.1", block + "norm1_context.linear"
        shape = modules.get(original, modules.get(atom, (0, 0)))
        # The last block has no gates here, only shift and scale, which diffusers swaps.
        yield from both_ways(original, atom, swapped=shape[0] == 2 * shape[1])
