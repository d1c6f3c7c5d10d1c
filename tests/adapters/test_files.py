"""LoRA files: adapters by module, memory of our own, and the sentences about files that are no LoRAs."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.make import host_value, rand, write_kohya

from lib_lora_guard.adapters import DiffAdapter, LohaAdapter, LokrAdapter, LoraAdapter
from lib_lora_guard.adapters.files import parse_tensors, read_lora_file
from lib_lora_guard.errors import LoraFileError


def test_a_kohya_file_is_one_adapter_a_module(tmp_path):
    write_kohya(tmp_path / "a.safetensors", {"lora_unet_blocks_0_proj": (8, 6)}, rank=4, alpha=2.0)
    file = read_lora_file(tmp_path / "a.safetensors")
    (((module, parameter), adapter),) = file.adapters.items()
    assert (module, parameter) == ("lora_unet_blocks_0_proj", "weight")
    assert isinstance(adapter, LoraAdapter)
    assert (adapter.up.shape, adapter.down.shape, adapter.alpha, adapter.scale) == ((8, 4), (4, 6), 2.0, 0.5)


def test_a_file_may_mix_kinds_cores_magnitudes_and_biases():
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
def test_what_is_no_lora_is_refused_with_its_name_and_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoraFileError, match=message):
        read_lora_file(tmp_path / name)


def test_a_missing_file_a_checkpoint_and_an_incomplete_lora_are_refused(tmp_path):
    with pytest.raises(LoraFileError, match="no such file; check its name and folder"):
        read_lora_file(tmp_path / "gone.safetensors")
    save_file({"model.weight": rand(2, 2, seed=1)}, str(tmp_path / "c.safetensors"))
    with pytest.raises(
        LoraFileError,
        match=r"no LoRA keys found among 1 tensors \(first: model\.weight\), so it can change nothing; load a checkpoint",
    ):
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
