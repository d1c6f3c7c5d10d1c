"""Names and rows of one layout held against the other, through diffusers' own converters.

Each original checkpoint has a different number in every row (`original_layouts.Checkpoint`), so that a converted weight
shows which rows it was made of. Widths that do not change are 1; the shapes told to NameMap are the real ones.
"""

import re

import torch

from lib_lora_guard.models import NameMap


def swapped(ids):
    return torch.cat(ids.chunk(2)[::-1])


def said_by(names, routes, tensors, role):
    """The rows a file's tensor has to have, by our routes: each run of them from its place in the model."""
    rows = []
    for route in routes:
        ids = tensors[names.parameter(route.module, role)].flatten()
        ids = ids if route.part is None else route.part.of(ids)
        if route.source is not None:
            assert (route.source.dim, route.source.start) == (0, sum(map(len, rows)))
            assert route.source.length == len(ids)
        rows.append(swapped(ids) if route.swap_halves else ids)
    return torch.cat(rows)


def check(names, spell, truth, tensors):
    """`truth`: the other layout's tensors. Every one that is a module's weight or bias, in every spelling."""
    checked = 0
    for key, ids in truth.items():
        module, _, last = key.rpartition(".")
        if last in ("weight", "scale", "bias", "in_proj_weight", "in_proj_bias"):
            for name in spell(module):
                routes = names.routes(name)
                assert routes, f"{name} not found"
                role = "bias" if "bias" in last else "weight"
                assert torch.equal(said_by(names, routes, tensors, role), ids.flatten()), name
            checked += 1
    return checked


def flat(name):
    return name.replace(".", "_")


def as_diffusers(component):
    def spell(module):
        yield from (f"{component}.{module}", module, f"base_model.model.{module}", f"lycoris_{flat(module)}")
        yield from (f"lora_unet_{flat(module)}", f"lora_{component}_{flat(module)}")
        yield f"base_model.model.{component}.{module}"
        if found := re.search(r"\.(to_[qkv]|to_out\.0)$", module):
            yield f"{component}.{module[: found.start()]}.processor.{found[1].removesuffix('.0')}_lora"
            yield f"{component}.{module.removesuffix('.0')}"

    return spell


def as_original(module):
    yield from (f"diffusion_model.{module}", module, f"lora_unet_{flat(module)}", f"base_model.model.{module}")
    yield f"model.diffusion_model.{module}"


PREFIXES = ("", "diffusion_model.", "model.diffusion_model.")


def check_both_ways(checkpoint, converted, component, *, count):
    """Diffusers' names on the original model, the original's names on the diffusers model, own names on both."""
    converted = {name: ids for name, ids in converted.items() if name != "pos_embed.pos_embed"}
    for prefix in PREFIXES:
        own = {prefix + name: ids for name, ids in checkpoint.tensors.items()}
        names = NameMap({prefix + name: shape for name, shape in checkpoint.shapes.items()})
        spell = as_diffusers(component) if prefix == "diffusion_model." else lambda module: [f"{component}.{module}"]
        assert check(names, spell, converted, own) == count
        check(names, as_original, checkpoint.tensors, own)
    for prefix in ("", component + "."):
        own = {prefix + name: ids for name, ids in converted.items()}
        names = NameMap({prefix + name: shape for name, shape in checkpoint.shapes_of(converted).items()})
        check(names, as_original, checkpoint.tensors, own)
        check(names, as_diffusers(component), converted, own)
