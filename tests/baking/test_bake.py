"""The values in the new file: one merge in fp32, rounded once, and everything else bit for bit."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.bnb_fixture import bnb_tensors
from support.make import rand
from support.measure import same_bits
from support.raw_files import gguf_bytes, info

from baking.checkpoints import MODELS, TARGETS, Target, bias_name, flux, merged, weight_name, write_gguf, write_lora
from lib_lora_guard.adapters.files import read_lora_file
from lib_lora_guard.baking import DTYPES, bake, match_stack
from lib_lora_guard.baking.dtypes import rounded
from lib_lora_guard.baking.source import ModelSource
from lib_lora_guard.checkpoints.model_header import read_checkpoint
from lib_lora_guard.errors import FileFormatError, LoraMismatchError
from lib_lora_guard.files import open_header, read_bytes
from lib_lora_guard.weights import dtype_name

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
STRENGTH = 0.8


def run(model, stack, output, dtype="keep", metadata=None):
    checkpoint = read_checkpoint(model)
    found = match_stack(checkpoint, [(read_lora_file(path), strength) for path, strength in stack])
    return bake(checkpoint, found, output, DTYPES[dtype], {"format": "pt", **(metadata or {})}), found


def written(tensors, folder, dtype=torch.bfloat16):
    """The checkpoint in a file, floats in `dtype`; returns its path and what it holds."""
    stored = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    return folder / "model.safetensors", stored


def nearest(values, dtype):
    """Rounded once; values are within range."""
    assert values.dtype == torch.float32
    return values.to(dtype)


def in_fp8(name, tensor):
    """What an fp8 file has in fp8: the matrices of the denoiser."""
    elsewhere = ("cond_stage_model", "conditioner", "text_encoders", "first_stage")
    return tensor.dim() > 1 and not name.startswith(elsewhere) and tensor.is_floating_point()


def expected(stored, stack, targets, dtype, base=None):
    """Every tensor of the new file, from one merge of what the file means (`base` where that is not `stored` itself)."""
    whole = {name: t.float() if t.is_floating_point() else t for name, t in (base or stored).items()}
    return in_file(stored, whole | merged(whole, stack, targets), dtype)


def in_file(stored, whole, dtype):
    """Some tensors as the new file has them."""
    result = {}
    for name, tensor in whole.items():
        own = stored[name].dtype
        target = own if dtype is None or not own.is_floating_point else dtype
        if dtype in (E4M3, E5M2) and not in_fp8(name, tensor):
            target = own
        result[name] = tensor if own == torch.int64 else nearest(tensor, target)
    return result


def differing(found, wanted):
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not same_bits(found[name], wanted[name])]


@pytest.fixture(scope="module", params=MODELS)
def architecture(request, tmp_path_factory):
    """Name, fp32 tensors, targets, and two LoRA files whose kinds differ on every module."""
    folder = tmp_path_factory.mktemp(request.param)
    tensors, targets = MODELS[request.param](), TARGETS[request.param]
    first = write_lora(folder / "first.safetensors", tensors, targets)
    second = write_lora(folder / "second.safetensors", tensors, targets, ("loha", "lora", "lora", "lora", "dora"), 50)
    return request.param, tensors, targets, [(first, STRENGTH), (second, -0.5)]


@pytest.mark.parametrize(
    ("stored_as", "dtype"),
    [
        (torch.bfloat16, "keep"),
        (torch.float16, "keep"),
        (torch.float32, "keep"),
        (torch.float16, "bf16"),
        (torch.bfloat16, "fp16"),
        (torch.float16, "fp32"),
        (torch.bfloat16, "fp8_e4m3fn"),
        (torch.float16, "fp8_e5m2"),
    ],
)
def test_is_one_merge_in_fp32_rounded_once(architecture, stored_as, dtype, tmp_path):
    _, tensors, targets, stack = architecture
    model, stored = written(tensors, tmp_path, stored_as)
    report, found = run(model, stack, tmp_path / "out.safetensors", dtype)
    wanted = expected(stored, stack, targets, DTYPES[dtype])
    baked = load_file(tmp_path / "out.safetensors")
    assert differing(baked, wanted) == []
    assert [(lora.fit.used, lora.fit.skipped, lora.fit.lost) for lora in found.loras] == [
        (len(targets) + 1, [], [])
    ] * 2
    changed = set(merged({n: t.float() for n, t in stored.items()}, stack, targets))
    assert len(changed) == len(targets) + 1
    assert report.baked == len(changed)
    copied = [n for n in stored if n not in changed and baked[n].dtype == stored[n].dtype]
    assert all(same_bits(baked[n], stored[n]) for n in copied)
    assert (report.copied, report.converted) == (len(copied), len(stored) - len(copied) - len(changed))
    assert report.beyond == 0
    assert report.bytes == (tmp_path / "out.safetensors").stat().st_size
    # Every fault that a merge may have is seen in the bits.
    (first, _), (second, _) = stack
    base = {n: t.float() for n, t in stored.items() if n in changed}
    for wrong in ([(first, STRENGTH)], [(second, -0.5), (first, STRENGTH)], [(first, 1.05 * STRENGTH), (second, -0.5)]):
        faulty = in_file(stored, base | merged(base, wrong, targets), DTYPES[dtype])
        assert differing({n: baked[n] for n in changed}, faulty)


def test_every_kind_and_part_is_seen(architecture, tmp_path):
    """Without one module, its tensor alone differs."""
    _, tensors, targets, stack = architecture
    model, stored = written(tensors, tmp_path)
    run(model, stack, tmp_path / "out.safetensors")
    baked, lora = load_file(tmp_path / "out.safetensors"), load_file(stack[0][0])
    for target in targets:
        less = {key: t for key, t in lora.items() if not key.startswith(f"{target.module}.")}
        save_file(less, tmp_path / "less.safetensors")
        wrong = expected(stored, [(tmp_path / "less.safetensors", STRENGTH), stack[1]], targets, None)
        names = {weight_name(stored, target.key), bias_name(stored, target.key)}
        assert {weight_name(stored, target.key)} <= set(differing(baked, wrong)) <= names
    without_alpha = {key: t for key, t in lora.items() if not key.endswith(".alpha")}
    save_file(without_alpha, tmp_path / "less.safetensors")
    assert differing(baked, expected(stored, [(tmp_path / "less.safetensors", STRENGTH), stack[1]], targets, None))


def test_half_a_step_of_a_product_in_fp64(tmp_path):
    """Against arithmetic that shares nothing with the product: alpha / rank * up @ down in float64."""
    tensors, target = flux(), TARGETS["flux"][3]
    model, stored = written(tensors, tmp_path)
    lora = write_lora(tmp_path / "a.safetensors", tensors, [target], ("lora",))
    run(model, [(lora, STRENGTH)], tmp_path / "out.safetensors")
    factors, key = load_file(lora), f"{target.key}.weight"
    product = (
        factors[f"{target.module}.lora_up.weight"].double() @ factors[f"{target.module}.lora_down.weight"].double()
    )
    exact = stored[key].double() + STRENGTH * 2.0 / 4 * product
    found = load_file(tmp_path / "out.safetensors")[key].double()
    # bf16 has 8 bits: half a step is 2^-9 of the next power of two; fp32 adds a hair.
    step = torch.exp2(exact.abs().log2().floor() - 8)
    assert bool(((found - exact).abs() <= 1.001 * step).all())
    assert bool(((found - stored[key].double()).abs() > 2 * step).any())


def test_strength_zero_changes_nothing_and_says_so(tmp_path):
    tensors = flux()
    model, stored = written(tensors, tmp_path)
    lora = write_lora(tmp_path / "a.safetensors", tensors, TARGETS["flux"], ("lora", "loha"))
    report, _ = run(model, [(lora, 0.0)], tmp_path / "out.safetensors")
    assert differing(load_file(tmp_path / "out.safetensors"), stored) == []
    assert report.cosine is None


# ---- how much is left


def cosine_of(true, present):
    true, present = (torch.cat([t.double().flatten() for t in ts]) for ts in (true, present))
    return float(true @ present / (true.norm() * present.norm()))


@pytest.mark.parametrize(("dtype", "size", "low", "high"), [
    ("fp8_e4m3fn", 0.003, 0.02, 0.6), ("fp8_e4m3fn", 3.0, 0.98, 1.0), ("bf16", 0.003, 0.9, 1.0), ("keep", 0.3, 0.999, 1.0),
])  # fmt: skip
def test_the_cosine_is_that_of_what_changed(dtype, size, low, high, tmp_path):
    tensors, targets = flux(32), TARGETS["flux"][2:]
    model, stored = written(tensors, tmp_path)
    lora = write_lora(tmp_path / "a.safetensors", tensors, targets, ("lora",), size=size)
    report, _ = run(model, [(lora, 1.0)], tmp_path / "out.safetensors", dtype)
    base = {name: t.float() for name, t in stored.items()}
    exact, baked = merged(base, [(lora, 1.0)], targets), load_file(tmp_path / "out.safetensors")
    names = list(exact)
    true = [exact[n] - base[n] for n in names]
    present = [baked[n].float() - base[n].to(baked[n].dtype).float() for n in names]
    assert report.cosine == pytest.approx(cosine_of(true, present), abs=1e-6)
    for form, cosine in report.cosines.items():
        of_form = [i for i, n in enumerate(names) if dtype_name(baked[n].dtype) == form]
        assert cosine == pytest.approx(cosine_of([true[i] for i in of_form], [present[i] for i in of_form]), abs=1e-6)
    assert set(report.cosines) == {"bf16", "fp8_e4m3fn"} & set(report.formats)
    assert low < report.cosines.get("fp8_e4m3fn", report.cosine) <= high


def test_fp8_of_a_model_that_is_fp8_already(tmp_path):
    """Norms and biases in fp8 that no LoRA touches keep their bits; all others of the model are copied."""
    tensors = flux()
    model, stored = written(tensors, tmp_path, E4M3)
    lora = write_lora(tmp_path / "a.safetensors", tensors, TARGETS["flux"])
    for dtype in ("keep", "fp8_e4m3fn"):
        report, _ = run(model, [(lora, 1.0)], tmp_path / "out.safetensors", dtype)
        wanted = expected(stored, [(lora, 1.0)], TARGETS["flux"], None)
        assert differing(load_file(tmp_path / "out.safetensors"), wanted) == []
        assert report.converted == 0
    run(model, [(lora, 1.0)], tmp_path / "out.safetensors", "fp8_e5m2")
    found = load_file(tmp_path / "out.safetensors")
    assert {t.dtype for t in found.values() if t.dim() > 1} == {E5M2}
    assert {t.dtype for t in found.values() if t.dim() == 1} == {torch.bfloat16}


@pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448.0), (E5M2, 57344.0), (torch.float16, 65504.0)])
def test_values_beyond_the_range_become_the_largest(dtype, largest):
    values = torch.tensor([1.0, -1e9, 1e9, largest, float("nan")])
    result, beyond = rounded(values, dtype)
    assert beyond == 2
    assert result.float()[:4].tolist() == [1.0, -largest, largest, largest]
    assert math.isnan(result.float()[4])
    assert rounded(values.bfloat16(), torch.float32)[0].dtype == torch.float32
    assert rounded(values, torch.float32)[0] is values


# ---- scaled fp8


def scaled(tensors, by_row=False):
    """Matrices as scaled fp8, and the fp32 values that the file means."""
    stored, meaning = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            stored[name] = tensor.bfloat16()
            meaning[name] = stored[name].float()
            continue
        largest = tensor.abs().amax(1) if by_row else tensor.abs().amax()
        scale = largest / 448
        grid = scale[:, None] if by_row else scale
        stored[name] = (tensor / grid).to(E4M3)
        stored[name.removesuffix("weight") + "scale_weight"] = scale if by_row else scale.reshape(1)
        meaning[name] = stored[name].float() * grid
    return {**stored, "scaled_fp8": torch.empty(2, dtype=E4M3).zero_()}, meaning


@pytest.mark.parametrize("by_row", [False, True])
def test_scaled_fp8_keeps_its_scales(by_row, tmp_path):
    tensors, targets = flux(), TARGETS["flux"]
    stored, meaning = scaled(tensors, by_row)
    inputs = {
        f"{targets[0].key}.scale_input": torch.tensor(0.5),
        "double_blocks.0.img_mlp.0.scale_input": torch.tensor(0.25),
    }
    save_file({**stored, **inputs}, tmp_path / "model.safetensors")
    stack = [(write_lora(tmp_path / "a.safetensors", tensors, targets), 1.0)]
    report, _ = run(tmp_path / "model.safetensors", stack, tmp_path / "out.safetensors")
    baked, exact = load_file(tmp_path / "out.safetensors"), merged(meaning, stack, targets)
    assert baked.keys() == {*stored, *inputs}
    scales = {n: n.removesuffix("weight") + "scale_weight" for n in exact if exact[n].dim() == 2}
    left = [n for n in baked if n not in exact and n not in scales.values()]
    assert all(same_bits(baked[n].reshape(-1), {**stored, **inputs}[n].reshape(-1)) for n in left)
    true, present, grown = [], [], 0
    for name, scale in scales.items():
        rows = baked[scale].reshape(-1, 1)
        assert baked[scale].shape == stored[scale].shape
        doublings = torch.log2(baked[scale] / stored[scale])
        assert bool((doublings == doublings.round()).all())
        assert bool((doublings >= 0).all())
        grown += int((doublings > 0).sum())
        # The smallest of the doublings that have room for every value.
        largest = exact[name].abs().amax(1) if by_row else exact[name].abs().amax().reshape(1)
        assert bool((largest <= 448 * baked[scale] * 1.000001).all())
        assert bool(((doublings == 0) | (largest > 224 * baked[scale])).all())
        assert same_bits(baked[name], (exact[name] / rows).to(E4M3))
        true.append(exact[name] - meaning[name])
        present.append(baked[name].float() * rows - meaning[name])
    assert grown
    bias = next(n for n in exact if exact[n].dim() == 1)
    assert same_bits(baked[bias], exact[bias].bfloat16())
    assert report.beyond == 0
    true.append(exact[bias] - meaning[bias])
    present.append(baked[bias].float() - meaning[bias])
    assert report.cosine == pytest.approx(cosine_of(true, present), abs=1e-6)


@pytest.mark.parametrize("wanted", ["keep", "bf16"])
def test_weight_scale_of_comfyui_is_heeded(wanted, tmp_path):
    tensors, targets = flux(), TARGETS["flux"]
    stored, meaning = scaled(tensors)
    stored = {name.replace("scale_weight", "weight_scale"): tensor for name, tensor in stored.items()}
    del stored["scaled_fp8"]
    marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    beside = {
        name.replace("weight_scale", last): content.clone()
        for name in stored
        if name.endswith("weight_scale")
        for last, content in (("comfy_quant", marker), ("input_scale", torch.tensor(0.5)))
    }
    layers = {"_quantization_metadata": "{}"}
    save_file({**stored, **beside}, tmp_path / "model.safetensors", metadata=layers)
    stack = [(write_lora(tmp_path / "a.safetensors", tensors, targets), 1.0)]
    out = tmp_path / "out.safetensors"
    run(tmp_path / "model.safetensors", stack, out, wanted, layers)
    baked, exact = load_file(out), merged(meaning, stack, targets)
    for name in exact:
        if exact[name].dim() < 2:
            continue
        scale = baked.get(name.replace(".weight", ".weight_scale"))
        if wanted == "keep":
            assert same_bits(baked[name], (exact[name] / scale).to(E4M3))
        else:
            assert same_bits(baked[name], exact[name].bfloat16())
    kept = baked.keys() & {*beside, *(name for name in stored if name.endswith("weight_scale"))}
    assert len(kept) == (3 * len(beside) // 2 if wanted == "keep" else 0), "they belong to the fp8 numbers"
    assert ("_quantization_metadata" in open_header(out).metadata) is (wanted == "keep")


def test_a_tensor_in_f4_is_copied(tmp_path):
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no F4")
    tensors = flux()
    lora = write_lora(tmp_path / "a.safetensors", tensors, TARGETS["flux"])
    model, stored = written(tensors, tmp_path)
    packed = torch.arange(128, dtype=torch.uint8).reshape(4, 32).view(torch.float4_e2m1fn_x2)
    save_file({**stored, "extra.weight": packed}, model)
    run(model, [(lora, 1.0)], tmp_path / "out.safetensors")
    header = open_header(tmp_path / "out.safetensors")
    assert (header.tensors["extra.weight"].format, header.tensors["extra.weight"].shape) == ("F4", (4, 64))
    assert read_bytes(header, ["extra.weight"])["extra.weight"] == bytes(range(128))


def test_rows_without_a_lora_keep_their_values_when_a_scale_doubles(tmp_path):
    """q changes and makes the largest value three times as large; k and v mean what they meant."""
    tensors = flux()
    key = "double_blocks.0.img_attn.qkv"
    stored, meaning = scaled(tensors)
    save_file(stored, tmp_path / "model.safetensors")
    target = Target("lora_unet_double_blocks_0_img_attn_qkv", key)
    difference = torch.zeros(48, 16)
    difference[:16] = 2 * meaning[f"{key}.weight"].abs().max()
    save_file({f"{target.module}.diff": difference}, tmp_path / "a.safetensors")
    run(tmp_path / "model.safetensors", [(tmp_path / "a.safetensors", 1.0)], tmp_path / "out.safetensors")
    baked = load_file(tmp_path / "out.safetensors")
    assert float(baked[f"{key}.scale_weight"] / stored[f"{key}.scale_weight"]) in (2.0, 4.0)
    found, before = (t[f"{key}.weight"].float()[16:] * t[f"{key}.scale_weight"] for t in (baked, stored))
    # Below the smallest normal number steps are as coarse as the grown scale makes them.
    normal = before.abs() >= 2**-6 * float(baked[f"{key}.scale_weight"])
    assert torch.equal(found[normal], before[normal])
    assert int(normal.sum()) > 0.95 * normal.numel()


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8_e5m2"])
def test_scaled_fp8_in_another_dtype_has_no_scales(dtype, tmp_path):
    tensors, targets = flux(), TARGETS["flux"]
    stored, meaning = scaled(tensors)
    save_file(stored, tmp_path / "model.safetensors")
    stack = [(write_lora(tmp_path / "a.safetensors", tensors, targets), 1.0)]
    run(tmp_path / "model.safetensors", stack, tmp_path / "out.safetensors", dtype)
    plain = {n: t for n, t in stored.items() if n in meaning}
    wanted = expected(plain, stack, targets, DTYPES[dtype], meaning)
    assert differing(load_file(tmp_path / "out.safetensors"), wanted) == []


# ---- blocks


@pytest.mark.parametrize(("form", "hidden"), [("Q8_0", 64), ("Q4_K", 256)])
@pytest.mark.parametrize("dtype", ["keep", "fp16", "fp8_e4m3fn"])
def test_gguf(form, hidden, dtype, tmp_path):
    tensors = {n: t for n, t in flux(hidden).items() if "blocks.1" not in n and not n.startswith("txt_in")}
    meaning = write_gguf(tmp_path / "model.gguf", tensors, form)
    targets = [Target("lora_unet_single_blocks_0_linear2", "single_blocks.0.linear2"),
               Target("transformer.transformer_blocks.0.attn.to_v", "double_blocks.0.img_attn.qkv", (2 * hidden, 3 * hidden))]  # fmt: skip
    stack = [(write_lora(tmp_path / "a.safetensors", tensors, targets, ("lora",)), 1.0)]
    report, _ = run(tmp_path / "model.gguf", stack, tmp_path / "out.safetensors", dtype)
    packed = [n for n, t in tensors.items() if t.dim() == 2 and t.shape[1] % {"Q8_0": 32, "Q4_K": 256}[form] == 0 and t.numel() >= 4096]  # fmt: skip
    assert len(packed) > 10
    exact = meaning | merged(meaning, stack, targets)
    wanted = {}
    for name, tensor in exact.items():
        own = torch.bfloat16 if name in packed else torch.float32
        wide = {"keep": own, "fp16": torch.float16}.get(dtype, torch.bfloat16)
        wanted[name] = tensor.to(E4M3 if dtype == "fp8_e4m3fn" and tensor.dim() == 2 else wide)
    assert differing(load_file(tmp_path / "out.safetensors"), wanted) == []
    assert report.baked == 3


def test_bitsandbytes_weights_become_bf16(tmp_path):
    """With the values that bitsandbytes itself decodes (5 x 48)."""
    tensors, name = flux(), "single_blocks.0.linear2"
    packed = bnb_tensors("nf4")
    values = packed.pop("dequantized").float()
    stored = {n: t.bfloat16() for n, t in tensors.items() if not n.startswith(f"{name}.")}
    state = {n.replace("x.weight", f"{name}.weight"): t for n, t in packed.items()}
    assert all(n.startswith(f"{name}.weight") for n in state)
    save_file({**stored, **state}, tmp_path / "model.safetensors")
    factors = {"lora_up.weight": rand(5, 2, seed=1), "lora_down.weight": rand(2, 48, seed=2)}
    save_file({f"lora_unet_single_blocks_0_linear2.{n}": t for n, t in factors.items()}, tmp_path / "a.safetensors")
    run(tmp_path / "model.safetensors", [(tmp_path / "a.safetensors", 0.1)], tmp_path / "out.safetensors")
    baked = load_file(tmp_path / "out.safetensors")
    assert baked.keys() == {*stored, f"{name}.weight"}
    exact = values + 0.1 * factors["lora_up.weight"] @ factors["lora_down.weight"]
    # bf16 rounds to 2^-8 of a value; the fixture's own values are fp32.
    torch.testing.assert_close(baked[f"{name}.weight"].float(), exact, rtol=2**-8, atol=1e-6)
    assert all(same_bits(baked[n], t) for n, t in stored.items())


# ---- shapes and refusals


def test_a_flux_tools_lora_widens_the_input(tmp_path):
    tensors = flux()
    model, stored = written(tensors, tmp_path)
    wide = {"lora_up.weight": rand(16, 2, seed=1), "lora_down.weight": rand(2, 128, seed=2)}
    narrow = {"lora_up.weight": rand(48, 2, seed=3), "lora_down.weight": rand(2, 16, seed=4)}
    both = {f"lora_unet_img_in.{n}": t for n, t in wide.items()}
    both |= {f"lora_unet_double_blocks_0_img_attn_qkv.{n}": t for n, t in narrow.items()}
    save_file(both, tmp_path / "tools.safetensors")
    run(model, [(tmp_path / "tools.safetensors", 0.5)], tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")["img_in.weight"]
    padded = torch.nn.functional.pad(stored["img_in.weight"].float(), (0, 64))
    wanted = torch.addmm(padded, wide["lora_up.weight"], wide["lora_down.weight"], alpha=0.5)
    assert same_bits(found, wanted.bfloat16())


def test_a_lora_for_another_model_is_refused_by_name(tmp_path):
    tensors = flux()
    model, _ = written(tensors, tmp_path)
    other = MODELS["sd15"]()
    foreign = write_lora(tmp_path / "photo.safetensors", other, TARGETS["sd15"])
    good = write_lora(tmp_path / "good.safetensors", tensors, TARGETS["flux"])
    with pytest.raises(
        LoraMismatchError, match=r"^photo.safetensors: made for SD 1.x, this is Flux; use a LoRA for Flux"
    ):
        run(model, [(good, 1.0), (foreign, 1.0)], tmp_path / "out.safetensors")
    wrong = write_lora(tmp_path / "wide.safetensors", flux(32), [TARGETS["flux"][4]], ("lora",))
    with pytest.raises(
        LoraMismatchError,
        match=r"^wide.safetensors: made for another model: double_blocks.1.img_attn.proj.weight: up @ down gives \[32, 32\]",
    ):
        run(model, [(good, 1.0), (wrong, 1.0)], tmp_path / "out.safetensors")
    save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.diff": torch.ones(4, 4)}, tmp_path / "text.safetensors")
    with pytest.raises(
        LoraMismatchError, match=r"^text.safetensors: none of its 1 modules can be applied \(first: lora_te_text"
    ):
        run(model, [(tmp_path / "text.safetensors", 1.0)], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_baking_names_the_keys_it_leaves_out(tmp_path):
    tensors = flux()
    model, stored = written(tensors, tmp_path)
    made = load_file(write_lora(tmp_path / "a.safetensors", tensors, TARGETS["flux"][2:4], ("lora",)))
    made["lora_te1_text_model_encoder_layers_0_mlp_fc1.diff"] = torch.ones(4, 4)
    made["lora_unet_double_blocks_0_img_attn_proj.diff"] = torch.ones(5, 16)
    made["something.else"] = torch.ones(2)
    save_file(made, tmp_path / "a.safetensors")
    _, found = run(model, [(tmp_path / "a.safetensors", 1.0)], tmp_path / "out.safetensors")
    (lora,) = found.loras
    assert lora.fit.used == 3  # two pairs of factors and a bias
    assert sorted(lora.fit.skipped) == ["lora_te1_text_model_encoder_layers_0_mlp_fc1.weight", "something.else"]
    assert lora.fit.lost == ["double_blocks.0.img_attn.proj.weight: diff gives [5, 16], the weight is [16, 16]"]
    baked = load_file(tmp_path / "out.safetensors")
    assert same_bits(baked["double_blocks.0.img_attn.proj.weight"], stored["double_blocks.0.img_attn.proj.weight"])


OTHER_SCALES = {
    "weight_scale": torch.ones(3),  # blocks: MXFP8, NVFP4
    "weight_scale_inv": torch.ones(1, 1),  # DeepSeek's blocks of 128 x 128
    "scale": torch.ones(1),  # SDNQ
    "scale_b": torch.ones(1),
    "weight._scale": torch.ones(1),  # quanto
    "weight.scale": torch.ones(1),
    "comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8),
}


def test_formats_that_cannot_be_taken_over_are_refused(tmp_path):
    tensors = flux()
    lora = write_lora(tmp_path / "a.safetensors", tensors, TARGETS["flux"])
    model, stored = written(tensors, tmp_path, E4M3)
    for beside, content in OTHER_SCALES.items():
        save_file({**stored, f"double_blocks.0.img_attn.qkv.{beside}": content}, model)
        with pytest.raises(
            FileFormatError, match=rf"model.safetensors: .*qkv.{beside}: expected no scales but scale_weight"
        ):
            run(model, [(lora, 1.0)], tmp_path / "out.safetensors")
    save_file({**stored, "double_blocks.0.img_attn.qkv.scale_weight": torch.ones(5)}, model)
    with pytest.raises(
        FileFormatError,
        match=r"qkv.scale_weight: expected one floating-point scale or 48, one a row, found \[5\] of torch.float32",
    ):
        run(model, [(lora, 1.0)], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("name", "said"), [
    ("double_blocks.0.img_attn.qkv.weight", "qkv.weight: expected one of F32, .*, found IQ2_XXS$"),
    ("double_blocks.0.img_attn.qkv.scale_weight", "qkv.scale_weight: expected one of F32, .*, found IQ2_XXS$"),
])  # fmt: skip
def test_gguf_types_without_a_decoder_are_refused(name, said, tmp_path):
    whole = info("double_blocks.0.img_attn.proj.weight", (4, 4), 0, 288)
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(infos=[info(name, (256, 4), 16, 0), whole], data=bytes(288 + 64)))
    with pytest.raises(FileFormatError, match=rf"^a.gguf: .*{said}"):
        ModelSource(read_checkpoint(tmp_path / "a.gguf"))


def test_the_library_reads_the_metadata(tmp_path):
    tensors = flux()
    model, _ = written(tensors, tmp_path)
    run(model, [(write_lora(tmp_path / "a.safetensors", tensors, TARGETS["flux"]), 1.0)], tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
