"""Every algorithm of LyCORIS against the layer it trains: module -> safetensors file -> adapter -> patched weight.

The reference is the weight that the wrapped layer runs with. `get_merged_weight` gives the same where it is used here,
but LyCORIS 4.1.3 applies alpha / rank twice when it merges LoHa and LoKr (`get_diff_weight`), which no layer was trained
with.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.from_keys import adapter_from, delta_of, patched
from support.make import gen
from support.measure import assert_same, contribution_error, fp32_limit

from lib_lora_guard.adapters.dora import decompose

pytest.importorskip("lycoris", reason="lycoris-lora writes the reference")
from lycoris.modules import boft, diag_oft, dylora, full, glora, ia3, locon, loha, lokr, norms

STRENGTHS = (1.0, 0.5, -0.7)
BASES = {
    "linear": lambda: torch.nn.Linear(16, 24),
    "conv3": lambda: torch.nn.Conv2d(8, 12, 3),
    "conv1": lambda: torch.nn.Conv2d(8, 12, 1),
    "linear32": lambda: torch.nn.Linear(16, 32),
    "conv32": lambda: torch.nn.Conv2d(8, 32, 3),
    "square": lambda: torch.nn.Linear(16, 16),
    "layernorm": lambda: torch.nn.LayerNorm(16),
    "groupnorm": lambda: torch.nn.GroupNorm(4, 16),
}
LINEAR_AND_CONV = ("linear", "conv3", "conv1")


def cases(module, bases, *options):
    name = module.__name__.removesuffix("Module")
    return [
        pytest.param(module, base, kw, id="-".join([name, base, *(f"{k}={v}" for k, v in kw.items())]))
        for base in bases
        for kw in (options or [{}])
    ]


ADDITIVE = [
    *cases(locon.LoConModule, LINEAR_AND_CONV, {}, {"rs_lora": True}, {"use_scalar": True}),
    *cases(locon.LoConModule, ["conv3"], {"use_tucker": True}),
    *cases(loha.LohaModule, LINEAR_AND_CONV, {}, {"rs_lora": True}),
    *cases(loha.LohaModule, ["conv3"], {"use_tucker": True}),
    *cases(lokr.LokrModule, LINEAR_AND_CONV, {}, {"factor": 2, "lora_dim": 2}, {"full_matrix": True}),
    *cases(lokr.LokrModule, ["linear"], {"factor": 4, "lora_dim": 1, "decompose_both": True}),
    *cases(lokr.LokrModule, ["linear"], {"factor": 2, "lora_dim": 2, "rs_lora": True}),
    *cases(lokr.LokrModule, ["conv3"], {"factor": 2, "lora_dim": 2, "use_tucker": True}),
    *cases(dylora.DyLoraModule, LINEAR_AND_CONV, {"block_size": 1}),
    *cases(full.FullModule, LINEAR_AND_CONV),
]
OTHERS = [
    *cases(glora.GLoRAModule, LINEAR_AND_CONV),
    *cases(ia3.IA3Module, LINEAR_AND_CONV, {}, {"train_on_input": True}),
    *cases(diag_oft.DiagOFTModule, LINEAR_AND_CONV, {}, {"constraint": 0.01}),
    *cases(boft.ButterflyOFTModule, ["linear32", "conv32"], {}, {"constraint": 0.01}),
]
RESCALED = [
    *cases(diag_oft.DiagOFTModule, LINEAR_AND_CONV, {"rescaled": True}, {"rescaled": True, "constraint": 0.01}),
    *cases(boft.ButterflyOFTModule, ["linear32", "conv32"], {"rescaled": True}),
]


def trained(module, base, **options):
    """A module of LyCORIS on a layer, with random parameters in place of training; and the layer's own weight."""
    layer = BASES[base]()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=gen(number)) * 0.3)
    weight = layer.weight.detach().clone()
    options = {"lora_dim": 4, "alpha": 2.0, **options}
    wrapped = module("layer", layer, 1.0, **options)
    wrapped.apply_to()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(wrapped.named_parameters()):
            noise = torch.randn(parameter.shape, generator=gen(10 + number))
            if name in ("dora_scale", "rescale"):
                parameter.mul_(1.0 + 0.3 * noise)
            elif name == "scalar":
                parameter.fill_(0.8)
            else:
                parameter.add_(noise * 0.2)
    return wrapped.eval(), weight


def from_file(wrapped, tmp_path):
    """The tensors of the module's state_dict, through a file."""
    path = tmp_path / "lora.safetensors"
    state = {f"layer.{k}": v.detach().clone().contiguous() for k, v in wrapped.state_dict().items()}
    save_file(state, path)
    return {k.removeprefix("layer."): v for k, v in load_file(path).items()}


@torch.no_grad()
def reference_weight(wrapped, weight, strength):
    """The weight the wrapped layer runs with: what it makes of every unit input."""
    if isinstance(wrapped, dylora.DyLoraModule):
        # It runs with a random rank; the last block is the whole LoRA.
        return wrapped.get_merged_weight(strength, rank=wrapped.lora_dim - wrapped.block_size)[0]
    wrapped.multiplier = strength
    units = torch.eye(weight[0].numel()).reshape(-1, *weight.shape[1:])
    out = wrapped.org_module[0](units) - wrapped.org_module[0](torch.zeros_like(units[:1]))
    result = out.flatten(1).T.reshape(weight.shape)
    if not isinstance(wrapped, loha.LohaModule | lokr.LokrModule):
        assert_same(wrapped.get_merged_weight(strength)[0], result, weight)
    return result


def error_and_limit(adapter, weight, strength, reference):
    limit = fp32_limit(reference, weight)
    return contribution_error(patched(adapter, weight, strength), reference, weight), limit


def assert_seen(adapter, weight, strength, reference):
    """A planted fault is larger than twice what the equality tests allow."""
    error, limit = error_and_limit(adapter, weight, strength, reference)
    assert error > 2 * limit, f"would not be seen: error {error:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize(("module", "base", "options"), ADDITIVE + OTHERS)
def test_patched_weight_is_what_lycoris_runs_with(module, base, options, tmp_path):
    wrapped, weight = trained(module, base, **options)
    adapter = adapter_from(from_file(wrapped, tmp_path))
    for strength in STRENGTHS:
        reference = reference_weight(wrapped, weight, strength)
        assert_same(patched(adapter, weight, strength), reference, weight)
        assert_seen(adapter, weight, strength * 1.05, reference)


@pytest.mark.parametrize(("module", "base", "options"), RESCALED)
def test_rescale_is_moved_by_strength_too(module, base, options, tmp_path):
    wrapped, weight = trained(module, base, **options)
    adapter = adapter_from(from_file(wrapped, tmp_path))
    assert torch.equal(patched(adapter, weight, 0.0), weight)
    for strength in STRENGTHS:
        # LyCORIS leaves the row scale whole at every strength (and so changes the weight at 0): it is taken out, and
        # put back moved from 1 by the strength. At strength 1 the reference is LyCORIS' own number.
        factor = wrapped.rescale.detach()
        reference = reference_weight(wrapped, weight, strength)
        if strength != 1.0:
            reference = reference / factor * (1 + strength * (factor - 1))
        assert_same(patched(adapter, weight, strength), reference, weight)
        assert_seen(dataclasses.replace(adapter, rescale=None), weight, strength, reference)


@pytest.mark.parametrize("base", ["layernorm", "groupnorm"])
def test_norm(base, tmp_path):
    wrapped, weight = trained(norms.NormModule, base, lora_dim=0)
    tensors = from_file(wrapped, tmp_path)
    assert sorted(tensors) == ["b_norm", "w_norm"]
    bias = wrapped.org_module[0].bias.detach().clone()
    for strength in STRENGTHS:
        reference, bias_reference = (t.detach() for t in wrapped.get_merged_weight(strength))
        assert_same(patched(adapter_from(tensors), weight, strength), reference, weight)
        assert_same(patched(adapter_from({"diff": tensors["b_norm"]}), bias, strength), bias_reference, bias)


def test_full_bias(tmp_path):
    wrapped, _ = trained(full.FullModule, "linear")
    adapter = adapter_from({"diff": from_file(wrapped, tmp_path)["diff_b"]})
    bias = wrapped.org_bias[0]
    for strength in STRENGTHS:
        reference = wrapped.get_merged_weight(strength)[1].detach()
        assert_same(patched(adapter, bias, strength), reference, bias)


DORA = [
    *cases(locon.LoConModule, LINEAR_AND_CONV, {"wd_on_out": True}, {"wd_on_out": False}),
    *cases(locon.LoConModule, ["conv3"], {"wd_on_out": True, "use_tucker": True}),
    *cases(loha.LohaModule, LINEAR_AND_CONV, {"wd_on_out": True}, {"wd_on_out": False}),
    *cases(lokr.LokrModule, LINEAR_AND_CONV, {"wd_on_out": True}, {"wd_on_out": False}),
]


@pytest.mark.parametrize(("module", "base", "options"), DORA)
def test_dora_as_trained(module, base, options, tmp_path):
    wrapped, weight = trained(module, base, weight_decompose=True, **options)
    tensors = from_file(wrapped, tmp_path)
    delta, magnitude = delta_of(adapter_from(tensors), weight), tensors["dora_scale"]
    whole = reference_weight(wrapped, weight, 1.0)

    def normed(delta, strength):
        return decompose(weight.clone(), delta, magnitude, strength, None, as_trained=True)

    for strength in STRENGTHS:
        # LyCORIS takes the part of the way from the plain sum instead of the weight.
        result = torch.lerp(weight + delta, normed(delta, 1.0), strength)
        assert_same(result, reference_weight(wrapped, weight, strength), weight)
        blended = normed(delta, strength)
        assert_same(blended, torch.lerp(weight, whole, strength), weight)
    assert torch.equal(normed(delta, 0.0), weight)
    ignored = decompose(weight.clone(), delta, torch.ones_like(magnitude), 1.0, None, as_trained=True)
    assert contribution_error(ignored, whole, weight) > 0.01
    halved = normed(delta / 2, 1.0)
    assert contribution_error(halved, whole, weight) > 0.01


SCALED = [
    *cases(locon.LoConModule, ["linear", "conv3"]),
    *cases(loha.LohaModule, ["linear"]),
    *cases(lokr.LokrModule, ["linear"], {"factor": 2, "lora_dim": 2, "alpha": 1.0}),
    *cases(glora.GLoRAModule, ["linear"]),
    *cases(diag_oft.DiagOFTModule, ["linear"], {"constraint": 0.01}),
    *cases(boft.ButterflyOFTModule, ["linear32"], {"constraint": 0.01}),
]


@pytest.mark.parametrize(("module", "base", "options"), SCALED)
def test_an_ignored_alpha_would_be_seen(module, base, options, tmp_path):
    wrapped, weight = trained(module, base, **options)
    adapter = dataclasses.replace(adapter_from(from_file(wrapped, tmp_path)), alpha=None)
    assert_seen(adapter, weight, 1.0, reference_weight(wrapped, weight, 1.0))


def test_the_wrong_side_would_be_seen(tmp_path):
    for module, swap in (
        (ia3.IA3Module, lambda a: dataclasses.replace(a, on_input=not a.on_input)),
        (diag_oft.DiagOFTModule, lambda a: dataclasses.replace(a, blocks=a.blocks.mT.contiguous())),
    ):
        wrapped, weight = trained(module, "square")
        adapter = adapter_from(from_file(wrapped, tmp_path))
        reference = reference_weight(wrapped, weight, 1.0)
        assert_same(patched(adapter, weight, 1.0), reference, weight)
        assert_seen(swap(adapter), weight, 1.0, reference)
