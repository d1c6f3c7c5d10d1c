"""LoRA files: names of the trainers, our own memory, and what is said about files that are not LoRAs."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.make import host_value, rand, write_kohya

from lib_lora_guard.adapters import DiffAdapter, LohaAdapter, LokrAdapter, LoraAdapter, SetAdapter
from lib_lora_guard.adapters.files import parse_tensors, read_lora_file
from lib_lora_guard.errors import LoraFileError


def test_kohya_keys(tmp_path):
    write_kohya(tmp_path / "a.safetensors", {"lora_unet_blocks_0_proj": (8, 6)}, rank=4, alpha=2.0)
    file = read_lora_file(tmp_path / "a.safetensors")
    (((module, parameter), adapter),) = file.adapters.items()
    assert (module, parameter) == ("lora_unet_blocks_0_proj", "weight")
    assert isinstance(adapter, LoraAdapter)
    assert (adapter.up.shape, adapter.down.shape, adapter.alpha, adapter.scale) == ((8, 4), (4, 6), 2.0, 0.5)


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
def test_names_of_the_two_factors(up, down):
    tensors = {
        f"transformer.blocks.0.proj.{up}": rand(8, 4, seed=1),
        f"transformer.blocks.0.proj.{down}": rand(4, 6, seed=2),
    }
    adapter = parse_tensors(Path("x"), tensors).adapters["transformer.blocks.0.proj", "weight"]
    assert torch.equal(adapter.up, tensors[f"transformer.blocks.0.proj.{up}"])
    assert adapter.alpha is None


def test_lycoris_kinds_tucker_dora_and_bias():
    _, (w1a, w1b, alpha, w2a, w2b, *_) = host_value("loha", (8, 6), 1)
    _, (k1, _, _, _, _, k2a, k2b, *_) = (
        "lokr",
        (rand(2, 2, seed=1), None, 2.0, None, None, rand(4, 4, seed=2), rand(4, 3, seed=3), None, None),
    )
    tensors = {
        **{f"a.hada_{n}": t for n, t in (("w1_a", w1a), ("w1_b", w1b), ("w2_a", w2a), ("w2_b", w2b))},
        "a.alpha": torch.tensor(alpha),
        "b.lokr_w1": k1, "b.lokr_w2_a": k2a, "b.lokr_w2_b": k2b,
        "c.lora_up.weight": rand(8, 4, 1, 1, seed=1), "c.lora_down.weight": rand(4, 6, 1, 1, seed=2), "c.lora_mid.weight": rand(4, 4, 3, 3, seed=3), "c.dora_scale": rand(8, 1, seed=4),
        "d.diff": rand(8, 6, seed=5), "d.diff_b": rand(8, seed=6),
        "stray": rand(1, seed=7),
    }  # fmt: skip
    file = parse_tensors(Path("x"), tensors)
    kinds = {key: type(adapter) for key, adapter in file.adapters.items()}
    assert kinds == {
        ("a", "weight"): LohaAdapter,
        ("b", "weight"): LokrAdapter,
        ("c", "weight"): LoraAdapter,
        ("d", "weight"): DiffAdapter,
        ("d", "bias"): DiffAdapter,
    }
    assert file.adapters["a", "weight"].alpha == alpha
    assert file.adapters["c", "weight"].mid.shape == (4, 4, 3, 3)
    assert file.adapters["c", "weight"].magnitude.shape == (8, 1)
    assert file.unknown_keys == ("stray",)


def test_the_tensors_are_our_own_so_the_file_may_be_overwritten(tmp_path):
    path = tmp_path / "a.safetensors"
    write_kohya(path, {"m": (8, 6)}, seed=1)
    adapter = read_lora_file(path).adapters["m", "weight"]
    before = adapter.up.clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    os.truncate(path, 10)
    assert torch.equal(adapter.up, before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"PK\x03\x04aaaa", r"a\.ckpt: expected .*found a zip archive, as \.pt.*convert it to safetensors"),
        ("a.pt", b"\x80\x02aaaaaaaa", r"a\.pt: expected .*found a pickle.*convert it to safetensors"),
        ("a.safetensors", b"", r"a\.safetensors: expected .*found an empty one; download it again"),
        ("a.safetensors", b"\xff" * 64, "expected a safetensors or GGUF file"),
        ("a.safetensors", (10).to_bytes(8, "little") + b"{}", "download it again"),
    ],
)
def test_files_that_are_no_loras(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoraFileError, match=message):
        read_lora_file(tmp_path / name)


def test_a_missing_file_a_checkpoint_and_an_incomplete_lora(tmp_path):
    with pytest.raises(LoraFileError, match="no such file; check the name"):
        read_lora_file(tmp_path / "gone.safetensors")
    save_file({"model.weight": rand(2, 2, seed=1)}, str(tmp_path / "c.safetensors"))
    with pytest.raises(LoraFileError, match="no LoRA keys found among 1 tensors; is this a checkpoint"):
        read_lora_file(tmp_path / "c.safetensors")
    save_file({"m.lora_up.weight": rand(2, 2, seed=1)}, str(tmp_path / "i.safetensors"))
    with pytest.raises(LoraFileError, match=r"m is incomplete .*'down'"):
        read_lora_file(tmp_path / "i.safetensors")
    save_file(
        {"m.lora_up.weight": rand(2, 2, seed=1), "m.lokr_w1": rand(2, 2, seed=1)}, str(tmp_path / "b.safetensors")
    )
    with pytest.raises(LoraFileError, match="described as lokr and lora at once"):
        read_lora_file(tmp_path / "b.safetensors")


def test_values_that_are_no_numbers_and_scales_of_several_are_refused(tmp_path):
    broken = rand(8, 4, seed=1)
    broken[2, 2] = float("inf")
    save_file({"m.lora_up.weight": broken, "m.lora_down.weight": rand(4, 6, seed=2)}, str(tmp_path / "n.safetensors"))
    with pytest.raises(LoraFileError, match=r"n\.safetensors: m\.lora_up\.weight: it holds values that are not finite"):
        read_lora_file(tmp_path / "n.safetensors")
    with pytest.raises(LoraFileError, match=r"x: m\.alpha has 2 values instead of one"):
        parse_tensors(Path("x"), {"m.diff": rand(8, 4, seed=1), "m.alpha": torch.ones(2)})


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


def test_settings_of_peft_from_the_metadata_and_from_beside_the_file(tmp_path):
    up, down = rand(8, 4, seed=1), rand(4, 6, seed=2)
    tensors = {
        f"transformer.blocks.{n}.proj.{k}.weight": v.clone()
        for n in range(2)
        for k, v in (("lora_A", down), ("lora_B", up))
    }
    tensors |= {f"text_encoder.proj.{k}.weight": v.clone() for k, v in (("lora_A", down), ("lora_B", up))}
    settings = {
        "transformer.r": 4, "transformer.lora_alpha": 16, "transformer.use_rslora": True,
        "transformer.alpha_pattern": {"blocks.1.proj": 2},
        "text_encoder.lora_alpha": 3,
    }  # fmt: skip
    save_file(tensors, str(tmp_path / "d.safetensors"), metadata={"lora_adapter_metadata": json.dumps(settings)})
    file = read_lora_file(tmp_path / "d.safetensors")
    scales = {module: adapter.scale for (module, _), adapter in file.adapters.items()}
    assert scales == {"transformer.blocks.0.proj": 8.0, "transformer.blocks.1.proj": 1.0, "text_encoder.proj": 0.75}
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {"base_model.model.p.lora_A.weight": down, "base_model.model.p.lora_B.weight": up},
        str(folder / "adapter_model.safetensors"),
    )
    assert read_lora_file(folder / "adapter_model.safetensors").adapters["base_model.model.p", "weight"].alpha is None
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 6}', encoding="utf-8")
    assert read_lora_file(folder / "adapter_model.safetensors").adapters["base_model.model.p", "weight"].alpha == 6.0


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"lora_alpha": "many", "alpha_pattern": {"(a+)+$": 2}}'])
def test_settings_that_are_no_settings_are_left_out(tmp_path, text, caplog):
    tensors = {
        f"{'a' * 60}!.{k}": v for k, v in (("lora_A.weight", rand(4, 6, seed=1)), ("lora_B.weight", rand(8, 4, seed=2)))
    }
    save_file(tensors, str(tmp_path / "d.safetensors"), metadata={"lora_adapter_metadata": text})
    (adapter,) = read_lora_file(tmp_path / "d.safetensors").adapters.values()
    assert adapter.alpha is None
    assert ("not readable JSON" in caplog.text) == (not text.startswith('{"'))


def test_keys_that_say_a_thing_twice_and_factors_of_another_type_are_refused():
    up, down = rand(8, 4, seed=1), rand(4, 6, seed=2)
    twice = {"m.lora_up.weight": up, "m.lora_B.weight": up, "m.lora_down.weight": down}
    with pytest.raises(LoraFileError, match=r"x: m\.lora_up\.weight and m\.lora_B\.weight say the same thing twice"):
        parse_tensors(Path("x"), twice)
    whole = {"m.lora_up.weight": up.to(torch.int8), "m.lora_down.weight": down}
    with pytest.raises(LoraFileError, match=r"x: m\.lora_up\.weight: it is stored as torch\.int8, floating-point"):
        parse_tensors(Path("x"), whole)
    both = {"m.diff": down, "m.diff_b": up[0], "m.lora_B.bias": up[0]}
    with pytest.raises(LoraFileError, match=r"x: m has two changes of its bias"):
        parse_tensors(Path("x"), both)
    with pytest.raises(LoraFileError, match=r"x: a\?b<script> is incomplete"):
        parse_tensors(Path("x"), {"a\nb<script>.lora_up.weight": up})
