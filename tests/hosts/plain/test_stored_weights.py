"""Model files as they are stored, with a LoRA on them through the public guard."""

import re

import pytest
import torch
from safetensors.torch import save_file
from support.bnb_fixture import bnb_tensors
from support.make import Net, rand, write_kohya
from support.raw_files import entry, gguf_bytes, info, safetensors_bytes

from lib_lora_guard import cli
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


E4M3 = torch.float8_e4m3fn


def fp8(weight):
    scale = weight.abs().max() / 448
    return (weight / scale).to(E4M3), scale


@pytest.mark.parametrize("beside", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("mode", ["auto", "on_the_fly"])
def test_weight_scale_of_comfyui_is_heeded_with_a_lora(tmp_path, beside, mode):
    model, dense, tensors = Net(seed=1), Net(seed=1), {}
    for name in ("qkv", "proj"):
        layer = getattr(dense.blocks[0], name)
        data, scale = fp8(layer.weight)
        tensors |= {f"blocks.0.{name}.weight": data, f"blocks.0.{name}.{beside}": scale}
        if beside == "weight_scale":
            marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            tensors |= {f"blocks.0.{name}.comfy_quant": marker, f"blocks.0.{name}.input_scale": torch.tensor(0.5)}
        layer.weight.data = data.float() * scale
    save_file(tensors, tmp_path / "m.safetensors")
    assert load_stored(model, tmp_path / "m.safetensors") == []
    x = rand(1, 16, 32, seed=5)
    assert torch.equal(model(x), dense(x))
    base, output, deltas, _ = with_lora(model, tmp_path, x, mode=mode)
    wanted = wanted_output(dense, deltas, x)
    assert (output - wanted).norm() <= 1e-4 * (wanted - base).norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("by_row", [False, True])
def test_scale_weight_beside_a_weight_in_16_bits_is_multiplied(tmp_path, dtype, by_row):
    weight, scale = rand(4, 8, seed=1).to(dtype), rand(4 if by_row else 1, seed=2).abs() * 1e-3
    save_file({"0.weight": weight, "0.scale_weight": scale}, tmp_path / "m.safetensors")
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    assert load_stored(model, tmp_path / "m.safetensors") == []
    x = rand(3, 8, seed=3)
    wanted = x.double() @ (weight.double() * scale.double().reshape(-1, 1)).t()
    assert (model(x).double() - wanted).norm() <= 1e-6 * wanted.norm()


OTHER_SCALES = {
    "weight_scale": torch.ones(4, 1, dtype=torch.float32),
    "weight_scale_inv": torch.ones(1),
    "scale": torch.ones(4, 1),
    "scale_b": torch.ones(1),
    "weight._scale": torch.ones(1),
    "weight.scale": torch.ones(1),
    "zero_point": torch.ones(4),
    "weight_scale_2": torch.ones(1),
}


@pytest.mark.parametrize("beside", OTHER_SCALES)
@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2, torch.int8, torch.uint8])
def test_a_scale_of_another_name_is_never_taken_for_one(tmp_path, capsys, dtype, beside):
    """One rule: loading, planning, inspecting and baking refuse the file by the scale's name."""
    weight = torch.ones(4, 8).to(dtype)
    save_file({"0.weight": weight, f"0.{beside}": OTHER_SCALES[beside]}, tmp_path / "m.safetensors")
    said = f"m.safetensors: 0.{beside}: expected no scales but scale_weight, or one weight_scale of fp8 numbers, found this one of "
    with pytest.raises(FileFormatError, match=re.escape(said)):
        load_stored(torch.nn.Sequential(torch.nn.Linear(8, 4)), tmp_path / "m.safetensors")
    save_file(
        {"0.lora_up.weight": rand(4, 2, seed=1), "0.lora_down.weight": rand(2, 8, seed=2)}, tmp_path / "l.safetensors"
    )
    model, lora = str(tmp_path / "m.safetensors"), str(tmp_path / "l.safetensors")
    for words in (
        ["plan", model, lora, "--vram", "12GB", "--ram", "16GB"],
        ["inspect", lora, "--model", model],
        ["bake", model, lora, "-o", str(tmp_path / "out.safetensors")],
    ):
        assert cli.main(words) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("beside", ["weight_scale", "weight_scale_inv"])
def test_a_scale_of_quantised_numbers_beside_16_bits_is_refused(tmp_path, beside):
    save_file({"0.weight": rand(4, 8, seed=1).bfloat16(), f"0.{beside}": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(FileFormatError, match=rf"0\.{beside}: expected no scales but scale_weight"):
        load_stored(torch.nn.Sequential(torch.nn.Linear(8, 4)), tmp_path / "m.safetensors")


def test_a_scale_of_another_layer_than_a_linear_one_is_refused(tmp_path):
    data, scale = fp8(rand(4, 2, 3, 3, seed=1))
    save_file({"0.weight": data, "0.scale_weight": scale}, tmp_path / "m.safetensors")
    with pytest.raises(FileFormatError, match=r"0\.scale_weight: expected scales beside the weights of linear layers"):
        load_stored(torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3)), tmp_path / "m.safetensors")


def test_a_marker_of_another_format_is_refused(tmp_path):
    marker = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    tensors = {"0.weight": torch.ones(4, 8).to(E4M3), "0.weight_scale": torch.ones(1), "0.comfy_quant": marker}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(FileFormatError, match=r"0\.comfy_quant: expected no scales but"):
        load_stored(torch.nn.Sequential(torch.nn.Linear(8, 4)), tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (torch.ones(0), r"expected one scale or 4, one a row, found \[0\]"),
        (torch.ones(5), r"expected one scale or 4, one a row, found \[5\]"),
        (torch.ones(1, 4), r"expected one scale or 4, one a row, found \[1, 4\]"),
        (torch.ones(2, 2), r"expected one scale or 4, one a row, found \[2, 2\]"),
        (torch.ones(4, dtype=torch.int32), "expected floating-point scales, found I32"),
        (torch.ones(4, dtype=torch.bool), "expected floating-point scales, found BOOL"),
        (torch.ones(4, dtype=torch.complex64), "expected floating-point scales, found C64"),
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), "expected finite scales, found others"),
        (torch.tensor(float("inf")), "expected finite scales, found others"),
    ],
)
def test_a_scale_that_is_none_is_refused_with_file_and_key(tmp_path, dtype, scale, said):
    weight = torch.ones(4, 4).to(dtype)
    if scale.is_complex():  # older safetensors write none
        size, form = weight.nbytes, "F8_E4M3" if dtype is E4M3 else "BF16"
        header = {"0.weight": entry(form, (4, 4), (0, size)), "0.scale_weight": entry("C64", (4,), (size, size + 32))}
        (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(header, bytes(size + 32)))
    else:
        save_file({"0.weight": weight, "0.scale_weight": scale}, tmp_path / "m.safetensors")
    with pytest.raises(FileFormatError, match=rf"^m\.safetensors: 0\.scale_weight: {said}"):
        load_stored(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 1), (4, 1, 1)])
@pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.float16])
def test_one_scale_or_one_a_row_in_any_floating_point_dtype(tmp_path, dtype, shape, of):
    scale = (rand(max((1, *shape)), seed=2).abs() + 0.1).to(of).reshape(shape)
    weight = rand(4, 4, seed=1).to(dtype)
    save_file({"0.weight": weight, "0.scale_weight": scale}, tmp_path / "m.safetensors")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    load_stored(model, tmp_path / "m.safetensors")
    wanted = weight.double() * (scale.double().reshape(-1, 1) if scale.numel() > 1 else scale.double().reshape(()))
    assert torch.allclose(model(torch.eye(4)).double(), wanted.t(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
def test_a_vector_with_a_scale_is_no_square_matrix(tmp_path, dtype):
    """[4] times [4, 1] would be [4, 4], the layer's own shape."""
    save_file({"0.weight": torch.ones(4).to(dtype), "0.scale_weight": torch.ones(4)}, tmp_path / "m.safetensors")
    with pytest.raises(FileFormatError, match=r"^m\.safetensors: 0\.scale_weight: .*found a weight of \[4\]"):
        load_stored(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "m.safetensors")
    for weight in (torch.ones(4), torch.ones(()), torch.ones(4, 4, 1)):
        save_file({"0.weight": weight.to(dtype)}, tmp_path / "m.safetensors")
        with pytest.raises(FileFormatError, match=r"^m\.safetensors: "):
            load_stored(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "m.safetensors")


def test_what_the_model_has_no_place_for_is_not_read(tmp_path):
    """A stray tensor in a format that no torch has stops nothing."""
    weight = rand(4, 8, seed=1)
    header = {
        "0.weight": entry("F32", (4, 8), (0, 128)),
        "stray": entry("F6_E2M3", (4, 8), (128, 152)),
    }
    raw = weight.numpy().tobytes() + bytes(24)
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(header, raw))
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    assert load_stored(model, tmp_path / "m.safetensors") == ["stray"]
    assert torch.equal(model[0].weight, weight)
    header = {"0.weight": entry("F6_E2M3", (4, 8), (0, 24))}
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(header, bytes(24)))
    with pytest.raises(FileFormatError, match=r"m\.safetensors: 0\.weight: stored as F6_E2M3, which torch"):
        load_stored(torch.nn.Sequential(torch.nn.Linear(8, 4)), tmp_path / "m.safetensors")


@pytest.mark.parametrize("shape", [(1,), (0,), (7, 3), (4, 1)])
def test_a_bias_of_another_size_is_refused(tmp_path, shape):
    save_file({"0.weight": rand(4, 8, seed=1), "0.bias": torch.ones(shape)}, tmp_path / "m.safetensors")
    said = f"m.safetensors: 0.bias: expected [4], found {list(shape)}; this file is for another model"
    with pytest.raises(FileFormatError, match=re.escape(said)):
        load_stored(torch.nn.Sequential(torch.nn.Linear(8, 4)), tmp_path / "m.safetensors")


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
