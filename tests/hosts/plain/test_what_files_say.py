"""LoRA files as people have them, through `LoraGuard`: the model's weights against the trainer's own formula in float64."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from support.make import rand

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraFileError, LoraMismatchError

WIDTH, RANK = 12, 4


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(WIDTH, WIDTH)
        self.to_k = torch.nn.Linear(WIDTH, WIDTH)
        self.proj_out = torch.nn.Linear(WIDTH, WIDTH)
        self.norm_q = torch.nn.LayerNorm(WIDTH)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.fc1 = torch.nn.Linear(WIDTH, WIDTH)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.proj_out = torch.nn.Linear(WIDTH, WIDTH)
        self.conv = torch.nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        self.emb = torch.nn.Embedding(9, WIDTH)
        self.double()
        with torch.no_grad():
            for n, parameter in enumerate(self.parameters()):
                parameter.copy_(rand(*parameter.shape, seed=n))


Q, K, FC = "blocks.0.attn.to_q", "blocks.0.attn.to_k", "blocks.1.fc1"


def r(*shape, n=0):
    return rand(*shape, seed=900 + n, scale=0.3)


def factors(n=0, rank=RANK):
    """`(down, up)` and their product."""
    down, up = r(rank, WIDTH, n=2 * n), r(WIDTH, rank, n=2 * n + 1)
    return down, up, up.double() @ down.double()


def pair(module, n=0, down="lora_A.weight", up="lora_B.weight"):
    a, b, _ = factors(n)
    return {f"{module}.{down}": a, f"{module}.{up}": b}


def delta(n=0):
    return factors(n)[2]


@pytest.fixture
def model():
    return Model()


def write(path, tensors, metadata=None, config=None):
    if config is not None:
        path = path.with_name("adapter_model.safetensors")
        path.with_name("adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(path), metadata)
    return path


def check(model, path, changes, **options):
    """Every weight is its own plus `changes`, by name; and all are themselves again afterwards."""
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    guard = LoraGuard(model)
    report = guard.apply([(path, 1.0)], mode="merge", **options)
    for name, parameter in model.named_parameters():
        wanted = changes.get(name, torch.zeros(()))
        error = (parameter.detach() - base[name] - wanted).norm()
        limit = wanted.norm() if name in changes else base[name].norm()
        assert error <= 1e-4 * limit, f"{name}: off by {error / limit:.3g}"
    guard.remove()
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())
    return report


def dora(model, module, change, magnitude):
    """The change of a DoRA by rows, as PEFT and ai-toolkit have it."""
    weight = model.get_submodule(module).weight.detach()
    patched = weight + change
    return magnitude.double()[:, None] / patched.norm(dim=1, keepdim=True) * patched - weight


# Spellings of one module.


def loha(name):
    fields = zip(("w1_a", "w1_b", "w2_a", "w2_b"), ((WIDTH, RANK), (RANK, WIDTH)) * 2, strict=True)
    return {name(f"hada_{field}"): r(*shape, n=20 + n) for n, (field, shape) in enumerate(fields)}


def loha_delta():
    a, b, c, d = (t.double() for t in loha(str).values())
    return (a @ b) * (c @ d)


SPELLINGS = {
    "OneTrainer, one dot lost": ("lora_unet_blocks_0_attn.to_q.{}", "lora_unet_blocks_0_attn_to_q.alpha"),
    "OneTrainer, no dot before the field": ("lora_unet_blocks_0_attn_to_q_{}", "lora_unet_blocks_0_attn_to_q.alpha"),
    "no dot at all": ("lora_unet_blocks_0_attn_to_q_{}", "lora_unet_blocks_0_attn_to_q_alpha"),
    "dotted and flat": ("blocks.0.attn.to_q.{}", "blocks_0_attn_to_q.alpha"),
    "component and trainer": ("transformer.blocks.0.attn.to_q.{}", "lora_transformer_blocks_0_attn_to_q.alpha"),
    "two trainers": ("lora_unet_blocks_0_attn_to_q.{}", "lycoris_blocks_0_attn_to_q.alpha"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_alpha_in_another_spelling_than_its_factors(case, model, tmp_path):
    name, alpha = SPELLINGS[case]
    tensors = {**loha(name.format), alpha: torch.tensor(1.0)}
    report = check(model, write(tmp_path / "a.safetensors", tensors), {f"{Q}.weight": loha_delta() / RANK})
    assert not report.loras[0].skipped
    # The other way round too: the order in the file has no say.
    check(
        model, write(tmp_path / "b.safetensors", dict(reversed(tensors.items()))), {f"{Q}.weight": loha_delta() / RANK}
    )


def test_magnitude_bias_and_factors_in_other_spellings(model, tmp_path):
    down, up, product = factors()
    magnitude, bias = r(WIDTH, n=50).abs() + 1, r(WIDTH, n=51)
    tensors = {
        "lora_unet_blocks_0_attn_to_q.lora_down.weight": down,
        "blocks.0.attn.to_q.lora_up.weight": up,
        "lora_unet_blocks_0_attn_to_q.alpha": torch.tensor(2.0),
        "lora_unet_blocks_0_attn.to_q.lora_magnitude_vector": magnitude,
        "lora_unet_blocks_0_attn.to_q.diff_b": bias,
    }
    wanted = dora(model, Q, product * 2 / RANK, magnitude)
    path = write(tmp_path / "a.safetensors", tensors)
    check(model, path, {f"{Q}.weight": wanted, f"{Q}.bias": bias.double()}, as_trained=True)


def test_a_scale_that_belongs_nowhere_is_lost_and_said(model, tmp_path):
    path = write(tmp_path / "a.safetensors", {**pair(Q), "lora_unet_other.alpha": torch.tensor(1.0)})
    (lora,) = check(model, path, {f"{Q}.weight": delta()}).loras
    assert lora.is_worrying
    assert "lora_unet_other.alpha: belongs to no factors in the file" in lora.lost[0]


def test_two_scales_that_contradict_are_refused(model, tmp_path):
    both = {**pair(Q), f"{Q}.alpha": torch.tensor(1.0), "blocks_0_attn_to_q.alpha": torch.tensor(4.0)}
    with pytest.raises(LoraFileError, match="one module in two spellings, with different values"):
        LoraGuard(model).apply([(write(tmp_path / "a.safetensors", both), 1.0)])
    both["blocks_0_attn_to_q.alpha"] = torch.tensor(1.0)
    check(model, write(tmp_path / "b.safetensors", both), {f"{Q}.weight": delta() / RANK})


def test_a_scale_behind_the_prefixes_of_a_pipeline_belongs_to_its_module(model, tmp_path):
    both = {**pair(Q), f"pipe.dit.{Q}.alpha": torch.tensor(1.0)}
    check(model, write(tmp_path / "a.safetensors", both), {f"{Q}.weight": delta() / RANK})


def test_two_encoders_are_not_one_module():
    from lib_lora_guard.adapters.module_names import plain_name

    names = ["lora_te1_x", "lora_te2_x", "lora_unet_x", "transformer_2.x", "text_encoder_2.y", "text_encoders.clip_l.x"]
    assert len({plain_name(name) for name in names}) == len(names)
    assert plain_name("transformer.transformer_blocks.0") == plain_name("lora_unet_transformer_blocks_0")
    # Every prefix that a name may have before a model's module, `models.names` takes off too.
    starts = ("pipe.dit.", "net.", "model.", "lora_unet__", "base_model.model.unet.", "module._orig_mod.transformer.")
    assert {plain_name(start + "blocks.0.to_q") for start in starts} == {"blocks_0_to_q"}
    assert plain_name("text_encoder.a.b") == plain_name("lora_te1_a_b") == plain_name("lora_te_a_b")


# Settings.


@pytest.mark.parametrize("place", ["metadata", "config"])
@pytest.mark.parametrize(
    ("pattern", "alphas"),
    [
        ({"^proj_out": 2}, {"proj_out": 2, "blocks.0.attn.proj_out": 8}),
        ({r"blocks\.\d+\.attn\.proj_out": 2}, {"proj_out": 8, "blocks.0.attn.proj_out": 2}),
        ({"proj_out": 2, "attn.proj_out": 4}, {"proj_out": 2, "blocks.0.attn.proj_out": 2}),
        ({".*attn.proj_out": 4, "attn.proj_out": 2}, {"proj_out": 8, "blocks.0.attn.proj_out": 4}),
        ({"(proj_out|fc1)": 2}, {"proj_out": 2, "blocks.0.attn.proj_out": 2}),
        ({"pr.j_out": 2}, {"proj_out": 2, "blocks.0.attn.proj_out": 2}),
    ],
)
def test_patterns_are_matched_as_peft_does(pattern, alphas, place, model, tmp_path):
    entries = {"r": RANK, "lora_alpha": 8, "alpha_pattern": pattern}
    start = "transformer." if place == "metadata" else "base_model.model."
    tensors = pair(f"{start}proj_out", 0) | pair(f"{start}blocks.0.attn.proj_out", 1)
    text = json.dumps({f"transformer.{key}": value for key, value in entries.items()})
    options = (
        {"metadata": {"lora_adapter_metadata": text}}
        if place == "metadata"
        else {"config": {"peft_type": "LORA", **entries}}
    )
    wanted = {f"{name}.weight": delta(n) * alpha / RANK for n, (name, alpha) in enumerate(alphas.items())}
    check(model, write(tmp_path / "a.safetensors", tensors, **options), wanted)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ({"(a": 2}, "is not understood"),
        ({r"(a)\1": 2}, "is not understood"),
        ({"(?=x)y": 2}, "is not understood"),
        ({"proj_out": "2"}, "no usable number"),
    ],
)
def test_a_pattern_that_is_not_understood_is_refused(pattern, why, model, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 8, "alpha_pattern": pattern})}
    with pytest.raises(LoraFileError, match=why):
        LoraGuard(model).apply([(write(tmp_path / "a.safetensors", pair("proj_out"), metadata), 1.0)])


@pytest.mark.parametrize("expression", ["conv", [".conv"], r"(conv|x)", r"c[o]nv", r"[a-z]+"])
def test_an_ia3_of_a_square_convolution_is_on_the_input_as_pefts_expression_says(expression, model, tmp_path):
    factor = r(WIDTH, n=60).abs() + 0.5
    config = {"peft_type": "IA3", "feedforward_modules": expression}
    tensors = {"base_model.model.conv.ia3_l": factor.reshape(1, -1, 1, 1)}
    on_input = expression != [".conv"]
    shape = (1, -1, 1, 1) if on_input else (-1, 1, 1, 1)
    weight = model.conv.weight.detach()
    wanted = {"conv.weight": weight * (factor.double() - 1).reshape(shape)}
    check(model, write(tmp_path / "a.safetensors", tensors, config=config), wanted)


STATED = {
    "finetrainers": {"lora_config": json.dumps({"r": RANK, "lora_alpha": 16})},
    "flat": {"lora_alpha": "16", "r": str(RANK)},
    "component": {"transformer.lora_alpha": "16", "transformer.r": str(RANK)},
    "alpha and rank": {"alpha": "16", "rank": str(RANK)},
    "kohya": {"ss_network_alpha": "16.0", "ss_network_dim": str(RANK)},
}


@pytest.mark.parametrize("case", STATED)
def test_alpha_stands_in_the_metadata_alone(case, model, tmp_path, caplog):
    path = write(tmp_path / "a.safetensors", pair(f"transformer.{Q}"), STATED[case])
    check(model, path, {f"{Q}.weight": delta() * 16 / RANK})
    assert ("alpha 16, the tensors do not" in caplog.text) == (case != "finetrainers")


def test_an_alpha_for_another_rank_is_named_and_not_used(model, tmp_path, caplog):
    path = write(tmp_path / "a.safetensors", pair(Q), {"lora_alpha": "16", "r": "8"})
    check(model, path, {f"{Q}.weight": delta()})
    assert "1 modules have no alpha, and that of the metadata is for rank 8 while theirs is 4" in caplog.text


ALONE = {
    "lora_alpha": ({"lora_alpha": "16"}, 16),
    "component": ({"transformer.lora_alpha": "16"}, 16),
    "kohya": ({"ss_network_alpha": "16", "ss_network_dim": "Dynamic"}, 16),
    "kohya's zero": ({"ss_network_alpha": "0"}, RANK),
    "a bare name": ({"alpha": "16"}, None),
    "no number": ({"lora_alpha": "many", "r": str(RANK)}, None),
}


@pytest.mark.parametrize("case", ALONE)
def test_an_alpha_without_a_rank_is_for_factors_of_one_rank(case, model, tmp_path, caplog):
    metadata, alpha = ALONE[case]
    path = write(tmp_path / "a.safetensors", {**pair(f"transformer.{Q}"), **pair(f"transformer.{K}", 1)}, metadata)
    scale = 1 if alpha is None else alpha / RANK
    check(model, path, {f"{Q}.weight": delta() * scale, f"{K}.weight": delta(1) * scale})
    entry, value = next(iter(metadata.items()))
    said = f"the metadata has {entry} = {value} without a rank, and 2 modules of rank 4 have no alpha"
    assert (said in caplog.text) == (alpha is None)
    assert (f"states alpha {alpha}, the tensors do not; it is used for 2 modules" in caplog.text) == (alpha is not None)


def test_an_alpha_without_a_rank_is_named_where_ranks_differ(model, tmp_path, caplog):
    tensors = {**pair(Q), f"{K}.lora_A.weight": r(2, WIDTH, n=1), f"{K}.lora_B.weight": r(WIDTH, 2, n=2)}
    path = write(tmp_path / "a.safetensors", tensors, {"lora_alpha": "16"})
    check(model, path, {f"{Q}.weight": delta(), f"{K}.weight": r(WIDTH, 2, n=2).double() @ r(2, WIDTH, n=1).double()})
    assert "has lora_alpha = 16 without a rank, and 2 modules of rank 2, 4 have no alpha" in caplog.text


@pytest.mark.parametrize("end", ["", " "])
def test_tensors_have_the_say_over_an_alpha_without_a_rank(end, model, tmp_path, caplog):
    tensors = {**pair(Q), f"{Q}.alpha": torch.tensor(2.0)}
    check(model, write(tmp_path / "a.safetensors", tensors, {"lora_alpha": f"16{end}"}), {f"{Q}.weight": delta() / 2})
    assert not caplog.text


@pytest.mark.parametrize("kind", ["diff", "ia3"])
def test_an_alpha_beside_a_kind_without_a_scale_is_no_warning(kind, model, tmp_path, caplog):
    """The host reads none there either."""
    change, factor = r(WIDTH, WIDTH), r(WIDTH, 1, n=3)
    ia3 = {f"{Q}.weight": factor, f"{Q}.on_input": torch.tensor(False)}
    tensors = {f"{Q}.diff": change} if kind == "diff" else ia3
    weight = model.state_dict()[f"{Q}.weight"]
    wanted = change.double() if kind == "diff" else weight.double() * factor.double()
    (lora,) = check(
        model, write(tmp_path / "a.safetensors", {**tensors, f"{Q}.alpha": torch.tensor(2.0)}), {f"{Q}.weight": wanted}
    ).loras
    assert (lora.lost, lora.skipped, lora.is_worrying) == ([], [], False)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_tensors_have_the_say_over_text(model, tmp_path):
    tensors = {**pair(Q), f"{Q}.alpha": torch.tensor(2.0), **pair(K, 1)}
    path = write(tmp_path / "a.safetensors", tensors, {"ss_network_alpha": "16", "ss_network_dim": str(RANK)})
    check(model, path, {f"{Q}.weight": delta() * 2 / RANK, f"{K}.weight": delta(1)})


def test_patterns_for_names_without_dots_are_refused_with_the_next_step(model, tmp_path):
    config = json.dumps({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"to_q": 2}})
    flat = pair("lora_unet_blocks_0_attn_to_q", down="lora_down.weight", up="lora_up.weight")
    path = write(tmp_path / "a.safetensors", flat, {"lora_adapter_metadata": config})
    with pytest.raises(LoraFileError) as caught:
        LoraGuard(model).apply([(path, 1.0)])
    assert str(caught.value) == (
        "a.safetensors: its settings are for single modules by their names with dots, and the file has "
        "lora_unet_blocks_0_attn_to_q; save it again in the names of PEFT or diffusers"
    )


@pytest.mark.parametrize(
    "entries",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"kasa_config": {"beta": 1e-4}},
        {"peft_type": "C3A"},
    ],
)
@pytest.mark.parametrize("place", ["metadata", "config"])
def test_a_base_or_a_formula_that_the_file_does_not_hold_is_refused_by_name(entries, place, model, tmp_path):
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, **entries}
    options = {"config": config} if place == "config" else {"metadata": {"lora_adapter_metadata": json.dumps(config)}}
    said = next(iter(entries.values())) if isinstance(next(iter(entries.values())), str) else next(iter(entries))
    with pytest.raises(LoraFileError, match=said):
        LoraGuard(model).apply([(write(tmp_path / "a.safetensors", pair(f"base_model.model.{Q}"), **options), 1.0)])


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_other_starts_leave_the_base_as_it_is(start, model, tmp_path):
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "init_lora_weights": start}
    path = write(tmp_path / "a.safetensors", pair(f"base_model.model.{Q}"), config=config)
    check(model, path, {f"{Q}.weight": delta() * 2})


def test_settings_that_are_not_understood_are_named(model, tmp_path, caplog):
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4,
        "fan_in_fan_out": True,
        "task_type": None,
        "new_thing": 3,
    }
    path = write(tmp_path / "a.safetensors", pair(f"base_model.model.{Q}"), config=config)
    check(model, path, {f"{Q}.weight": delta()})
    assert (
        "2 of its settings are not understood and may change the result (first: fan_in_fan_out, new_thing)"
        in caplog.text
    )


# Fields.


def test_ai_toolkits_magnitude_makes_a_dora(model, tmp_path):
    magnitude = r(WIDTH, n=50).abs() + 1
    path = write(tmp_path / "a.safetensors", {**pair(Q), f"{Q}.magnitude": magnitude})
    check(model, path, {f"{Q}.weight": dora(model, Q, delta(), magnitude)}, as_trained=True)


def test_factors_without_weight_in_their_names(model, tmp_path):
    path = write(tmp_path / "a.safetensors", pair(f"diffusion_model.{Q}", down="lora_A", up="lora_B"))
    check(model, path, {f"{Q}.weight": delta()})


def test_the_whole_difference_counts_beside_factors(model, tmp_path):
    whole = r(WIDTH, WIDTH, n=70)
    tensors = {**pair(Q), f"{Q}.alpha": torch.tensor(1.0), f"{Q}.diff": whole, **pair(K, 1)}
    (lora,) = check(
        model, write(tmp_path / "a.safetensors", tensors), {f"{Q}.weight": whole.double(), f"{K}.weight": delta(1)}
    ).loras
    assert any(
        f"{Q}.lora_A.weight: is left out: the file has a whole diff of {Q} beside it" in said for said in lora.lost
    )


def test_a_field_that_is_not_known_refuses_only_where_its_module_is_applied(model, tmp_path):
    with pytest.raises(LoraFileError, match="KaSA"):
        LoraGuard(model).apply([(write(tmp_path / "a.safetensors", {**pair(Q), f"{Q}.lora_diag": r(RANK)}), 1.0)])
    with pytest.raises(LoraFileError, match=rf"a\.safetensors: {Q}\.lora_new belongs to a module that is applied"):
        LoraGuard(model).apply([(write(tmp_path / "a.safetensors", {**pair(Q), f"{Q}.lora_new": r(RANK)}), 1.0)])
    harmless = {
        **pair(Q), f"{Q}.lora_velora_embed": r(3), f"{Q}.reshape_weight": torch.tensor([12, 12]), "bundle_emb.x": r(3)
    }  # fmt: skip
    check(model, write(tmp_path / "a.safetensors", harmless), {f"{Q}.weight": delta()})


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (("hira_A", "hira_B"), "HIRA adapter of PEFT"),
        (("c3a_kernel",), "C3A adapter of PEFT"),
        (("lora_A", "lora_B", "lora_E"), "ADALORA adapter of PEFT"),
        (("glora_A.Xd", "glora_A.Xu"), "GLORA adapter of PEFT"),
        (
            ("supertuning_lora_A.weight", "supertuning_lora_B.weight", "supertuning_values"),
            "SUPERTUNING adapter of PEFT",
        ),
        (("poly_lora_A", "poly_lora_B"), "POLY adapter of PEFT"),
        (("pvera_lambda_b",), "PVERA adapter of PEFT"),
        (("trainable_tokens_delta",), "TRAINABLE_TOKENS adapter of PEFT"),
        (("q_layer.weight", "p_layer.weight", "lambda_layer"), "T-LoRA adapter of LyCORIS"),
    ],
)
def test_kinds_that_are_not_supported_are_named(keys, kind, model, tmp_path):
    path = write(tmp_path / "a.safetensors", {f"base_model.model.{Q}.{key}": r(4, 4) for key in keys})
    with pytest.raises(LoraFileError, match=f"a {kind}, a kind that cannot be applied here; merge it"):
        LoraGuard(model).apply([(path, 1.0)])


# Beside the factors.


def test_whole_parameters_beside_the_factors_replace_the_models(model, tmp_path):
    head, norm, bias, fc_bias = r(WIDTH, WIDTH, n=80), r(WIDTH, n=81), r(WIDTH, n=82), r(WIDTH, n=83)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "modules_to_save": ["proj_out"], "bias": "all"}
    tensors = {
        **pair(Q), "proj_out.weight": head, "proj_out.bias": bias,
        "blocks.0.attn.norm_q.weight": norm, f"{FC}.bias": fc_bias,
    }  # fmt: skip
    path = write(tmp_path / "a", {f"base_model.model.{key}": value for key, value in tensors.items()}, config=config)
    base = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = {f"{Q}.weight": delta()}
    wanted |= {key: value.double() - base[key] for key, value in tensors.items() if "lora" not in key}
    check(model, path, wanted)


def test_diffusers_trained_norms_need_no_settings(model, tmp_path):
    norm = r(WIDTH, n=81)
    path = write(
        tmp_path / "a.safetensors", {**pair(f"transformer.{Q}"), "transformer.blocks.0.attn.norm_q.weight": norm}
    )
    own = model.blocks[0].attn.norm_q.weight.detach()
    check(model, path, {f"{Q}.weight": delta(), "blocks.0.attn.norm_q.weight": norm.double() - own})


def test_a_lora_on_an_embedding(model, tmp_path):
    first, second = r(RANK, 9, n=90), r(WIDTH, RANK, n=91)
    start = "base_model.model."
    tensors = {**pair(f"{start}{Q}"), f"{start}emb.lora_embedding_A": first, f"{start}emb.lora_embedding_B": second}
    path = write(tmp_path / "a", tensors, config={"peft_type": "LORA", "r": RANK, "lora_alpha": 8})
    check(model, path, {f"{Q}.weight": delta() * 2, "emb.weight": (second.double() @ first.double()).mT * 2})


@pytest.mark.filterwarnings("ignore")
def test_the_attention_that_peft_wraps_is_as_peft_merges_it(tmp_path):
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(WIDTH, 2)}).double()
    trained = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["attn"], init_lora_weights=False)
    )
    trained.save_pretrained(tmp_path)
    merged = dict(trained.merge_and_unload().named_parameters())
    names = ("attn.in_proj_weight", "attn.out_proj.weight")
    wanted = {
        name: (merged[name] - parameter).detach() for name, parameter in model.named_parameters() if name in names
    }
    check(model, tmp_path / "adapter_model.safetensors", wanted)


def test_what_is_left_out_is_said_with_its_share(model, tmp_path):
    some = {key: value for n in range(8) for key, value in pair(f"blocks.{n % 2}.attn.to_{'qk'[n % 4 // 2]}").items()}
    left = pair("blocks.7.attn.to_q", 1)
    (lora,) = LoraGuard(model).apply([(write(tmp_path / "a.safetensors", {**some, **left}), 1.0)]).loras
    assert (lora.left_out.modules, lora.left_out.of) == (1, 5)
    assert lora.left_out.keys == tuple(sorted(left))
    assert lora.is_worrying
    assert "1 of 5 modules LEFT OUT (first: blocks.7.attn.to_q.lora_A.weight)" in str(lora)


def test_a_file_of_which_most_is_left_out_counts_as_not_applied(model, tmp_path):
    tensors = {**pair(Q), **pair("blocks.7.attn.to_q", 1), **pair("blocks.8.attn.to_q", 2)}
    with pytest.raises(LoraMismatchError, match="2 of its 3 modules have no place in this model"):
        LoraGuard(model).apply([(write(tmp_path / "a.safetensors", tensors), 1.0)])
    # Text encoders that this model does not have are no part of the count.
    text = {key: value for n in range(4) for key, value in pair(f"lora_te_text_model_encoder_layers_{n}_fc1").items()}
    (lora,) = check(model, write(tmp_path / "a.safetensors", {**pair(Q), **text}), {f"{Q}.weight": delta()}).loras
    assert (lora.left_out.modules, lora.left_out.of) == (0, 1)


def test_the_models_own_state_is_never_changed_by_a_refusal(model, tmp_path):
    base = copy.deepcopy(model.state_dict())
    path = write(tmp_path / "a.safetensors", {**pair(Q), f"{Q}.lora_E": r(RANK, 1)})
    with pytest.raises(LoraFileError, match="ADALORA"):
        LoraGuard(model).apply([(path, 1.0)])
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", ["equal", "other", "difference", "whole", "embedding", "scalar"])
def test_the_header_alone_says_the_same(case, model, tmp_path):
    from lib_lora_guard.adapters.files import lora_of_header, open_lora, read_lora_file

    tensors = {
        "equal": {**pair(Q), f"{Q}.alpha": torch.tensor(1.0), "blocks_0_attn_to_q.alpha": torch.tensor(1.0)},
        "other": {**pair(Q), f"{Q}.alpha": torch.tensor(1.0), "blocks_0_attn_to_q.alpha": torch.tensor(2.0)},
        "difference": {**pair(Q), f"{Q}.diff": r(WIDTH, WIDTH), "x.alpha": torch.tensor(1.0)},
        "whole": {**pair(Q), "norm.weight": r(WIDTH), "head.weight": r(WIDTH, WIDTH), "head.bias": r(WIDTH)},
        "embedding": {"emb.lora_embedding_A": r(RANK, 9), "emb.lora_embedding_B": r(WIDTH, RANK)},
        "scalar": {**pair(Q), f"{Q}.scalar": torch.tensor(0.5)},
    }[case]
    path, said = write(tmp_path / "a.safetensors", tensors), []
    for read in (read_lora_file, lambda path: lora_of_header(open_lora(path))):
        try:
            file = read(path)
            said.append((file.adapters.keys(), file.unknown_keys, dict(file.lost), file.keys))
        except LoraFileError as error:
            said.append(str(error))
    assert said[0] == said[1]
    assert isinstance(said[0], str) == (case == "other")


def test_a_scalar_counts_without_an_alpha_too(model, tmp_path):
    path = write(tmp_path / "a.safetensors", {**pair(Q), f"{Q}.scalar": torch.tensor(0.5)})
    check(model, path, {f"{Q}.weight": delta() / 2})


def test_inspect_shows_the_files_own_names(tmp_path, capsys):
    from lib_lora_guard.cli import main

    other = {"lora_unet_x.lora_magnitude_vector": r(WIDTH), "x.lora_velora_embed": r(3)}
    path = write(tmp_path / "a.safetensors", {**pair(Q), **other}, {"lora_alpha": "8", "r": "4"})
    assert main(["inspect", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["first_unknown"] == sorted(other)
    assert main(["inspect", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "lora_unet_x.lora_magnitude_vector: belongs to no factors in the file" in said
    assert "the metadata states alpha 8" in said
