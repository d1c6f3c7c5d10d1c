"""Layers that hold a weight as its file stores it, and the guard on them."""

import pytest
import torch
from support.bnb_fixture import bnb_tensors
from support.make import rand, write_kohya
from support.measure import assert_same, same_bits
from weights.test_gguf_blocks import matrix

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import FileFormatError, ModeError
from lib_lora_guard.weights import GGUF_DECODERS, ScaledFp8Codec, StoredLinear
from lib_lora_guard.weights.bnb4 import from_file_parts


def stored(name):
    """A layer from a file's parts."""
    if name in ("nf4", "fp4"):
        decoder, parts = from_file_parts(bnb_tensors(name), "x.weight")
        shape = decoder.shape
    elif name == "fp8":
        decoder, shape = ScaledFp8Codec(), (8, 32)
        parts = {"data": rand(8, 32, seed=1).to(torch.float8_e4m3fn), "scale": torch.tensor(0.02)}
    else:
        decoder = GGUF_DECODERS[name]
        parts, values = matrix(name, rows=8, blocks=1)
        shape = tuple(values.shape)
    return StoredLinear.from_parts(decoder, parts, shape, rand(shape[0], seed=2)), parts, shape


each = pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS", "Q5_1", "nf4", "fp4", "fp8"])


@each
def test_a_stored_layer_holds_its_parts_and_answers_like_its_decoded_weight(name):
    layer, parts, shape = stored(name)
    assert {k: v.data_ptr() for k, v in layer.parts().items()} == {k: v.data_ptr() for k, v in parts.items()}
    assert (layer.out_features, layer.in_features) == shape
    weight, x = layer.decode(torch.float32), rand(3, shape[1], seed=3)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
    assert same_bits(layer.decode_rows(2, 3, torch.float32), weight[2:5])
    size = sum(part.numel() * part.element_size() for part in parts.values())
    assert layer.storage() == type(layer.storage())(name, shape, size, wide=False)


@each
@pytest.mark.parametrize("mode", ["auto", "on_the_fly"])
def test_the_guard_works_on_it(name, mode, tmp_path):
    layer, _, shape = stored(name)
    model, x = torch.nn.ModuleDict({"proj": layer}), rand(3, shape[1], seed=3)
    deltas = write_kohya(tmp_path / "a.safetensors", {"lora_unet_proj": shape}, seed=1)
    base, bits = layer(x), {k: v.clone() for k, v in layer.parts().items()}
    weight = layer.decode(torch.float32) + 0.7 * deltas["lora_unet_proj"]
    guard = LoraGuard(model)
    report = guard.apply([(tmp_path / "a.safetensors", 0.7)], mode=mode)
    assert dict(report.loras[0].modes) == {"bypass" if mode == "auto" else mode: 1}
    assert_same(layer(x), torch.nn.functional.linear(x, weight, layer.bias), base)
    guard.remove()
    assert torch.equal(layer(x), base)
    assert all(torch.equal(value.float(), bits[key].float()) for key, value in layer.parts().items())


@pytest.mark.parametrize("name", ["Q4_K", "nf4"])
def test_merging_into_a_format_that_can_only_be_read_is_refused(name, tmp_path):
    layer, _, shape = stored(name)
    write_kohya(tmp_path / "a.safetensors", {"lora_unet_proj": shape})
    model = torch.nn.ModuleDict({"proj": layer})
    with pytest.raises(ModeError, match=rf"proj\.weight: stored as {name}; merging would round"):
        LoraGuard(model).apply([(tmp_path / "a.safetensors", 1.0)], mode="merge")
    with pytest.raises(ModeError, match=f"stored as {name}, which can be read but not made here"):
        layer.store(layer.decode(torch.float32))


def test_a_plain_weight_from_bytes_is_a_wide_weight_that_can_be_merged_into(tmp_path):
    layer, parts, shape = stored("F32")
    assert parts["data"].dtype == torch.uint8
    assert (layer.storage().wide, layer.storage().format, layer.weight.dtype) == (True, "F32", torch.float32)
    deltas = write_kohya(tmp_path / "a.safetensors", {"lora_unet_proj": shape})
    before = layer.decode(torch.float32).clone()
    model = torch.nn.ModuleDict({"proj": layer})
    guard = LoraGuard(model)
    guard.apply([(tmp_path / "a.safetensors", 1.0)], mode="merge")
    assert_same(layer.decode(torch.float32), before + deltas["lora_unet_proj"], before)
    guard.remove()
    assert same_bits(layer.decode(torch.float32), before)


def test_parts_of_another_shape_are_refused():
    parts, _ = matrix("Q4_K", rows=2, blocks=1)
    with pytest.raises(FileFormatError, match=r"^Q4_K: expected a weight of \[2, 512\], found \[2, 256\]$"):
        StoredLinear.from_parts(GGUF_DECODERS["Q4_K"], parts, (2, 512), None)
