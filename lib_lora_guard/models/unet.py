"""Module names of the U-Nets of SD 1.x, SD 2.x and SDXL, in the original layout (`input_blocks`) and that of diffusers.

The block layout is derived from the model's own names, so pruned and inpainting models need no configuration. Sources:
the parameter names of CompVis' and Stability's checkpoints as Forge (backend/nn/unet.py) and diffusers
(convert_ldm_unet_checkpoint) load them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..adapters.base import Shape
from .routes import Spelling, both_ways, numbers

_TOP = (
    ("input_blocks.0.0", "conv_in"),
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LABELS = ("add_embedding", "class_embedding")
"""The names of `label_emb` in diffusers: SDXL's size embedding, and the class embedding of SD 2.1 unCLIP."""


def spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields all module names of a U-Net; none for other models."""
    if numbers(modules, "input_blocks"):
        places = _from_original(modules)
    elif numbers(modules, "down_blocks"):
        places = _from_diffusers(modules)
    else:
        return
    for original, atom in _TOP:
        yield from both_ways(original, atom)
    own_label = next((label for label in _LABELS if label + ".linear_1" in modules), _LABELS[0])
    for original, number in (("label_emb.0.0", 1), ("label_emb.0.2", 2)):
        for name in (original, *(f"{label}.linear_{number}" for label in _LABELS)):
            yield Spelling(name, (f"{own_label}.linear_{number}",))
    blocks = dict(places)
    for module in modules:
        parts = module.split(".")
        for depth in range(2, len(parts) + 1):
            if (head := ".".join(parts[:depth])) in blocks:
                original, atom = blocks[head]
                yield from both_ways(*_inside(original, atom, module[len(head) :]))
                break


def _inside(original: str, atom: str, rest: str) -> tuple[str, str]:
    """Returns both names of a module inside a block: equal in attentions, different in residual blocks."""
    if ".resnets." in atom:
        for theirs, ours in _RESNET.items():
            if rest in ("." + theirs, "." + ours):
                return f"{original}.{theirs}", f"{atom}.{ours}"
    return original + rest, atom + rest


def _from_original(modules: Mapping[str, Shape]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields `(the model's own name of a block, (its original name, its diffusers name))`."""
    level, index = 0, 0
    for n in numbers(modules, "input_blocks")[1:]:
        block = f"input_blocks.{n}"
        if block + ".0.op" in modules:
            yield _own_first(block + ".0.op", f"down_blocks.{level}.downsamplers.0.conv")
            level, index = level + 1, 0
            continue
        yield _own_first(block + ".0", f"down_blocks.{level}.resnets.{index}")
        yield _own_first(block + ".1", f"down_blocks.{level}.attentions.{index}")
        index += 1
    for n in numbers(modules, "middle_block"):
        yield _own_first(*_middle(n))
    level, index = 0, 0
    for n in numbers(modules, "output_blocks"):
        block = f"output_blocks.{n}"
        yield _own_first(block + ".0", f"up_blocks.{level}.resnets.{index}")
        conv = next((c for c in (block + ".1.conv", block + ".2.conv") if c in modules), None)
        if conv != block + ".1.conv":
            yield _own_first(block + ".1", f"up_blocks.{level}.attentions.{index}")
        index += 1
        if conv is not None:
            yield _own_first(conv, f"up_blocks.{level}.upsamplers.0.conv")
            level, index = level + 1, 0


def _from_diffusers(modules: Mapping[str, Shape]) -> Iterator[tuple[str, tuple[str, str]]]:
    """As `_from_original`, for a model in diffusers' layout."""
    n = 1
    for level in numbers(modules, "down_blocks"):
        block = f"down_blocks.{level}"
        for index in numbers(modules, block + ".resnets"):
            yield _own_last(f"input_blocks.{n}.0", f"{block}.resnets.{index}")
            yield _own_last(f"input_blocks.{n}.1", f"{block}.attentions.{index}")
            n += 1
        if (conv := block + ".downsamplers.0.conv") in modules:
            yield _own_last(f"input_blocks.{n}.0.op", conv)
            n += 1
    resnets, attentions = (numbers(modules, f"mid_block.{kind}") for kind in ("resnets", "attentions"))
    for n in range(len(resnets) + len(attentions)):
        yield _own_last(*_middle(n))
    n = 0
    for level in numbers(modules, "up_blocks"):
        block = f"up_blocks.{level}"
        attentions = numbers(modules, block + ".attentions")
        for index in numbers(modules, block + ".resnets"):
            yield _own_last(f"output_blocks.{n}.0", f"{block}.resnets.{index}")
            yield _own_last(f"output_blocks.{n}.1", f"{block}.attentions.{index}")
            n += 1
        if (conv := block + ".upsamplers.0.conv") in modules:
            yield _own_last(f"output_blocks.{n - 1}.{2 if attentions else 1}.conv", conv)


def _middle(n: int) -> tuple[str, str]:
    return f"middle_block.{n}", f"mid_block.{('resnets', 'attentions')[n % 2]}.{n // 2}"


def _own_first(original: str, atom: str) -> tuple[str, tuple[str, str]]:
    return original, (original, atom)


def _own_last(original: str, atom: str) -> tuple[str, tuple[str, str]]:
    return atom, (original, atom)
