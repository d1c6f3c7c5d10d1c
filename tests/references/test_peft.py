"""Every kind that peft trains against its own merged layer: save_pretrained -> tensors -> adapter -> patched weight."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from support.from_keys import adapter_from, delta_of, patched
from support.make import gen
from support.measure import assert_same, contribution_error, fp32_limit

from lib_lora_guard import LoraGuard
from lib_lora_guard.adapters.dora import decompose
from lib_lora_guard.adapters.file_settings import PeftSettings
from lib_lora_guard.adapters.ia3 import Ia3Adapter

peft = pytest.importorskip("peft", reason="peft writes the reference")

STRENGTHS = (1.0, 0.5, -0.7)
LAYERS = ("linear", "conv3", "conv1")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 24)
        self.conv3 = torch.nn.Conv2d(8, 12, 3)
        self.conv1 = torch.nn.Conv2d(8, 12, 1)

    def forward(self, x):
        return x


class Trained:
    """A peft model with random adapter parameters, what it saved, and what it merges."""

    def __init__(self, config, folder, scale=1.0):
        net = Net()
        with torch.no_grad():
            for number, parameter in enumerate(net.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=gen(number)) * 0.3)
        self.base = {name: p.detach().clone() for name, p in net.named_parameters()}
        model = peft.get_peft_model(net, config)
        with torch.no_grad():
            for number, (name, parameter) in enumerate(p for p in model.named_parameters() if p[1].requires_grad):
                noise = torch.randn(parameter.shape, generator=gen(20 + number))
                # Magnitudes and factors lie around what they start from, rotations and factors around zero.
                scaled = any(part in name for part in ("magnitude", "ia3_l", "boft_s"))
                parameter.copy_(parameter * (1 + 0.3 * noise) if scaled else noise * 0.2)
        model.save_pretrained(folder)
        self.config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self.tensors = load_file(folder / "adapter_model.safetensors")
        if scale != 1.0:
            for layer in LAYERS:
                getattr(model.base_model.model, layer).set_scale("default", scale)
        merged = model.merge_and_unload()
        self.merged = {name: p.detach().clone() for name, p in merged.named_parameters()}

    def of(self, layer):
        """The adapter's tensors of one layer, by key suffix."""
        start = f"base_model.model.{layer}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def pair(self, layer, name="weight"):
        """What the layer had, and what peft made of it."""
        return self.base[f"{layer}.{name}"], self.merged[f"{layer}.{name}"]


def assert_seen(result, reference, base):
    error, limit = contribution_error(result, reference, base), fp32_limit(reference, base)
    assert error > 2 * limit, f"would not be seen: error {error:.2e}, limit {limit:.2e}"


def lora(**more):
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(LAYERS), **more)


SCALED = {
    "lora": (lambda: lora(), 6.0),
    # The file holds no alpha: what alpha / rank must give is lora_alpha / sqrt(rank).
    "rslora": (lambda: lora(use_rslora=True), 6.0 * 4**0.5),
    "loha": (lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=list(LAYERS)), 6.0),
    "loha tucker": (lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=list(LAYERS), use_effective_conv2d=True), 6.0),
}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", SCALED)
def test_additive_kinds(kind, strength, tmp_path):
    make, alpha = SCALED[kind]
    trained = Trained(make(), tmp_path, strength)
    for layer in LAYERS:
        weight, reference = trained.pair(layer)
        adapter = adapter_from(trained.of(layer), alpha=alpha)
        assert_same(patched(adapter, weight, strength), reference, weight)
        assert_seen(patched(adapter, weight, strength * 1.05), reference, weight)
        assert_seen(patched(dataclasses.replace(adapter, alpha=None), weight, strength), reference, weight)


LOKR = {
    "whole": {"r": 4},
    "second factored": {"r": 1, "decompose_factor": 4},
    "both factored": {"r": 1, "decompose_factor": 4, "decompose_both": True},
    "tucker": {"r": 1, "decompose_factor": 2, "use_effective_conv2d": True},
}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("case", LOKR)
def test_lokr(case, strength, tmp_path):
    trained = Trained(peft.LoKrConfig(alpha=6, target_modules=list(LAYERS), **LOKR[case]), tmp_path, strength)
    for layer in LAYERS:
        weight, reference = trained.pair(layer)
        # peft scales two whole sides by alpha / r as well, and r stands in adapter_config.json alone.
        adapter = adapter_from(trained.of(layer), alpha=6.0, rank=trained.config["r"])
        assert_same(patched(adapter, weight, strength), reference, weight)
        assert_seen(patched(adapter, weight, strength * 1.05), reference, weight)


# peft takes the 1-D bias for a shard that DeepSpeed left behind.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")
def test_lora_bias(tmp_path):
    trained = Trained(lora(lora_bias=True), tmp_path)
    for layer in LAYERS:
        tensors = trained.of(layer)
        bias, reference = trained.pair(layer, "bias")
        adapter = adapter_from({"diff": tensors.pop("lora_B.bias")})
        assert_same(patched(adapter, bias, 6 / 4), reference, bias)
        weight, reference = trained.pair(layer)
        assert_same(patched(adapter_from(tensors, alpha=6.0), weight, 1.0), reference, weight)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_as_trained(rslora, strength, tmp_path):
    trained = Trained(lora(use_dora=True, use_rslora=rslora), tmp_path, strength)
    for layer in LAYERS:
        tensors = trained.of(layer)
        weight, reference = trained.pair(layer)
        magnitude = tensors["lora_magnitude_vector"]
        wanted = (24,) if layer == "linear" else (1, 12, 1, 1)
        assert tuple(magnitude.shape) == wanted
        # A convolution's has the shape of a factor per input channel, and is one per output row.
        magnitude = magnitude.reshape(-1, *[1] * (weight.dim() - 1))
        delta = delta_of(adapter_from(tensors, alpha=6.0 * (2.0 if rslora else 1.0)), weight)
        # peft's strength scales the delta and leaves the magnitude whole.
        result = decompose(weight.clone(), delta * strength, magnitude, 1.0, None, as_trained=True)
        assert_same(result, reference, weight)
        for wrong in (delta * 1.05, torch.zeros_like(delta)):
            result = decompose(weight.clone(), wrong * strength, magnitude, 1.0, None, as_trained=True)
            assert_seen(result, reference, weight)


OFT = {
    "block 4": ({"oft_block_size": 4, "r": 0}, 5),
    "two blocks": ({"oft_block_size": 0, "r": 2}, 5),
    "shared": ({"oft_block_size": 4, "r": 0, "block_share": True}, 5),
    "exact": ({"oft_block_size": 4, "r": 0, "use_cayley_neumann": False}, None),
    **{f"{n} terms": ({"oft_block_size": 4, "r": 0, "num_cayley_neumann_terms": n}, n) for n in (2, 3, 4, 6, 8)},
}


@pytest.mark.parametrize("case", OFT)
def test_oft(case, tmp_path):
    options, terms = OFT[case]
    trained = Trained(peft.OFTConfig(target_modules=list(LAYERS), **options), tmp_path)
    assert trained.config["use_cayley_neumann"] == (terms is not None)
    for layer in LAYERS:
        weight, reference = trained.pair(layer)
        adapter = adapter_from(trained.of(layer), terms=terms)
        for strength in STRENGTHS:
            # peft knows no strength for OFT; ours goes that part of the way.
            partly = weight + strength * (reference - weight)
            assert_same(patched(adapter, weight, strength), partly, weight)
            assert_seen(patched(adapter, weight, strength * 1.05), partly, weight)
        # The file does not say which of the two formulas it was trained with.
        other = dataclasses.replace(adapter, terms=5 if terms is None else None)
        assert_seen(patched(other, weight, 1.0), reference, weight)
        half = patched(adapter, weight[:6].clone(), 1.0)
        assert_same(half, reference[:6], weight[:6])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("eps", [6e-5, 1e-2])
def test_constrained_oft(eps, shared, tmp_path):
    """The file holds what the last step of the optimizer left, beyond the bound; peft shortens it before each use."""
    options = {"oft_block_size": 4, "r": 0, "block_share": shared, "coft": True, "eps": eps}
    trained = Trained(peft.OFTConfig(target_modules=list(LAYERS), **options), tmp_path)
    for layer in LAYERS:
        weight, reference = trained.pair(layer)
        tensors = trained.of(layer)
        assert tensors["oft_R.weight"].norm() > 10 * eps
        adapter = adapter_from(tensors, bound=PeftSettings(trained.config).oft_bound)
        assert_same(patched(adapter, weight, 1.0), reference, weight)
        assert_seen(patched(dataclasses.replace(adapter, bound=None), weight, 1.0), reference, weight)


class Linears(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(16, 24, bias=False)
        self.out = torch.nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.out(self.q(x))


@pytest.mark.parametrize("mode", ["bypass", "on_the_fly", "merge"])
def test_bd_lora(mode, tmp_path):
    """One factor of each layer is block-diagonal, and the file holds its blocks alone."""
    blocks = peft.BdLoraConfig(target_modules_bd_a=["out"], target_modules_bd_b=["q"], nblocks=4)
    config = peft.LoraConfig(r=8, lora_alpha=6, target_modules=["q", "out"], use_bdlora=blocks)
    base = Linears().requires_grad_(False)
    for number, parameter in enumerate(base.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=gen(number)) * 0.3)
    trained = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in trained.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=gen(20 + number)) * 0.2)
    trained.save_pretrained(tmp_path)
    x = torch.randn(3, 16, generator=gen(9))
    before = base(x)
    with torch.no_grad():
        reference = trained.merge_and_unload()(x)
    guard = LoraGuard(base)
    guard.apply([(tmp_path / "adapter_model.safetensors", 1.0)], mode=mode)
    with torch.no_grad():
        assert_same(base(x), reference, before)
    guard.remove()


class BlockDiagonal:
    """Stands in for peft's CUDA extension, without which it trains one butterfly stage only."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


@pytest.mark.parametrize(("size", "stages"), [(4, 1), (4, 2), (2, 3), (4, 3)])
def test_boft(size, stages, tmp_path, monkeypatch):
    from peft.tuners.boft import layer as boft_layer

    monkeypatch.setattr(boft_layer, "_FBD_CUDA", BlockDiagonal)
    layers = LAYERS if size * 2 ** (stages - 1) <= 8 else ("linear",)
    config = peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=stages, target_modules=list(layers))
    trained = Trained(config, tmp_path)
    for layer in layers:
        weight, reference = trained.pair(layer)
        adapter = adapter_from(trained.of(layer))
        assert adapter.blocks.shape[0] == stages
        assert_same(patched(adapter, weight, 1.0), reference, weight)
        assert torch.equal(patched(adapter, weight, 0.0), weight)
        for wrong in (
            dataclasses.replace(adapter, factor=None),
            dataclasses.replace(adapter, blocks=adapter.blocks.mT.contiguous()),
        ):
            assert_seen(patched(wrong, weight, 1.0), reference, weight)
        assert_seen(patched(adapter, weight, 1.05), reference, weight)
        assert_same(patched(adapter.rows(3, 7), weight[3:10], 1.0), reference[3:10], weight[3:10])


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(on_input, tmp_path):
    trained = Trained(
        peft.IA3Config(target_modules=list(LAYERS), feedforward_modules=list(LAYERS) if on_input else []), tmp_path
    )
    for layer in LAYERS:
        weight, reference = trained.pair(layer)
        factor = trained.of(layer)["ia3_l"]
        adapter = Ia3Adapter(factor, on_input=on_input, centre=1.0)
        for strength in STRENGTHS:
            partly = weight + strength * (reference - weight)
            assert_same(patched(adapter, weight, strength), partly, weight)
            assert_seen(patched(adapter, weight, strength * 1.05), partly, weight)
        assert_seen(patched(dataclasses.replace(adapter, centre=0.0), weight, 1.0), reference, weight)
        if not on_input:
            # Scaled output rows take the bias along.
            bias, reference = trained.pair(layer, "bias")
            assert_same(patched(adapter, bias, 1.0), reference, bias)
