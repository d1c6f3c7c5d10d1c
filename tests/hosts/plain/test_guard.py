"""`LoraGuard` on any module: real files, all modes, errors that leave the model as it was."""

import copy
import gc
import os
import weakref

import pytest
import torch
from support.make import Net, rand, write_kohya
from support.measure import assert_same, same_bits

import lib_lora_guard
from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraFileError, LoraGuardError, LoraMismatchError, ModeError
from lib_lora_guard.hosts.plain import guard as plain
from lib_lora_guard.weights import ScaledFp8Codec, StoredLinear

X = rand(2, 16, 32, seed=5)
MODULES = {
    f"lora_unet_blocks_{b}_{name}": shape
    for b in (0, 1)
    for name, shape in (("qkv", (96, 32)), ("proj", (32, 32)), ("conv", (32, 32, 3, 3)))
}


@pytest.fixture
def model():
    return Net(32)


@pytest.fixture
def files(tmp_path):
    """Two LoRA files and the deltas they hold: `{path: {parameter: delta}}`."""
    result = {}
    for seed, name in ((1, "style.safetensors"), (2, "pose.safetensors")):
        deltas = write_kohya(tmp_path / name, MODULES, seed=seed)
        result[tmp_path / name] = {
            k.removeprefix("lora_unet_")
            .replace("_0_", ".0.")
            .replace("_1_", ".1.")
            .replace("blocks_", "blocks.")
            .replace("blocks..", "blocks.")
            + ".weight": d
            for k, d in deltas.items()
        }
    return result


def run(model):
    with torch.no_grad():
        return model(X).clone()


def reference(files, *stack):
    fused = Net(32)
    state = fused.state_dict()
    for path, strength in stack:
        for key, delta in files[path].items():
            state[key] = state[key] + strength * delta
    fused.load_state_dict(state)
    return run(fused)


@pytest.mark.parametrize("mode", ["auto", "bypass", "on_the_fly", "merge"])
def test_every_mode_equals_the_fused_model(model, files, mode):
    style, pose = files
    base, bits = run(model), {n: p.data.clone() for n, p in model.named_parameters()}
    guard = LoraGuard(model)
    for stack in ([(style, 0.8)], [(style, 0.8), (pose, -0.5)], [(pose, 1.0)]):
        report = guard.apply(stack, mode=mode)
        assert_same(run(model), reference(files, *stack), base)
        assert [(lora.label, lora.used, lora.skipped) for lora in report.loras] == [
            (path.name, 6, []) for path, _ in stack
        ]
        wanted = {"auto": "bypass"}.get(mode, mode)
        assert all(dict(lora.modes) == {wanted: 6} for lora in report.loras)
        if mode != "merge":
            assert all(same_bits(p.data, bits[n]) for n, p in model.named_parameters())
    guard.remove()
    assert torch.equal(run(model), base)
    assert all(same_bits(p.data, bits[n]) for n, p in model.named_parameters())


def test_as_a_context_manager_it_cleans_up_after_an_error(model, files):
    base = run(model)

    def generate():
        with LoraGuard(model) as guard:
            guard.apply([(next(iter(files)), 1.0)])
            assert not torch.equal(run(model), base)
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        generate()
    assert torch.equal(run(model), base)


def test_the_report_can_be_printed_and_counted(model, files):
    report = LoraGuard(model).apply([(next(iter(files)), 0.8)])
    assert report.ram_bytes == sum(4 * 4 * (shape[0] + torch.Size(shape[1:]).numel()) for shape in MODULES.values())
    assert report.device_bytes == 0
    assert report.milliseconds > 0
    text = str(report)
    assert "style.safetensors strength 0.8: 6 keys used, 0 skipped, 6 bypass (low rank)" in text
    assert text.splitlines()[0].startswith("Net: 0.0 MB on cpu while running, ")


def test_errors_name_the_file_and_leave_the_stack_that_was_there(model, files, tmp_path):
    style = next(iter(files))
    guard = LoraGuard(model)
    guard.apply([(style, 0.8)])
    before = run(model)
    write_kohya(tmp_path / "shape.safetensors", {"lora_unet_blocks_0_proj": (32, 48)})
    write_kohya(tmp_path / "other.safetensors", {"lora_unet_middle_proj": (32, 48)})
    with pytest.raises(
        LoraMismatchError,
        match=r"shape\.safetensors: made for another model: blocks\.0\.proj\.weight: up @ down gives \[32, 48\], the weight is \[32, 32\]",
    ):
        guard.apply([(style, 0.1), (tmp_path / "shape.safetensors", 1.0)])
    with pytest.raises(
        LoraMismatchError,
        match=r"other\.safetensors: none of its 1 modules is in this Net; it was made for another model",
    ):
        guard.apply([(tmp_path / "other.safetensors", 1.0)])
    with pytest.raises(LoraFileError, match="no such file"):
        guard.apply([(tmp_path / "gone.safetensors", 1.0)])
    # The last two are what a host asks for, and no mode for callers.
    for mode in ("nonsense", "never_merge", "prefer_merge"):
        with pytest.raises(ModeError, match=f"^mode must be one of auto, bypass, on_the_fly, merge, not '{mode}'$"):
            guard.apply([(style, 1.0)], mode=mode)
    assert same_bits(run(model), before)


def test_merging_into_low_bit_weights_is_refused_with_the_reason(model, files):
    for block in model.blocks:
        block.proj = StoredLinear(ScaledFp8Codec(), block.proj.weight.data, block.proj.bias.data)
    base = run(model)
    with pytest.raises(
        ModeError, match=r"proj\.weight: stored as fp8; merging would round most of the LoRA away. Use mode 'auto'"
    ):
        LoraGuard(model).apply([(next(iter(files)), 1.0)], mode="merge")
    assert torch.equal(run(model), base)


def test_a_transposed_or_grouped_convolution_is_patched_through_its_weight(tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=2), torch.nn.ConvTranspose2d(8, 6, 2, stride=2)
    ).requires_grad_(False)
    deltas = write_kohya(tmp_path / "a.safetensors", {"lora_unet_0": (8, 4, 3, 3), "lora_unet_1": (8, 6, 2, 2)})
    x = rand(1, 8, 6, 6, seed=1)
    base = model(x)
    fused = torch.nn.Sequential(
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=2), torch.nn.ConvTranspose2d(8, 6, 2, stride=2)
    ).requires_grad_(False)
    state = model.state_dict()
    fused.load_state_dict(
        {
            **state,
            "0.weight": state["0.weight"] + deltas["lora_unet_0"],
            "1.weight": state["1.weight"] + deltas["lora_unet_1"],
        }
    )
    guard = LoraGuard(model)
    report = guard.apply([(tmp_path / "a.safetensors", 1.0)])
    assert dict(report.loras[0].modes) == {"on_the_fly": 2}
    assert_same(model(x), fused(x), base)
    guard.remove()
    assert torch.equal(model(x), base)
    assert "forward" not in vars(model[0])
    assert type(model[0]) is torch.nn.Conv2d


def test_two_guards_of_one_model_share_its_stack(model, files):
    style, pose = files
    base, bits = run(model), {n: p.data.clone() for n, p in model.named_parameters()}
    first, second = LoraGuard(model), LoraGuard(model)
    first.apply([(style, 1.0)], mode="merge")
    second.apply([(pose, 0.5)], mode="merge")
    assert_same(run(model), reference(files, (pose, 0.5)), base)
    first.remove()
    assert torch.equal(run(model), base)
    first.apply([(style, 1.0)], mode="merge")
    del first, second
    LoraGuard(model).remove()
    assert all(same_bits(p.data, bits[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("mode", ["bypass", "on_the_fly", "merge"])
def test_applied_in_inference_mode_it_works_outside_it_with_gradients(model, files, mode):
    style = next(iter(files))
    base = run(model)
    guard = LoraGuard(model)
    with torch.inference_mode():
        guard.apply([(style, 0.8)], mode=mode)
    x = X.clone().requires_grad_()
    output = model(x)
    output.sum().backward()
    assert_same(output, reference(files, (style, 0.8)), base)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(model, files, strength):
    base = run(model)
    with pytest.raises(
        LoraMismatchError, match=r"style\.safetensors: .*its strength is (nan|inf), not a usable number"
    ):
        LoraGuard(model).apply([(next(iter(files)), strength)])
    assert torch.equal(run(model), base)


def test_a_file_is_read_once_while_it_is_in_the_stack_and_again_when_it_has_changed(model, files, monkeypatch):
    style, reads = next(iter(files)), []
    read = plain.read_lora_file
    monkeypatch.setattr(plain, "read_lora_file", lambda path, *more: reads.append(path) or read(path, *more))
    guard = LoraGuard(model)
    guard.apply([(style, 1.0)])
    guard.apply([(style, 0.5)])
    assert reads == [style]
    write_kohya(style, MODULES, seed=9)
    os.utime(style, ns=(1, 1))
    guard.apply([(style, 0.5)])
    assert reads == [style, style]
    guard.remove()
    guard.apply([(style, 0.5)])
    assert len(reads) == 3


@pytest.mark.parametrize("mode", ["bypass", "on_the_fly"])
def test_copying_a_model_with_a_lora_on_it_is_refused_in_words(model, files, mode):
    guard = LoraGuard(model)
    guard.apply([(next(iter(files)), 1.0)], mode=mode)
    with pytest.raises(LoraGuardError, match=r"take it off \(guard\.remove\(\)\) before copying or saving"):
        copy.deepcopy(model)
    guard.remove()
    assert torch.equal(run(copy.deepcopy(model)), run(model))


def test_wrong_arguments_are_said_in_words(files):
    guard = LoraGuard(Net(32))
    for wrong in ("style.safetensors", ["style.safetensors"], [("a", 1.0, 2)]):
        with pytest.raises(TypeError, match="stack must be a list of"):
            guard.apply(wrong)
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, this is a str"):
        LoraGuard("model")


def test_a_model_that_is_gone_is_said_to_be_gone(files):
    model = Net(32)
    guard, gone = LoraGuard(model), weakref.ref(model)
    guard.apply([(next(iter(files)), 1.0)])
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(ReferenceError, match="the Net this guard was made for is gone"):
        guard.apply([(next(iter(files)), 1.0)])


def test_the_package_has_its_public_name_and_no_other():
    assert lib_lora_guard.LoraGuard is LoraGuard
    assert set(lib_lora_guard.__all__) <= set(dir(lib_lora_guard))
    assert "PREFIX" not in dir(lib_lora_guard)
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = lib_lora_guard.Nonsense
