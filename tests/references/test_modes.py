"""Every kind a trainer writes, from its file to a model's output, in every mode: against the trainer's own model.

LyCORIS' reference is the network as it runs after `apply_to` (its merge applies alpha / rank twice for LoHa and LoKr),
peft's is the merged model. Where a trainer knows no strength, 0.6 means six tenths of the way to its weights.
"""

import copy
import json

import pytest
import torch
from support.end_to_end import (
    assert_seen,
    check_in_modes,
    fill,
    lycoris_preset,
    one_thread,  # noqa: F401  # a fixture for all tests here
    tampered,
    without_alpha,
    without_module,
)
from support.make import gen, rand

pytest.importorskip("lycoris", reason="lycoris-lora writes the reference")
pytest.importorskip("peft", reason="peft writes the reference")
import lycoris
import peft
from lycoris.config import PRESET
from peft.tuners.boft import layer as boft_layer
from references.test_peft import BlockDiagonal

STRENGTHS = (1.0, 0.6)
LAYERS = ("conv3", "conv1", "qkv", "out")
X = rand(2, 4, 5, 5, seed=3)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv3 = torch.nn.Conv2d(4, 16, 3, padding=1)
        self.conv1 = torch.nn.Conv2d(16, 32, 1)
        self.norm = torch.nn.LayerNorm(32)
        self.qkv = torch.nn.Linear(32, 96)
        self.out = torch.nn.Linear(32, 16)

    def forward(self, x):
        tokens = self.norm(self.conv1(torch.nn.functional.silu(self.conv3(x))).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.out(tokens + torch.softmax(q @ k.transpose(1, 2) / 6, -1) @ v)


def net():
    return fill(Net())


@torch.no_grad()
def forward(model):
    return model(X)


def partly(merged, strength):
    """The output of a model whose weights lie `strength` of the way from the base to `merged`."""
    model = net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.lerp_(merged[name], strength)
    return forward(model)


def check_all(
    file,
    references,
    tmp_path,
    *,
    used=4,
    as_trained=False,
    bypassed,
    pays=True,
    whole=False,
    merged=0,
    alpha_matters=False,
):
    """`bypassed`: how many weights have an exact cheap form, all others are patched on the fly; `pays`: whether that form
    is also the cheaper way; `whole`: as large as the weights, and so merged where that is free to choose; `merged`: how
    many are merged in every mode (norms and biases)."""
    model, weights = net(), used - merged
    for strength, reference in references.items():
        found = check_in_modes(model, file, reference, forward, strength=strength, used=used, as_trained=as_trained)
        assert found == {
            "auto": counts(0, 0, used) if whole else counts(bypassed * pays, weights - bypassed * pays, merged),
            "bypass": counts(bypassed, weights - bypassed, merged),
            "on_the_fly": counts(0, weights, merged),
            "merge": counts(0, 0, used),
        }
        assert_seen(model, [(file, strength * 1.05)], reference, forward, as_trained)
    reference = references[1.0]
    assert_seen(model, [(without_module(file, tmp_path / "part", "conv1"), 1.0)], reference, forward, as_trained)
    if alpha_matters:
        assert_seen(model, [(without_alpha(file, tmp_path / "alpha"), 1.0)], reference, forward, as_trained)


def counts(bypass, on_the_fly, merge):
    return {mode: n for mode, n in (("bypass", bypass), ("on_the_fly", on_the_fly), ("merge", merge)) if n}


# ---- LyCORIS


def trained_by_lycoris(folder, monkeypatch, algo="locon", per_layer=None, dim=4, **options):
    """The file and the network of LyCORIS on a net of its own, with random numbers in place of training."""
    kinds = ("Linear", "Conv2d", *(("LayerNorm",) if options.get("train_norm") else ()))
    preset = lycoris_preset(
        *kinds, algo_map={kind: {"algo": algo, **per_layer} for kind in kinds} if per_layer else None
    )
    monkeypatch.setitem(PRESET, "these tests", preset)
    model = net()
    network = lycoris.create_lycoris(
        model,
        1.0,
        linear_dim=dim,
        linear_alpha=3.0,
        conv_dim=dim,
        conv_alpha=3.0,
        algo=algo,
        preset="these tests",
        **options,
    )
    network.apply_to()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(network.named_parameters()):
            noise = torch.randn(parameter.shape, generator=gen(10 + number))
            last = name.rpartition(".")[2]
            if last in ("dora_scale", "rescale"):
                parameter.mul_(1 + 0.3 * noise)
            elif last == "scalar":
                parameter.fill_(0.8)
            else:
                parameter.add_(0.2 * noise)
    file = folder / "lycoris.safetensors"
    network.eval().save_weights(str(file), None, None)
    return file, model, network


def as_it_runs(model, network, strengths=STRENGTHS):
    references = {}
    for strength in strengths:
        network.set_multiplier(strength)
        references[strength] = forward(model).clone()
    return references


ALPHA = {"alpha_matters": True}
LYCORIS = {
    "locon": ({}, {"bypassed": 4, **ALPHA}),
    "locon rslora": ({"per_layer": {"rs_lora": True}}, {"bypassed": 4, **ALPHA}),
    "locon tucker": ({"use_tucker": True}, {"bypassed": 4, **ALPHA}),
    "locon scalar": ({"use_scalar": True}, {"bypassed": 4, **ALPHA}),
    "loha": ({"algo": "loha"}, {"bypassed": 4, **ALPHA}),
    "loha rank 17": ({"algo": "loha", "dim": 17}, {"bypassed": 4, "pays": False, **ALPHA}),
    "loha tucker": ({"algo": "loha", "use_tucker": True}, {"bypassed": 3, **ALPHA}),
    "lokr": ({"algo": "lokr", "dim": 2, "factor": 2}, {"bypassed": 4, "pays": False, **ALPHA}),
    "lokr both": (
        {"algo": "lokr", "dim": 1, "factor": 4, "decompose_both": True},
        {"bypassed": 4, "pays": False, **ALPHA},
    ),
    "lokr full": ({"algo": "lokr", "full_matrix": True}, {"bypassed": 4, "pays": False}),
    "lokr tucker": (
        {"algo": "lokr", "dim": 1, "factor": 2, "use_tucker": True},
        {"bypassed": 3, "pays": False, **ALPHA},
    ),
    "glora": ({"algo": "glora"}, {"bypassed": 0, **ALPHA}),
    "full": ({"algo": "full"}, {"bypassed": 0, "used": 8, "merged": 4, "whole": True}),
    "norm": ({"train_norm": True}, {"bypassed": 4, "used": 6, "merged": 2, **ALPHA}),
    "ia3 out": ({"algo": "ia3"}, {"bypassed": 4}),
    "ia3 in": ({"algo": "ia3", "per_layer": {"train_on_input": True}}, {"bypassed": 4}),
    "diag-oft": ({"algo": "diag-oft"}, {"bypassed": 0}),
    "diag-oft bounded": ({"algo": "diag-oft", "constraint": 0.01}, {"bypassed": 0, **ALPHA}),
    "boft": ({"algo": "boft", "dim": 6}, {"bypassed": 0}),
    "boft bounded": ({"algo": "boft", "dim": 6, "constraint": 0.01}, {"bypassed": 0, **ALPHA}),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris(case, tmp_path, monkeypatch):
    options, expected = LYCORIS[case]
    file, model, network = trained_by_lycoris(tmp_path, monkeypatch, **options)
    check_all(file, as_it_runs(model, network), tmp_path, **expected)


RESCALED = {"diag-oft": {}, "diag-oft bounded": {"constraint": 0.01}, "boft": {"dim": 6}}


@pytest.mark.parametrize("case", RESCALED)
def test_lycoris_row_scales(case, tmp_path, monkeypatch):
    """LyCORIS leaves the row scale whole at every strength, so that only strength 1 can be asked of it."""
    file, model, network = trained_by_lycoris(
        tmp_path, monkeypatch, algo=case.split()[0], rescaled=True, **RESCALED[case]
    )
    check_all(file, as_it_runs(model, network, (1.0,)), tmp_path, bypassed=0)


DORA = {
    "locon": ({}, 4),
    "locon tucker": ({"use_tucker": True}, 4),
    "loha": ({"algo": "loha"}, 0),
    "lokr": ({"algo": "lokr", "dim": 2, "factor": 2}, 0),
}


@pytest.mark.parametrize("on_output", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("case", DORA)
def test_lycoris_dora_as_trained(case, on_output, tmp_path, monkeypatch):
    options, bypassed = DORA[case]
    file, model, network = trained_by_lycoris(tmp_path, monkeypatch, dora_wd=True, wd_on_output=on_output, **options)
    references = as_it_runs(model, network, (1.0,))
    network.restore()
    network.merge_to(1.0)
    merged = {name: p.detach().clone() for name, p in model.named_parameters()}
    if case.startswith("locon"):
        references[0.6] = partly(merged, 0.6)
    check_all(file, references, tmp_path, bypassed=bypassed, as_trained=True, alpha_matters=True)
    # The host means the same on the input axis alone.
    if on_output:
        assert_seen(net(), [(file, 1.0)], references[1.0], forward)
    else:
        check_in_modes(net(), file, references[1.0], forward, used=4)


# ---- peft


class TrainedByPeft:
    def __init__(self, config, folder):
        self.model = peft.get_peft_model(net(), config)
        with torch.no_grad():
            for number, (name, parameter) in enumerate(p for p in self.model.named_parameters() if p[1].requires_grad):
                noise = torch.randn(parameter.shape, generator=gen(20 + number))
                scaled = any(part in name for part in ("magnitude", "ia3_l", "boft_s"))
                parameter.copy_(parameter * (1 + 0.3 * noise) if scaled else noise * 0.2)
        self.model.eval().save_pretrained(folder)
        self.file = folder / "adapter_model.safetensors"

    def merged(self, scale=1.0):
        model = copy.deepcopy(self.model)
        if scale != 1.0:
            for layer in LAYERS:
                getattr(model.base_model.model, layer).set_scale("default", scale)
        return model.merge_and_unload()

    def references(self, has_strength):
        """`has_strength`: whether peft scales this kind; None where no way to a strength but 1 is comparable."""
        whole = self.merged()
        if has_strength is None:
            return {1.0: forward(whole)}
        weights = {name: p.detach() for name, p in whole.named_parameters()}
        return {1.0: forward(whole), 0.6: forward(self.merged(0.6)) if has_strength else partly(weights, 0.6)}


def lora(**more):
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(LAYERS), **more)


def others(kind, **more):
    return getattr(peft, kind)(target_modules=list(LAYERS), **more)


PEFT = {
    "lora": (lambda: lora(), True, {"bypassed": 4, **ALPHA}),
    "lora patterns": (
        lambda: lora(alpha_pattern={"qkv": 3}, rank_pattern={"conv3": 2}),
        True,
        {"bypassed": 4, **ALPHA},
    ),
    "rslora": (lambda: lora(use_rslora=True), True, {"bypassed": 4, **ALPHA}),
    "lora bias": (lambda: lora(lora_bias=True), True, {"bypassed": 4, "used": 8, "merged": 4, **ALPHA}),
    "dora": (lambda: lora(use_dora=True), False, {"bypassed": 4, "as_trained": True, **ALPHA}),
    "rsdora": (lambda: lora(use_dora=True, use_rslora=True), False, {"bypassed": 4, "as_trained": True, **ALPHA}),
    "loha": (lambda: others("LoHaConfig", r=4, alpha=6), True, {"bypassed": 4, **ALPHA}),
    "loha tucker": (
        lambda: others("LoHaConfig", r=4, alpha=6, use_effective_conv2d=True),
        True,
        {"bypassed": 3, **ALPHA},
    ),
    "lokr": (lambda: others("LoKrConfig", r=4, alpha=6), True, {"bypassed": 4, "pays": False, **ALPHA}),
    "lokr factored": (
        lambda: others("LoKrConfig", r=1, alpha=6, decompose_factor=4, decompose_both=True),
        True,
        {"bypassed": 4, "pays": False, **ALPHA},
    ),
    "oft": (lambda: others("OFTConfig", oft_block_size=4, r=0), False, {"bypassed": 0}),
    "oft exact": (
        lambda: others("OFTConfig", oft_block_size=4, r=0, use_cayley_neumann=False),
        False,
        {"bypassed": 0},
    ),
    # peft knows no strength here, and ours moves rotation and row factors each by its part: no straight line.
    "boft": (lambda: others("BOFTConfig", boft_block_size=4), None, {"bypassed": 0}),
    "ia3 out": (
        lambda: others("IA3Config", feedforward_modules=[]),
        False,
        {"bypassed": 4, "used": 8, "merged": 4},
    ),
    "ia3 in": (lambda: others("IA3Config", feedforward_modules=list(LAYERS)), False, {"bypassed": 4}),
}


# peft takes the 1-D bias for a shard that DeepSpeed left behind.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("case", PEFT)
def test_peft(case, tmp_path, monkeypatch):
    monkeypatch.setattr(boft_layer, "_FBD_CUDA", BlockDiagonal)
    make, has_strength, expected = PEFT[case]
    trained = TrainedByPeft(make(), tmp_path)
    references = trained.references(has_strength)
    check_all(trained.file, references, tmp_path, **expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))

    def with_config_inside(tensors, metadata):
        metadata["lora_adapter_metadata"] = json.dumps(config)

    # The same settings as diffusers writes them, and no file beside.
    moved = tampered(trained.file, tmp_path / "inside", with_config_inside)
    moved = moved.rename(moved.with_name("style.safetensors"))
    as_trained = expected.get("as_trained", False)
    check_in_modes(net(), moved, references[1.0], forward, used=expected.get("used", 4), as_trained=as_trained)
