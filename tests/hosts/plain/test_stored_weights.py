"""Model files as they are stored, with a LoRA on them through the public guard."""

import pytest
import torch
from safetensors.torch import save_file
from support.bnb_fixture import bnb_tensors
from support.make import Net, rand, write_kohya
from support.raw_files import gguf_bytes, info

from lib_lora_guard.errors import FileFormatError, ModeError
from lib_lora_guard.hosts.plain.guard import LoraGuard
from lib_lora_guard.hosts.plain.stored_weights import load_stored
from lib_lora_guard.weights import Q8_0Codec, ScaledFp8Codec, StoredLinear

PREFIX = "model.diffusion_model."
MODULES = {"lora_unet_blocks_0_qkv": (96, 32), "lora_unet_blocks_0_proj": (32, 32)}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def write_gguf(path, weights):
    """`{name: (weight, type number, bytes)}` as a GGUF file."""
    infos, data = [], b""
    for name, (weight, number, raw) in weights.items():
        infos.append(info(name, tuple(reversed(weight.shape)), number, len(data)))
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(gguf_bytes(infos=infos, data=data))


def with_lora(model, tmp_path, x, **mode):
    """Output without, with a LoRA, after removal; and the LoRA's deltas."""
    deltas = write_kohya(tmp_path / "style.safetensors", MODULES)
    base, guard = model(x).clone(), LoraGuard(model)
    report = guard.apply([(tmp_path / "style.safetensors", 0.8)], **mode)
    output = model(x).clone()
    guard.remove()
    assert torch.equal(model(x), base)
    return base, output, deltas, report


def wanted_output(dense, deltas, x):
    for module, delta in deltas.items():
        weight = getattr(dense.blocks[0], module.rpartition("_")[2]).weight
        weight.data += 0.8 * delta
    return dense(x)


@pytest.mark.parametrize("mode", ["auto", "on_the_fly"])
def test_gguf_blocks_stay_blocks_and_take_a_lora(tmp_path, mode):
    model, dense, codec = Net(seed=1), Net(seed=1), Q8_0Codec()
    weights = {}
    for name in ("qkv", "proj"):
        layer = getattr(dense.blocks[0], name)
        data = codec.encode(layer.weight)["data"]
        layer.weight.data = codec.decode({"data": data}, torch.float32)
        weights[f"{PREFIX}blocks.0.{name}.weight"] = (layer.weight, 8, data.numpy().tobytes())
    norm = rand(32, seed=4)
    dense.blocks[1].norm.weight.data = norm
    weights[f"{PREFIX}blocks.1.norm.weight"] = (norm, 0, norm.numpy().tobytes())
    weights["text_encoder.x"] = (norm, 0, norm.numpy().tobytes())
    write_gguf(tmp_path / "m.gguf", weights)
    assert load_stored(model, tmp_path / "m.gguf", PREFIX) == ["text_encoder.x"]
    stored = model.blocks[0].qkv
    assert isinstance(stored, StoredLinear)
    assert (stored.storage().format, stored.storage().bytes) == ("Q8_0", 96 * 34)
    x = rand(1, 16, 32, seed=5)
    assert torch.equal(model(x), dense(x))
    base, output, deltas, report = with_lora(model, tmp_path, x, mode=mode)
    wanted = wanted_output(dense, deltas, x)
    assert (output - wanted).norm() <= 1e-4 * (wanted - base).norm() + 1e-6 * wanted.norm()
    assert report.loras[0].used == 2
    with pytest.raises(ModeError, match="stored as Q8_0; merging would round most of the LoRA away"):
        with_lora(model, tmp_path, x, mode="merge")


def test_scaled_fp8_and_four_bits_of_bitsandbytes(tmp_path):
    model, dense = Net(seed=1), Net(seed=1)
    weight = dense.blocks[0].qkv.weight
    scale = weight.abs().max() / 448
    tensors = {
        "blocks.0.qkv.weight": (weight / scale).to(torch.float8_e4m3fn),
        "blocks.0.qkv.scale_weight": scale.reshape(1),
        "blocks.0.qkv.bias": dense.blocks[0].qkv.bias.data,
    }
    save_file(tensors, str(tmp_path / "m.safetensors"))
    assert load_stored(model, tmp_path / "m.safetensors") == []
    assert isinstance(model.blocks[0].qkv.codec, ScaledFp8Codec)
    dense.blocks[0].qkv.weight.data = tensors["blocks.0.qkv.weight"].float() * scale
    x = rand(1, 16, 32, seed=5)
    assert torch.equal(model(x), dense(x))

    bits = bnb_tensors("nf4")
    truth = bits.pop("dequantized")
    save_file({k.replace("x.weight", "0.weight"): v for k, v in bits.items()}, str(tmp_path / "b.safetensors"))
    layer = torch.nn.Sequential(torch.nn.Linear(48, 5, bias=False))
    assert load_stored(layer, tmp_path / "b.safetensors") == []
    x = rand(3, 48, seed=6)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, truth.float()))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"0.weight": rand(8, 8, seed=1)}, r"m\.safetensors: 0\.weight: expected \[4, 8\], found \[8, 8\]; this file is for"),
        ({"0.bias": rand(8, seed=1)}, r"m\.safetensors: 0\.bias: expected \[4\], found \[8\]"),
        ({"0.weight": torch.ones(4, 8, dtype=torch.int8)}, r"m\.safetensors: 0\.weight: expected plain .*, found I8; use another"),
    ],
)  # fmt: skip
def test_a_file_for_another_model_is_refused_with_key_and_sizes(tmp_path, tensors, message):
    save_file(tensors, str(tmp_path / "m.safetensors"))
    with pytest.raises(FileFormatError, match=message):
        load_stored(torch.nn.Sequential(torch.nn.Linear(8, 4)), tmp_path / "m.safetensors")


def test_a_gguf_type_that_cannot_be_decoded_is_named(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"0.weight": (torch.empty(4, 256), 16, b"\0" * (4 * 66))})
    with pytest.raises(
        FileFormatError, match=r"m\.gguf: 0\.weight: expected one of F32, .*, found IQ2_XXS; use another"
    ):
        load_stored(torch.nn.Sequential(torch.nn.Linear(256, 4)), tmp_path / "m.gguf")
