"""Names of tensors in LoRA files: which module, which kind, which field."""

from pathlib import Path

import pytest
import torch
from support.make import rand

from lib_lora_guard.adapters import SetAdapter
from lib_lora_guard.adapters.file_keys import meaning_of
from lib_lora_guard.adapters.files import parse_tensors


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ("lora_up.weight", "lora_down.weight"),
        ("lora_B.weight", "lora_A.weight"),
        ("lora_B.default.weight", "lora_A.default.weight"),
        ("lora_B.my style.weight", "lora_A.my style.weight"),
        ("lora.up.weight", "lora.down.weight"),
    ],
)
def test_the_two_factors_are_known_in_every_spelling(up, down):
    tensors = {
        f"transformer.blocks.0.proj.{up}": rand(8, 4, seed=1),
        f"transformer.blocks.0.proj.{down}": rand(4, 6, seed=2),
    }
    adapter = parse_tensors(Path("x"), tensors).adapters["transformer.blocks.0.proj", "weight"]
    assert torch.equal(adapter.up, tensors[f"transformer.blocks.0.proj.{up}"])
    assert adapter.alpha is None


def test_control_loras_of_bfl_carry_norms_and_biases():
    tensors = {
        "img_in.lora_A.weight": rand(2, 6, seed=1),
        "img_in.lora_B.weight": rand(8, 2, seed=2),
        "img_in.lora_B.bias": rand(8, seed=3),
        "single_blocks.0.norm.key_norm.scale": rand(8, seed=4),
    }
    file = parse_tensors(Path("x"), tensors)
    norm = file.adapters["single_blocks.0.norm.key_norm", "weight"]
    assert isinstance(norm, SetAdapter)
    assert torch.equal(norm.value, tensors["single_blocks.0.norm.key_norm.scale"])
    assert file.adapters["img_in", "bias"].scale == 1.0


def test_every_kind_of_the_trainers_gets_its_adapter():
    def t(*shape, n=1):
        return rand(*shape, seed=n, scale=0.1)

    tensors = {
        "oft.oft_blocks": t(2, 4, 4), "oft.alpha": torch.tensor(0.5), "oft.rescale": t(8, 1),
        "boft.oft_blocks": t(1, 2, 4, 4), "boft.alpha": torch.tensor(0.0),
        "base_model.model.poft.oft_R.weight": t(2, 3), "base_model.model.poft2.oft_R.default.weight": t(2, 3),
        "pboft.boft_R": t(1, 2, 4, 4), "pboft.boft_s": t(8, 1),
        "ia3.weight": t(8), "ia3.on_input": torch.tensor(0),
        "pia3.ia3_l": t(1, 8), "pia3out.ia3_l": t(8, 1),
        "glora.a1.weight": t(6, 2), "glora.a2.weight": t(2, 6), "glora.b1.weight": t(8, 2), "glora.b2.weight": t(2, 6), "glora.alpha": torch.tensor(1.0),
        "norm.w_norm": t(8), "norm.b_norm": t(8),
        "set.set_weight": t(8, 6),
        "b.lora_A.weight": t(2, 6), "b.lora_B.weight": t(8, 2), "b.lora_B.bias": t(8),
        "m.lora_A.weight": t(2, 6, 3, 3), "m.lora_B.weight": t(8, 2, 1, 1), "m.lora_magnitude_vector": t(1, 8, 1, 1),
        "x.processor.qkv_lora1.down.weight": t(2, 6), "x.processor.qkv_lora1.up.weight": t(8, 2),
        "y.processor.to_q_lora.down.weight": t(2, 6), "y.processor.to_q_lora.up.weight": t(8, 2),
        "te.lora_linear_layer.down.weight": t(2, 6), "te.lora_linear_layer.up.weight": t(8, 2),
        "bundle_emb.x.string_to_param.*": t(2, 6), "lonely.alpha": torch.tensor(1.0),
    }  # fmt: skip
    file = parse_tensors(Path("x"), tensors)
    kinds = {key: adapter.kind for key, adapter in file.adapters.items()}
    assert kinds == {
        ("oft", "weight"): "oft",
        ("boft", "weight"): "boft",
        ("base_model.model.poft", "weight"): "oft",
        ("base_model.model.poft2", "weight"): "oft",
        ("pboft", "weight"): "boft",
        ("ia3", "weight"): "ia3",
        ("pia3", "weight"): "ia3",
        ("pia3out", "weight"): "ia3",
        ("pia3out", "bias"): "ia3",
        ("glora", "weight"): "glora",
        ("norm", "weight"): "diff",
        ("norm", "bias"): "diff",
        ("set", "weight"): "set",
        ("b", "weight"): "lora",
        ("b", "bias"): "diff",
        ("m", "weight"): "lora",
        ("x.processor.qkv_lora1", "weight"): "lora",
        ("y.processor.to_q_lora", "weight"): "lora",
        ("te", "weight"): "lora",
    }
    get = file.adapters.__getitem__
    assert (get(("ia3", "weight")).on_input, get(("ia3", "weight")).centre) == (False, 0.0)
    assert (get(("pia3", "weight")).on_input, get(("pia3", "weight")).centre) == (True, 1.0)
    assert get(("pia3out", "weight")).on_input is False
    assert get(("oft", "weight")).alpha == 0.5
    assert get(("m", "weight")).magnitude.shape == (8,), "PEFT's magnitudes are those of the rows"
    assert file.unknown_keys == ("bundle_emb.x.string_to_param.*", "lonely.alpha")


@pytest.mark.parametrize(
    ("key", "module", "kind", "field"),
    [
        ("a.b.lora_linear_layer.up.weight", "a.b", "lora", "up"),
        ("a.lora_A.weight.weight", "a", "lora", "down"),
        ("a.lora_B.style.bias", "a", "lora_bias", "diff"),
        ("a.hada_w1_a.default", "a", "loha", "w1a"),
        ("a.oft_R.default.weight", "a", "peft_oft", "packed"),
        ("a.boft_s.default", "a", "peft_boft", "factor"),
        ("a.lora_magnitude_vector.default.weight", "a", None, "row_magnitude"),
        ("a.lora_magnitude_vector.default", "a", None, "row_magnitude"),
        ("a.dora_scale", "a", None, "magnitude"),
        ("a.to_q_lora.up.weight", "a.to_q_lora", "lora", "up"),
        (".lora_up.weight", "", "lora", "up"),
        ("a.lora_A", "a", "lora", "down"),
        ("a.magnitude", "a", None, "row_magnitude"),
        ("a.lora_embedding_A", "a", "lora_embedding", "first"),
        # OneTrainer's LoHa without any dot before the field, and the like.
        ("a_b_hada_w1_a", "a_b", "loha", "w1a"),
        ("a_lora_A.weight", "a", "lora", "down"),
        ("a_lora_down_weight", "a", "lora", "down"),
        ("a_b_alpha", "a_b", None, "alpha"),
        ("a_dora_scale", "a", None, "magnitude"),
    ],
)
def test_the_end_of_a_name_tells_kind_and_field(key, module, kind, field):
    meaning = meaning_of(key)
    assert (meaning.module, meaning.kind and meaning.kind.name, meaning.field) == (module, kind, field)


@pytest.mark.parametrize(
    "key",
    ["", "weight", "a.weight", "lora_up.weight", "a.lora_A..weight", "a.lora_up.style.weight", "a.boft_R.weight", "a.lora_A.a.b.weight", "a.b_alpha", "a.poly_lora_A", "a.supertuning_lora_A.weight", "_hada_w1_a"],
)  # fmt: skip
def test_what_ends_otherwise_is_no_lora_key(key):
    assert meaning_of(key) is None


def test_a_weight_is_an_ia3_only_beside_its_on_input():
    assert meaning_of("a.weight", {"a.weight"}) is None
    meaning = meaning_of("a.weight", {"a.weight", "a.on_input"})
    assert (meaning.module, meaning.kind.name, meaning.field) == ("a", "ia3", "weight")
