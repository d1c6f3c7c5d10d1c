"""Layers that a LoRA does not fit: filled where an input projection is wider, else left out alone, for the true reason."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.make import rand
from support.trainer_formulas import assert_as_trained, layers

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraFileError, LoraMismatchError


def net(channels=9):
    return layers(
        conv_in=torch.nn.Conv2d(channels, 8, 3), to_q=torch.nn.Linear(8, 8), to_k=torch.nn.Linear(8, 8),
        to_v=torch.nn.Linear(8, 8),
    )  # fmt: skip


def r(*shape, seed):
    return rand(*shape, seed=seed, scale=0.3)


def attention(name="to_q"):
    return {f"{name}.lora_up.weight": r(8, 2, seed=90), f"{name}.lora_down.weight": r(2, 8, seed=91)}


def of_attention(model):
    return {"to_q": model["to_q"].weight.double() + r(8, 2, seed=90).double() @ r(2, 8, seed=91).double()}


def conv_in(kind, channels):
    """The tensors of one kind for a 3x3 convolution of some input channels, and its delta in float64."""
    c = channels
    if kind == "lora":
        up, down = r(8, 2, 1, 1, seed=1), r(2, c, 3, 3, seed=2)
        return {"lora_up.weight": up, "lora_down.weight": down}, up.double().flatten(1) @ down.double().flatten(1)
    if kind == "lora tucker":
        up, mid, down = r(8, 2, 1, 1, seed=1), r(2, 2, 3, 3, seed=2), r(2, c, 1, 1, seed=3)
        core = torch.einsum("ab...,bc->ac...", mid.double(), down.double().flatten(1))
        return {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, torch.einsum(
            "oa,ac...->oc...", up.double().flatten(1), core
        )
    if kind == "loha":
        factors = {
            f"hada_w{n}_{x}": r(*s, seed=10 * n + k)
            for n in (1, 2)
            for k, (x, s) in enumerate((("a", (8, 2)), ("b", (2, c * 9))))
        }
        a1, b1, a2, b2 = (t.double() for t in factors.values())
        return factors, (a1 @ b1) * (a2 @ b2)
    if kind == "lokr":
        left, right = r(2, 1, seed=1), r(4, c, 3, 3, seed=2)
        return {"lokr_w1": left, "lokr_w2": right}, torch.kron(left[..., None, None].double(), right.double())
    diff = r(8, c, 3, 3, seed=1)
    return {"diff": diff}, diff.double()


KINDS = ["lora", "lora tucker", "loha", "lokr", "diff"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wider_input_gets_zeros_where_the_file_has_no_channels(kind, tmp_path):
    """A1111 and SD.Next: an inpainting U-Net's `conv_in` has nine channels, the first four are those of the image."""
    model = net()
    tensors, delta = conv_in(kind, 4)
    wanted = model["conv_in"].weight.double()
    wanted[:, :4] += delta.reshape(8, 4, 3, 3)
    file = {f"lora_unet_conv_in.{key}": tensor for key, tensor in tensors.items()}
    assert_as_trained(tmp_path, model, {**file, **attention()}, {"conv_in": wanted, **of_attention(model)})


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_narrower_input_is_left_out_alone(kind, tmp_path):
    model = net(channels=4)
    file = {f"conv_in.{key}": tensor for key, tensor in conv_in(kind, 9)[0].items()}
    others = {**attention(), **attention("to_k")}
    same = {"to_k": model["to_k"].weight - model["to_q"].weight + of_attention(model)["to_q"]}
    assert_as_trained(tmp_path, model, {**file, **others}, {**of_attention(model), **same}, lost=1)
    report = LoraGuard(model).apply([(tmp_path / "trained.safetensors", 1.0)])
    assert report.loras[0].lost[0].startswith("conv_in.weight: ")
    assert "the weight is [8, 4, 3, 3]" in report.loras[0].lost[0]


def turn_of(packed, size):
    """peft's five Neumann terms, which it multiplies a linear layer's input with: `W R^T`."""
    upper = torch.triu_indices(size, size, 1)
    skew = torch.zeros(packed.shape[0], size, size).double()
    skew[:, upper[0], upper[1]] = packed.double()
    skew = skew - skew.mT
    return torch.block_diag(*(torch.eye(size) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q for q in skew))


def butterfly_of(blocks):
    """peft's first stage of BOFT, Cayley's transform of half the skew part: `W B`."""
    halves, eye = [(q - q.T).double() / 2 for q in blocks], torch.eye(4).double()
    return torch.block_diag(*((eye + half) @ torch.linalg.inv(eye - half) for half in halves))


NARROW, WIDE = 16, 40


def on_the_input(kind, narrow):
    """The tensors of one kind for a linear layer of 16 inputs, and its weight `(8, 16)` with them, in float64."""
    w = narrow.double()
    if kind == "ia3":
        factor = r(1, NARROW, seed=1)
        return {"weight": factor, "on_input": torch.tensor(True)}, w * (1 + factor.double())
    if kind == "peft ia3":
        factor = 1 + r(1, NARROW, seed=1)
        return {"ia3_l": factor}, w * factor.double()
    if kind.startswith("glora"):
        shapes = {"a1": (NARROW, 2), "a2": (2, NARROW), "b1": (8, 2), "b2": (2, NARROW)}
        a1, a2, b1, b2 = (r(*shape, seed=n) for n, shape in enumerate(shapes.values()))
        wanted = w + b1.double() @ b2.double() + w @ a1.double() @ a2.double()
        if kind == "glora old":
            a1, a2, b1, b2 = a2, a1, b2, b1
        return {f"{name}.weight": t for name, t in zip(shapes, (a1, a2, b1, b2), strict=True)}, wanted
    if kind == "peft boft":
        blocks, factor = r(1, 4, 4, 4, seed=1), 1 + r(8, 1, seed=2)
        return {"boft_R": blocks, "boft_s": factor}, (w @ butterfly_of(blocks[0]), factor.double())
    packed = r(4, 6, seed=1)
    if kind == "oft and row factors":
        factor = 1 + r(8, 1, seed=2)
        return {"oft_R.weight": packed, "dora_multiplier": factor}, (w @ turn_of(packed, 4).T, factor.double())
    return {"oft_R.weight": packed}, w @ turn_of(packed, 4).T


@pytest.mark.parametrize(
    "kind", ["ia3", "peft ia3", "glora", "glora old", "peft oft", "oft and row factors", "peft boft"]
)
def test_kinds_that_act_on_the_input_leave_further_channels_as_they_are(kind, tmp_path):
    """Flux Fill and Depth: `x_embedder` has 384 or 128 inputs, of which the first 64 are those of the image."""
    model = layers(x_embedder=torch.nn.Linear(WIDE, 8), to_q=torch.nn.Linear(8, 8))
    wanted = model["x_embedder"].weight.double()
    tensors, narrow = on_the_input(kind, wanted[:, :NARROW])
    narrow, of_rows = narrow if isinstance(narrow, tuple) else (narrow, 1.0)
    wanted[:, :NARROW] = narrow
    # Rotation and row factor are moved by the strength one by one.
    strengths = (1.0, 0.6) if isinstance(of_rows, float) else (1.0,)
    file = {f"x_embedder.{key}": tensor for key, tensor in tensors.items()}
    wanted = {"x_embedder": wanted * of_rows, **of_attention(model)}
    assert_as_trained(tmp_path, model, {**file, **attention()}, wanted, strengths=strengths)


@pytest.mark.parametrize("kind", ["ia3", "peft ia3", "glora", "peft oft", "peft boft"])
def test_they_are_left_out_where_the_layer_is_no_input_projection(kind, tmp_path):
    model = layers(proj=torch.nn.Linear(WIDE, 8), to_q=torch.nn.Linear(8, 8), to_k=torch.nn.Linear(8, 8))
    file = {f"proj.{key}": t for key, t in on_the_input(kind, model["proj"].weight[:, :NARROW])[0].items()}
    lora = applied(tmp_path, model, {**file, **attention(), **attention("to_k")})
    assert (lora.used, len(lora.lost), lora.refused) == (2, 1, None)
    assert lora.lost[0].startswith("proj.weight: ")


@pytest.mark.parametrize("kernel", [1, 3])
def test_glora_and_oft_of_a_convolution_leave_further_channels_as_they_are(kernel, tmp_path):
    model = layers(conv_in=torch.nn.Conv2d(9, 8, kernel), to_q=torch.nn.Linear(8, 8))
    weight = model["conv_in"].weight.double()
    a1, a2, b1 = r(4, 2, seed=1).double(), r(2, 4, seed=2).double(), r(8, 2, seed=3).double()
    b2 = r(2, 4, kernel, kernel, seed=4)
    wanted, known = weight.clone(), weight[:, :4]
    wanted[:, :4] += (b1 @ b2.double().flatten(1)).reshape(known.shape)
    wanted[:, :4] += torch.einsum("oikl,ir,rj->ojkl", known, a1, a2)
    file = {f"conv_in.{name}.weight": t.float() for name, t in (("a1", a1), ("a2", a2), ("b1", b1), ("b2", b2))}
    assert_as_trained(tmp_path, model, {**file, **attention()}, {"conv_in": wanted, **of_attention(model)})
    packed, wanted = r(kernel**2, 6, seed=5), weight.clone()
    wanted[:, :4] = (known.flatten(1) @ turn_of(packed, 4).T).reshape(known.shape)
    file = {"conv_in.oft_R.weight": packed, **attention()}
    metadata = {"lora_adapter_metadata": json.dumps({"peft_type": "OFT", "block_share": False})}
    assert_as_trained(
        tmp_path, model, file, {"conv_in": wanted, **of_attention(model)}, metadata=metadata, strengths=(1.0,)
    )


@pytest.mark.parametrize("shared", [True, False, None])
def test_one_block_is_for_all_inputs_or_for_the_first_as_the_settings_say(shared, tmp_path):
    model = layers(x_embedder=torch.nn.Linear(32, 8), to_q=torch.nn.Linear(8, 8))
    weight, packed = model["x_embedder"].weight.double(), r(1, 120, seed=1)
    first, turn = weight.clone(), turn_of(packed, 16)
    first[:, :16] = weight[:, :16] @ turn.T
    every = weight @ torch.block_diag(turn, turn).T
    file = {"x_embedder.oft_R.weight": packed, **attention()}
    wanted = of_attention(model)
    if shared is None:
        assert_as_trained(tmp_path, model, file, wanted, lost=1, strengths=(1.0,))
        why = LoraGuard(model).apply([(tmp_path / "trained.safetensors", 1.0)]).loras[0].lost[0]
        assert why.startswith("x_embedder.weight: its OFT has one block of 16 and the weight is [8, 32]")
        return
    metadata = {"lora_adapter_metadata": json.dumps({"peft_type": "OFT", "block_share": shared})}
    wanted["x_embedder"] = every if shared else first
    assert_as_trained(tmp_path, model, file, wanted, metadata=metadata, strengths=(1.0,))


def test_a_dora_of_onetrainers_oft_needs_the_norms_that_it_was_trained_with(tmp_path):
    model = layers(x_embedder=torch.nn.Linear(WIDE, 8), to_q=torch.nn.Linear(8, 8))
    packed, magnitude, norm = r(4, 6, seed=1), 1 + r(8, seed=2), 1.5 + r(8, seed=3)
    file = {"x_embedder.oft_R.weight": packed, "x_embedder.dora_scale": magnitude, **attention()}
    assert_as_trained(tmp_path, model, file, of_attention(model), lost=1, strengths=(1.0,))
    wanted = model["x_embedder"].weight.double()
    wanted[:, :NARROW] = wanted[:, :NARROW] @ turn_of(packed, 4).T
    wanted = wanted * (magnitude.double() / norm.double())[:, None]
    file["x_embedder.initial_norm"] = norm
    assert_as_trained(tmp_path, model, file, {"x_embedder": wanted, **of_attention(model)}, strengths=(1.0,))


def test_dora_of_a_narrower_input_is_left_out_alone(tmp_path):
    model = net()
    file = {f"conv_in.{key}": tensor for key, tensor in conv_in("lora", 4)[0].items()}
    file["conv_in.dora_scale"] = torch.ones(8, 1, 1, 1)
    assert_as_trained(tmp_path, model, {**file, **attention()}, of_attention(model), lost=1)


# ---- one rule: most of the file, or none of it


def applied(tmp_path, model, tensors, **options):
    save_file(tensors, tmp_path / "x.safetensors")
    return LoraGuard(model).apply([(tmp_path / "x.safetensors", 1.0)], **options).loras[0]


def wrong(name):
    return {f"{name}.lora_up.weight": r(6, 2, seed=1), f"{name}.lora_down.weight": r(2, 8, seed=2)}


def test_one_layer_of_the_wrong_size_is_left_out_alone(tmp_path):
    lora = applied(tmp_path, model := net(), {**attention("to_q"), **attention("to_k"), **wrong("to_v")})
    assert (lora.used, lora.refused) == (2, None)
    assert lora.lost == ["to_v.weight: up @ down gives [6, 8], the weight is [8, 8]"]
    assert model is not None


def test_half_of_the_layers_of_the_wrong_size_refuse_the_file(tmp_path):
    model = net()
    with pytest.raises(LoraMismatchError, match=r"made for another model: to_v\.weight"):
        applied(tmp_path, model, {**attention("to_q"), **wrong("to_v")})


def test_a_fused_tensor_of_the_wrong_size_is_left_out_alone(tmp_path):
    """On a model with query, key and value apart it is cut before anything else is looked at."""
    inner = {"attn.to_q": (8, 8), "attn.to_k": (8, 8), "attn.to_v": (8, 8), "proj_mlp": (8, 32), "proj_out": (40, 8)}
    model = torch.nn.Module()
    for name, sizes in inner.items():
        place = model
        *path, last = f"single_transformer_blocks.0.{name}".split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.add_module(last, torch.nn.Linear(*sizes))
    good = {n: {f"{n}.lora_A.weight": r(2, i, seed=1), f"{n}.lora_B.weight": r(o, 2, seed=2)} for n, o, i in (
        ("single_blocks.0.linear2", 8, 40), ("single_transformer_blocks.0.attn.to_q", 8, 8))}  # fmt: skip
    bad = {
        "single_blocks.0.linear1.lora_A.weight": r(2, 8, seed=1),
        "single_blocks.0.linear1.lora_B.weight": r(50, 2, seed=2),
    }
    lora = applied(tmp_path, model, {key: t for part in (*good.values(), bad) for key, t in part.items()})
    assert (lora.used, lora.refused, len(lora.lost)) == (2, None, 1)
    assert lora.lost[0].startswith("single_blocks.0.linear1.weight: up @ down gives [50, 8]")


def test_factors_that_contradict_one_another_are_damage(tmp_path):
    file = {"to_v.lora_up.weight": r(8, 3, seed=1), "to_v.lora_down.weight": r(2, 8, seed=2)}
    model = net()
    with pytest.raises(LoraMismatchError) as caught:
        applied(tmp_path, model, {**attention(), **file})
    assert "to_v.weight: up [8, 3] and down [2, 8] do not multiply; the file is damaged" in str(caught.value)


def test_a_strength_that_is_no_number_is_not_the_files_fault(tmp_path):
    save_file(attention(), tmp_path / "x.safetensors")
    model = net()
    with pytest.raises(LoraMismatchError) as caught:
        LoraGuard(model).apply([(tmp_path / "x.safetensors", float("nan"))])
    assert str(caught.value) == "x.safetensors: its strength is nan, not a usable number; choose one such as 0.8"


# ---- forms that a layer has no room for


def test_peft_on_a_grouped_convolution_is_left_out_for_its_reason(tmp_path):
    model = layers(conv=torch.nn.Conv2d(8, 16, 3, groups=4), to_q=torch.nn.Linear(8, 8))
    file = {"conv.lora_A.weight": r(4, 8, 3, 3, seed=1), "conv.lora_B.weight": r(16, 1, 1, 1, seed=2)}
    lora = applied(tmp_path, model, {**file, **attention()})
    assert (lora.used, lora.refused) == (1, None)
    assert lora.lost[0].startswith("conv.weight: the layer has 4 groups of channels, and the LoRA reads all channels")


def test_lycoris_on_a_grouped_convolution_fits_its_weight(tmp_path):
    model = layers(conv=torch.nn.Conv2d(8, 16, 3, groups=4), to_q=torch.nn.Linear(8, 8))
    up, down = r(16, 4, 1, 1, seed=1), r(4, 2, 3, 3, seed=2)
    wanted = model["conv"].weight.double() + (up.double().flatten(1) @ down.double().flatten(1)).reshape(16, 2, 3, 3)
    assert_as_trained(tmp_path, model, {"conv.lora_up.weight": up, "conv.lora_down.weight": down}, {"conv": wanted})


def test_reshape_weight_is_known_and_grown_rows_are_left_out_for_their_reason(tmp_path):
    model = layers(img_in=torch.nn.Linear(8, 8), to_q=torch.nn.Linear(8, 8))
    file = {"img_in.lora_A.weight": r(2, 8, seed=1), "img_in.lora_B.weight": r(8, 2, seed=2)}
    file["img_in.reshape_weight"] = torch.tensor([8, 8])
    lora = applied(tmp_path, model, {**file, **attention()})
    assert (lora.used, lora.skipped, lora.lost) == (2, [], [])
    file["img_in.lora_B.weight"], file["img_in.reshape_weight"] = r(12, 2, seed=2), torch.tensor([12, 8])
    lora = applied(tmp_path, model, {**file, **attention()})
    assert lora.lost[0].startswith("img_in.weight: the LoRA asks for 12 outputs of this layer (reshape_weight)")


def test_glora_on_a_vector_is_refused_before_anything_is_computed(tmp_path):
    model = layers(norm=torch.nn.LayerNorm(8), to_q=torch.nn.Linear(8, 8), to_k=torch.nn.Linear(8, 8))
    shapes = {"a1": (1, 2), "a2": (2, 1), "b1": (8, 2), "b2": (2, 1)}
    file = {f"norm.{name}.weight": r(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    lora = applied(tmp_path, model, {**file, **attention("to_k"), **attention("to_q")})
    assert (lora.used, lora.refused) == (2, None)
    assert lora.lost == ["norm.weight: GLoRA gives [8, 1], the weight is [8]"]


# ---- values that fp32 does not hold


@pytest.mark.parametrize("mode", ["auto", "bypass", "on_the_fly", "merge"])
def test_numbers_beyond_fp32_are_refused_by_a_line(mode, tmp_path):
    file = {"to_q.lora_up.weight": r(8, 2, seed=1).double() * 1e39, "to_q.lora_down.weight": r(2, 8, seed=2).double()}
    save_file(file, tmp_path / "x.safetensors")
    model = net()
    with pytest.raises(
        LoraFileError, match=r"lora_up\.weight: it holds numbers as large as .*e\+3[89], and fp32 ends at"
    ):
        LoraGuard(model).apply([(tmp_path / "x.safetensors", 1.0)], mode=mode)


def test_fp64_numbers_that_fp32_holds_are_as_they_were(tmp_path):
    model = net()
    file = {key: tensor.double() for key, tensor in attention().items()}
    assert_as_trained(tmp_path, model, file, of_attention(model))


# ---- magnitudes beside kinds that have none


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": r(8, 1, seed=1), "on_input": torch.tensor(False)},
        {"ia3_l": r(8, 1, seed=1)},
        {"oft_blocks": r(2, 4, 4, seed=1)},
        {"oft_blocks": r(2, 2, 4, 4, seed=1)},
        {"boft_R": r(1, 2, 4, 4, seed=1)},
        {"diff": r(8, 8, seed=1)},
    ],
    ids=["ia3", "peft ia3", "oft", "boft", "peft boft", "diff"],
)
def test_a_magnitude_beside_a_kind_that_has_none_is_named(tensors, tmp_path):
    """LyCORIS 4 trains one with LoCon, LoHa and LoKr alone (`weight_decompose`), OneTrainer with its OFT too."""
    file = {f"to_q.{key}": tensor for key, tensor in tensors.items()}
    save_file({**file, "to_q.dora_scale": torch.ones(8, 1)}, tmp_path / "x.safetensors")
    model = net()
    with pytest.raises(LoraFileError, match=r"to_q: it has a DoRA magnitude \(dora_scale\) beside its"):
        LoraGuard(model).apply([(tmp_path / "x.safetensors", 1.0)])
