"""Our routes for whole LoRA files against diffusers' converters of such files."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils as lora_names
from support.original_layouts import SDXL, Checkpoint, bfl, ldm_unet

from lib_lora_guard.models import NameMap


def swapped(ids):
    return torch.cat(ids.chunk(2)[::-1])


def flat(name):
    return name.replace(".", "_")


def test_sgm_names_of_lora_files():
    """SDXL's attentions as kohya writes them, against diffusers' own renaming of LoRA keys."""
    checkpoint = Checkpoint(ldm_unet(**SDXL))
    keys = {f"lora_unet_{flat(k.rpartition('.')[0])}" for k in checkpoint.tensors if "transformer_blocks" in k}
    renamed = lora_names._maybe_map_sgm_blocks_to_diffusers({k: k for k in keys}, SimpleNamespace(layers_per_block=2))
    names = NameMap(checkpoint.shapes)
    assert len(renamed) == len(keys) > 100
    for diffusers, ldm in renamed.items():  # a later step of diffusers renames the blocks themselves
        for theirs, ours in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            diffusers = diffusers.replace(theirs, ours)
        assert "lora_unet_" in diffusers
        assert diffusers != ldm
        assert names.routes(diffusers) == names.routes(ldm) != ()


@pytest.fixture(scope="module")
def flux_dev():
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, about a class it makes itself
        model = FluxTransformer2DModel(guidance_embeds=True)
    return NameMap({name: tuple(p.shape) for name, p in model.named_parameters()})


def lora_of(checkpoint, up, down, spell):
    """`up` holds the row numbers, which a float32 still tells apart; `down` is all ones.

    Rank 2 because diffusers turns round the halves of `down` too, which is its own affair.
    """
    for key, ids in checkpoint.tensors.items():
        if key.endswith(".weight"):
            yield f"{spell(key.removesuffix('.weight'))}.{up}.weight", ids.float()
            yield f"{spell(key.removesuffix('.weight'))}.{down}.weight", torch.ones(2, checkpoint.shapes[key][1])


def compare_lora(names, converted, file, up, ending=".lora_B.weight"):
    """Each tensor of the file, cut by our routes, must be what diffusers made for that module."""
    modules = 0
    for key, ids in file.items():
        if key.endswith(f".{up}.weight"):
            routes = names.routes(key.removesuffix(f".{up}.weight"))
            assert routes, key
            for route in routes:
                piece = ids if route.source is None else route.source.of(ids)
                piece = swapped(piece) if route.swap_halves else piece
                target = [n for n in (route.module, "transformer." + route.module) if n + ending in converted]
                assert torch.equal(converted[target[0] + ending], piece), key
                modules += 1
    return modules


def test_kohya_flux_lora(flux_dev):
    checkpoint = Checkpoint(bfl(3072, 19, 38))
    file = dict(lora_of(checkpoint, "lora_up", "lora_down", lambda module: "lora_unet_" + flat(module)))
    converted = lora_names._convert_kohya_flux_lora_to_diffusers(copy.copy(file))
    # 19 double blocks of 14 modules, 38 single ones of 6, and the 10 around them
    assert compare_lora(flux_dev, converted, file, "lora_up") == 19 * 14 + 38 * 6 + 10


def test_bfl_control_lora(flux_dev):
    checkpoint = Checkpoint(bfl(3072, 19, 38))
    file = dict(lora_of(checkpoint, "lora_B", "lora_A", lambda module: module))
    scales = {key: ids for key, ids in checkpoint.tensors.items() if key.endswith(".scale")}
    converted = lora_names._convert_bfl_flux_control_lora_to_diffusers({**file, **scales})
    assert compare_lora(flux_dev, converted, file, "lora_B") == 19 * 14 + 38 * 6 + 10
    for key, ids in scales.items():
        (route,) = flux_dev.routes(key)
        assert torch.equal(converted["transformer." + flux_dev.parameter(route.module)], ids)


def test_xlabs_lora(flux_dev):
    rows = {"double_blocks.3.processor.qkv_lora1": 9216, "double_blocks.3.processor.qkv_lora2": 9216}
    rows |= {"double_blocks.3.processor.proj_lora1": 3072, "double_blocks.3.processor.proj_lora2": 3072}
    rows |= {"single_blocks.7.processor.qkv_lora": 9216, "single_blocks.7.processor.proj_lora": 3072}
    file = {f"{key}.up.weight": torch.rand(count, 1) for key, count in rows.items()}
    file |= {f"{key}.down.weight": torch.ones(1, 3072) for key in rows}
    converted = lora_names._convert_xlabs_flux_lora_to_diffusers(dict(file))
    assert compare_lora(flux_dev, converted, file, "up") == 3 + 3 + 1 + 1 + 3 + 1
