"""Module names of Krea 2, in the original layout (`blocks`, `txtfusion`) and that of diffusers.

Both layouts have the same modules under other names; modulations are parameters of their own. Sources: the parameter
names of Krea's checkpoints as Forge Neo (backend/nn/krea.py) and diffusers
(convert_krea2_transformer_checkpoint_to_diffusers) load them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..adapters.base import Shape
from .routes import Spelling, both_ways, numbers

_TOP = (
    ("first", "img_in"),
    ("tmlp.0", "time_embed.linear_1"),
    ("tmlp.2", "time_embed.linear_2"),
    ("tproj.1", "time_mod_proj"),
    ("txtmlp.0", "txt_in.norm"),
    ("txtmlp.1", "txt_in.linear_1"),
    ("txtmlp.3", "txt_in.linear_2"),
    ("txtfusion.projector", "text_fusion.projector"),
    ("last.linear", "final_layer.linear"),
    ("last.norm", "final_layer.norm"),
    ("last.modulation.lin", "final_layer.scale_shift_table"),
)
_STACKS = (
    ("blocks", "transformer_blocks"),
    ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"),
    ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"),
)
_BLOCK = (
    ("attn.wq", "attn.to_q"),
    ("attn.wk", "attn.to_k"),
    ("attn.wv", "attn.to_v"),
    ("attn.wo", "attn.to_out.0"),
    ("attn.gate", "attn.to_gate"),
    ("attn.qknorm.qnorm", "attn.norm_q"),
    ("attn.qknorm.knorm", "attn.norm_k"),
    ("mlp.gate", "ff.gate"),
    ("mlp.up", "ff.up"),
    ("mlp.down", "ff.down"),
    ("prenorm", "norm1"),
    ("postnorm", "norm2"),
    ("mod.lin", "scale_shift_table"),
)


def spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields all module names of a Krea 2 transformer; none for other models."""
    blocks = {names: numbers(modules, names[0]) or numbers(modules, names[1]) for names in _STACKS}
    if not any(_is_block(modules, names, n[0]) for names, n in blocks.items() if n):
        return
    for original, atom in _TOP:
        yield from both_ways(original, atom)
    for (theirs, ours), n in ((names, n) for names, found in blocks.items() for n in found):
        for original, atom in _BLOCK:
            yield from both_ways(f"{theirs}.{n}.{original}", f"{ours}.{n}.{atom}")


def _is_block(modules: Mapping[str, Shape], names: tuple[str, str], n: int) -> bool:
    return f"{names[0]}.{n}.attn.wq" in modules or f"{names[1]}.{n}.attn.to_gate" in modules
