"""torch.compile: a LoRA counts in every call, and a change of strengths compiles nothing anew."""

import gc

import pytest
import torch
from safetensors.torch import save_file
from support.make import rand, write_kohya
from support.measure import assert_same, same_bits
from torch._dynamo.utils import counters

from lib_lora_guard.errors import ModeError
from lib_lora_guard.hosts.plain.guard import LoraGuard
from lib_lora_guard.patching import operators

WIDTH = 8
SIZES = (2, 5)
needs_operators = pytest.mark.skipif(not operators.is_compilable(), reason="this torch fails on layers with LoRAs")
MODES = ("auto", "bypass", "on_the_fly", "merge")
LORA = {"lora_unet_a": (WIDTH, WIDTH), "lora_unet_conv": (WIDTH, WIDTH, 3), "lora_unet_up": (WIDTH, WIDTH, 3)}  # fmt: skip


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.a = torch.nn.Linear(WIDTH, WIDTH)
            self.conv = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
            self.up = torch.nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return self.up(self.conv(x.transpose(-1, -2))).transpose(-1, -2)


@pytest.fixture(autouse=True)
def _compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def files(tmp_path):
    write_kohya(tmp_path / "style.safetensors", LORA, seed=1)
    extra = {"lora_unet_a.dora_scale": rand(1, WIDTH, seed=4).abs() + 0.5, "lora_unet_conv.dora_scale": rand(WIDTH, 1, 1, seed=5).abs() + 0.5}  # fmt: skip
    write_kohya(tmp_path / "dora.safetensors", LORA, seed=2, extra=extra)
    save_file({f"{name.removeprefix('lora_unet_')}.diff": rand(*shape, seed=9) for name, shape in LORA.items()}, str(tmp_path / "diff.safetensors"))  # fmt: skip
    return {name: tmp_path / f"{name}.safetensors" for name in ("style", "dora", "diff")}


def outputs(call):
    with torch.no_grad():
        return [call(rand(size, 4, WIDTH, seed=size)).clone() for size in SIZES]


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "part"])
def test_a_compiler_that_fails_on_loras_is_named_before_anything_is_touched(files, how, monkeypatch):
    monkeypatch.setattr("lib_lora_guard.hosts.plain.guard.is_compilable", lambda: False)
    model, plain = Model(), Model()
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    elif how == "model.compile":
        model.compile(backend="eager")
    else:
        model.a = torch.compile(model.a, backend="eager")
    base = outputs(plain)
    guard = LoraGuard(compiled)
    with pytest.raises(ModeError, match=r'fails on layers with LoRAs; use mode="merge", or torch 2\.4 or newer'):
        guard.apply([(files["style"], 1.0)])
    assert all(map(same_bits, outputs(compiled), base))
    guard.apply([])
    if how != "part":
        # Names inside a compiled part have its own word in them.
        guard.apply([(files["style"], 1.0)], mode="merge")
        LoraGuard(plain).apply([(files["style"], 1.0)], mode="merge")
        for found, wanted, before in zip(outputs(compiled), outputs(plain), base, strict=True):
            assert_same(found, wanted, before)


@needs_operators
@pytest.mark.parametrize(("how", "mode"), [*(("torch.compile", mode) for mode in MODES), ("model.compile", "auto")])
def test_a_model_that_was_compiled_and_run_before_shows_every_change(files, how, mode):
    model, plain = Model(), Model()
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    else:
        model.compile(backend="eager", fullgraph=True)
        compiled = model
    base = outputs(compiled)
    guard, other = LoraGuard(model), LoraGuard(plain)

    def apply(*stack):
        guard.apply(list(stack), mode=mode)
        other.apply(list(stack), mode=mode)
        for found, wanted, before in zip(outputs(compiled), outputs(plain), base, strict=True):
            assert_same(found, wanted, before)

    apply((files["style"], 1.0))
    made = graphs()
    for strength in (0.5, -1.0, 2.0):
        apply((files["style"], strength))
        assert graphs() == made
    if mode != "auto":
        # Which of them take hooks, "bypass" shows.
        apply((files["style"], 0.5), (files["dora"], 1.0))
        apply((files["dora"], 1.0))
        made = graphs()
        apply((files["dora"], 0.3))
        assert graphs() == made
    apply((files["diff"], 0.3))
    guard.remove()
    made = graphs()
    assert all(map(same_bits, outputs(compiled), base))
    assert graphs() == made, "what was compiled without LoRAs is there still"


def test_hooks_alone_are_seen_when_they_come_change_and_go(tmp_path):
    linear = {"lora_unet_a": LORA["lora_unet_a"]}
    write_kohya(tmp_path / "style.safetensors", linear, seed=1)
    extra = {"lora_unet_a.dora_scale": rand(1, WIDTH, seed=4).abs() + 0.5}
    write_kohya(tmp_path / "dora.safetensors", linear, seed=2, extra=extra)
    model = Model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    base, guard = outputs(compiled), LoraGuard(model)
    for name in ("style", "dora", "style"):
        report = guard.apply([(tmp_path / f"{name}.safetensors", 1.0)])
        assert dict(report.loras[0].modes) == {"bypass": 1}
        for found, wanted, before in zip(outputs(compiled), outputs(model), base, strict=True):
            assert_same(found, wanted, before)
    guard.remove()
    assert all(map(same_bits, outputs(compiled), base))


@pytest.mark.parametrize("mode", [pytest.param("bypass", marks=needs_operators), "merge"])
def test_a_wrapped_model_is_the_model_itself(files, mode):
    """A wrapper that is dropped takes no engine with it, and no originals."""

    def compiled(inner):
        return torch.compile(inner, backend="eager")

    model = Model()
    base = outputs(model)
    for wrap in (compiled, torch.nn.DataParallel, lambda inner: torch.nn.DataParallel(compiled(inner))):
        guard = LoraGuard(wrap(model))
        report = guard.apply([(files["style"], 1.0)], mode=mode)
        gc.collect()
        assert LoraGuard(model).report is guard.report is report
        LoraGuard(wrap(model)).apply([(files["style"], 0.5)], mode=mode)
        assert not same_bits(outputs(model)[0], base[0])
        LoraGuard(model).remove()
        assert all(map(same_bits, outputs(model), base))


@needs_operators
@pytest.mark.parametrize("mode", ["bypass", "on_the_fly"])
def test_compiled_blocks_that_share_their_code_have_their_own_loras(tmp_path, mode):
    model = torch.nn.ModuleList(Model() for _ in range(3))
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    base = [outputs(block) for block in model]
    modules = {f"{n}_{name.removeprefix('lora_unet_')}": shape for n in range(2) for name, shape in LORA.items()}
    write_kohya(
        tmp_path / "blocks.safetensors", {f"lora_unet_{name}": shape for name, shape in modules.items()}, seed=3
    )
    guard = LoraGuard(model)
    guard.apply([(tmp_path / "blocks.safetensors", 1.0)], mode=mode)
    for block, before in zip(model, base, strict=True):
        with torch.no_grad():
            wanted = [block._call_impl(rand(size, 4, WIDTH, seed=size)) for size in SIZES]
        for found, right in zip(outputs(block), wanted, strict=True):
            assert torch.allclose(found, right, atol=1e-5)
        assert torch.equal(outputs(block)[0], before[0]) == (block is model[2])
    guard.remove()


@needs_operators
@pytest.mark.parametrize(("name", "mode"), [("dora", "bypass"), ("style", "on_the_fly")])
def test_gradients_go_through_the_operators(files, name, mode):
    model, plain = Model(), Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for one, call in ((model, compiled), (plain, plain)):
        LoraGuard(one).apply([(files[name], 0.7)], mode=mode)
        x = rand(2, 4, WIDTH, seed=1).requires_grad_()
        call(x).square().sum().backward()
        found.append(x.grad)
    assert torch.allclose(*found, atol=1e-4)


@needs_operators
@pytest.mark.parametrize("mode", ["bypass", "on_the_fly"])
def test_with_the_operators_switched_off_it_is_right_with_breaks_in_the_graph(files, mode, monkeypatch):
    monkeypatch.setattr(operators, "_are_there", lambda: False)
    model, plain = Model(), Model()
    compiled, x = torch.compile(model.a, backend="eager"), rand(2, 4, WIDTH, seed=2)
    before = compiled(x)
    for strength in (1.0, -1.0):
        for one in (model, plain):
            LoraGuard(one).apply([(files["style"], strength)], mode=mode)
        assert operators.NUMBER not in vars(model.a)
        found = compiled(x)
        assert_same(found, plain.a(x), before)
    LoraGuard(model).remove()
    assert same_bits(compiled(x), before)


def test_the_switch_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("LORA_GUARD_OPERATORS", "0")
    assert operators._are_there.__wrapped__() is False
