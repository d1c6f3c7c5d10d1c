"""Every published spelling of a LoRA for the models of 2025 and 2026, on both layouts, against diffusers' fused model.

`benchmarks/spellings.py` makes the table in docs/spellings.md of the same, with the older architectures too.
"""

import pytest
import torch
from support import spelled
from support.spelled import SPELLINGS, parts_of, read_back, trained

FAMILIES = ("Z-Image", "Lumina 2", "Krea 2", "Anima", "Wan", "ERNIE-Image")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_module_is_used_and_right(family, spelling, tmp_path):
    for in_diffusers in (False, True):
        found = read_back(family, spelling, tmp_path, in_diffusers=in_diffusers)
        assert found.modules > 15
        assert (found.used, found.refused) == (found.modules, "")
        assert found.error <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["bypass", "on_the_fly"])
@pytest.mark.parametrize("spelling", ["diffusers, PEFT: `transformer.`", "LyCORIS, SimpleTuner: LoKr, `lycoris_`"])
def test_every_layer_gives_the_same_without_merging(spelling, mode, family, tmp_path):
    """Names of diffusers on the authors' layout: modules that are rows of fused layers."""
    found = read_back(family, spelling, tmp_path, mode=mode)
    assert (found.used, found.refused) == (found.modules, "")
    assert found.error <= 1e-4


@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_the_layouts_have_the_same_parameters(family):
    """The reference is whole: converters and models of diffusers name the same, pad tokens aside, which have one name."""
    named = {part.name for inside in parts_of(family).values() for part in inside}
    assert trained(family).base.keys() - named <= {"x_pad_token", "cap_pad_token"}
    assert named <= trained(family).base.keys()
    assert any(part.name not in parts_of(family) for inside in parts_of(family).values() for part in inside)


def test_a_wrong_row_is_seen(tmp_path, monkeypatch):
    """Keys and values exchanged in the reference: the error is far above what the tests allow."""

    def exchanged(family, state):
        made = right(family, state)
        for name in [name for name in made if name.endswith("attention.qkv.weight")]:
            query, key, value = made[name].chunk(3)
            made[name] = torch.cat((query, value, key))
        return made

    right = spelled.original
    monkeypatch.setattr(spelled, "original", exchanged)
    for mode in ("merge", "bypass"):
        assert read_back("Z-Image", "diffusers, PEFT: `transformer.`", tmp_path, mode=mode).error > 0.1
