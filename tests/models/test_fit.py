"""The part of a LoRA file that a model can use: one rule for everything that asks."""

import pytest
import torch
from safetensors.torch import save_file
from support.make import rand

from lib_lora_guard import LoraGuard
from lib_lora_guard.adapters.files import read_lora_file
from lib_lora_guard.models import NameMap, fit
from lib_lora_guard.models.architecture import Architecture
from lib_lora_guard.models.fit import Target, fit_file, fit_terms

SHAPES = {"proj.weight": (8, 4), "proj.bias": (8,), "out.weight": (4, 8)}


def lora(out, inner, rank=2, seed=1):
    return {"lora_up.weight": rand(out, rank, seed=seed), "lora_down.weight": rand(rank, inner, seed=seed + 1)}


def read(tmp_path, modules):
    tensors = {f"{module}.{key}": value for module, keys in modules.items() for key, value in keys.items()}
    save_file(tensors, tmp_path / "one.safetensors")
    return read_lora_file(tmp_path / "one.safetensors")


def test_terms_that_fit_are_counted_and_carry_strength_and_origin(tmp_path):
    found = fit_file(read(tmp_path, {"proj": lora(8, 4), "out": lora(4, 8)}), Target(SHAPES), 0.5, origin=3)
    assert (found.refused, found.skipped, found.lost, found.used) == (None, [], [], 2)
    assert [(t.strength, t.origin) for terms in found.terms.values() for t in terms] == [(0.5, 3), (0.5, 3)]


def test_modules_that_the_model_lacks_are_skipped_and_the_rest_is_used(tmp_path):
    found = fit_file(read(tmp_path, {"proj": lora(8, 4), "elsewhere": lora(4, 8)}), Target(SHAPES))
    assert (found.refused, found.skipped, found.used) == (None, ["elsewhere.weight"], 1)
    assert list(found.terms) == ["proj.weight"]


def test_one_low_rank_term_of_the_wrong_shape_refuses_the_file(tmp_path):
    found = fit_file(read(tmp_path, {"proj": lora(8, 4), "out": lora(4, 6)}), Target(SHAPES))
    assert found.refused == (
        "made for another model: out.weight: up @ down gives [4, 6], the weight is [4, 8]; use a LoRA made for this model"
    )
    assert (found.terms, found.used) == ({}, 0)


def test_a_difference_of_the_wrong_size_is_lost_alone(tmp_path):
    found = fit_file(read(tmp_path, {"proj": {**lora(8, 4), "diff_b": rand(5, seed=3)}}), Target(SHAPES))
    assert (found.refused, list(found.terms), found.used) == (None, ["proj.weight"], 1)
    assert found.lost == ["proj.bias: diff gives [5], the weight is [8]"]


def test_a_file_for_another_architecture_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "detect_model", lambda shapes: Architecture.FLUX)
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    found = fit_file(read(tmp_path, {key: lora(640, 2048)}), Target(SHAPES))
    assert found.refused == "made for SDXL, this is Flux; use a LoRA for Flux, or load a SDXL model"


def test_terms_of_a_parameter_that_is_not_there_are_skipped(tmp_path):
    terms = fit_file(read(tmp_path, {"proj": lora(8, 4)}), Target(SHAPES)).terms
    found = fit_terms({**terms, "gone.weight": terms["proj.weight"], "empty.weight": []}, SHAPES)
    assert (list(found.terms), found.skipped) == (["proj.weight"], ["gone.weight"])


def test_an_error_inside_a_check_refuses_the_file_as_damaged(tmp_path):
    terms = fit_file(read(tmp_path, {"proj": lora(8, 4)}), Target(SHAPES)).terms

    class Broken:
        kind = "lora"
        alpha = None

        def check(self, shape, *, may_expand):
            raise RuntimeError("shapes cannot be multiplied")

    object.__setattr__(terms["proj.weight"][0], "adapter", Broken())
    found = fit_terms(terms, SHAPES)
    assert "proj.weight" in found.refused
    assert "damaged" in found.refused
    assert "shapes cannot be multiplied" in found.refused


@pytest.mark.parametrize("mode", ["auto", "merge"])
def test_a_lora_fits_an_input_projection_that_another_lora_has_widened(tmp_path, mode):
    model = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 8, 3)}).requires_grad_(False)
    before = model["conv_in"].weight.clone()
    up, down = rand(8, 2, 1, 1, seed=1), rand(2, 4, 3, 3, seed=2)
    save_file({"conv_in.diff": rand(8, 9, 3, 3, seed=5)}, tmp_path / "wide.safetensors")
    save_file({"conv_in.lora_up.weight": up, "conv_in.lora_down.weight": down}, tmp_path / "style.safetensors")
    guard = LoraGuard(model)
    guard.apply([(tmp_path / "wide.safetensors", 1.0)], mode="merge")
    assert model["conv_in"].weight.shape == (8, 9, 3, 3)
    report = guard.apply([(tmp_path / "style.safetensors", 1.0)], mode=mode)
    assert report.loras[0].used == 1
    guard.remove()
    assert torch.equal(model["conv_in"].weight, before)


def test_the_names_of_a_model_are_worked_out_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(fit, "NameMap", lambda shapes: made.append(1) or NameMap(shapes))
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 8), "out": torch.nn.Linear(8, 4)}).requires_grad_(False)
    path = read(tmp_path, {"proj": lora(8, 4)}).path
    guard = LoraGuard(model)
    for strength in (1.0, 0.5, 0.2):
        guard.apply([(path, strength)])
    guard.remove()
    assert made == [1]
    model["more"] = torch.nn.Linear(4, 4)
    guard.apply([(path, 1.0)])
    guard.remove()
    assert made == [1, 1]
