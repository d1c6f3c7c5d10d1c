"""Names of the models of 2025 and 2026 against diffusers' own converters of their checkpoints, row by row.

Forge Neo's layouts (`support.layouts_of_2025`) are the original ones; every name of each layout is tried on the other.
"""

import pytest
import torch
from diffusers.loaders import single_file_utils as checkpoints
from support.layout_names import check_both_ways
from support.layouts_of_2025 import cosmos, krea2, next_dit, wan
from support.original_layouts import Checkpoint

from lib_lora_guard.models import NameMap, Route

CASES = {
    # diffusers knows Lumina 2 in its real width alone
    "lumina 2": (next_dit(2304, 768, 2, 2, z_image=False), checkpoints.convert_lumina2_to_diffusers),
    "z-image": (next_dit(24, 24, 2, 2, z_image=True), checkpoints.convert_z_image_transformer_checkpoint_to_diffusers),
    "krea 2": (krea2(32, 16, 16, 2), checkpoints.convert_krea2_transformer_checkpoint_to_diffusers),
    "anima": (cosmos(24, 12, 2), checkpoints.convert_cosmos_transformer_checkpoint_to_diffusers),
    "wan": (wan(24, 10, 6, 2), checkpoints.convert_wan_transformer_to_diffusers),
}
OF_LAYERS = ("weight", "scale", "bias")


@pytest.mark.parametrize("case", CASES)
def test_every_row_in_both_directions(case):
    layers, convert = CASES[case]
    checkpoint = Checkpoint(layers)
    converted = convert(dict(checkpoint.tensors))
    of_layers = [name for name in converted if name.rpartition(".")[2] in OF_LAYERS]
    assert len(of_layers) > 40
    fused = sum(name.endswith("qkv.weight") for name in checkpoint.tensors)
    assert len(converted) == len(checkpoint.tensors) + 2 * fused
    check_both_ways(checkpoint, converted, "transformer", count=len(of_layers))


@pytest.mark.parametrize("case", ["krea 2", "wan"])
def test_parameters_outside_layers(case):
    layers, convert = {"krea 2": (krea2(32, 16, 16, 2), CASES[case][1]), "wan": (wan(24, 10, 6, 2), CASES[case][1])}[
        case
    ]
    checkpoint = Checkpoint(layers)
    originals = {name: ids for name, ids in checkpoint.tensors.items() if name.rpartition(".")[2] not in OF_LAYERS}
    assert len(originals) == 3
    names = NameMap({"diffusion_model." + name: shape for name, shape in checkpoint.shapes.items()})
    for original, ids in originals.items():
        ((theirs, moved),) = convert({original: ids}).items()
        assert torch.equal(moved.flatten(), ids)
        for written in (original, theirs):
            for spelled in (
                f"diffusion_model.{written}",
                f"transformer.{written}",
                written,
                "lora_unet_" + written.replace(".", "_"),
            ):
                assert names.routes(spelled) == (Route("diffusion_model." + original),), spelled
        assert names.parameter("diffusion_model." + original) == "diffusion_model." + original
