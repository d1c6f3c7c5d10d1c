"""OFT files of sd-scripts, early LyCORIS, OneTrainer and peft, against each trainer's formula written out in float64."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from support.make import rand
from support.trainer_formulas import assert_as_trained, layers

from lib_lora_guard import LoraGuard
from lib_lora_guard.adapters import OftAdapter, oft
from lib_lora_guard.errors import LoraFileError, LoraMismatchError

OUT, IN = 24, 16


def net():
    return layers(
        lin=torch.nn.Linear(IN, OUT), conv=torch.nn.Conv2d(4, OUT, 3), conv1=torch.nn.Conv2d(IN, OUT, 1, bias=False)
    )


def assert_refused(folder, match):
    model = net()
    with pytest.raises(LoraFileError, match=match):
        LoraGuard(model).apply([(folder / "x.safetensors", 1.0)])


# ---- sd-scripts and early LyCORIS: the output rows


def rotation(blocks, bound=None):
    """The formula of sd-scripts networks/oft.py: Cayley's transform of the bounded skew part of each block."""
    skew = blocks.double() - blocks.double().mT
    if bound is not None:
        norm = skew.norm()
        skew = skew * ((min(norm, bound) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(skew.shape[-1]).double()
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def turned_rows(weight, turn):
    count, size, _ = turn.shape
    rows = weight.double().reshape(count, size, -1)
    return torch.einsum("knm,knp->kmp", turn, rows).reshape(weight.shape)


@pytest.mark.parametrize("name", ["oft_unet_lin.oft_blocks", "oft_unet_lin.oft_blocks.0", "lora_unet_lin.oft_blocks.0"])
@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_blocks_of_sd_scripts_that_are_not_split(alpha, name, tmp_path):
    """networks/oft.py and oft_flux.py; the names are theirs and LyCORIS'."""
    model, blocks = net(), rand(4, 6, 6, seed=1)
    wanted = turned_rows(model["lin"].weight, rotation(blocks, alpha * OUT))
    file = {name: blocks, f"{name.partition('.')[0]}.alpha": torch.tensor(alpha)}
    assert_as_trained(tmp_path, model, file, {"lin": wanted})


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1, 3)])
def test_blocks_of_sd_scripts_for_fused_layers_are_bounded_part_by_part(sizes, alpha, tmp_path):
    model, count = net(), 4
    parts = [rand(count, size, size, seed=n) for n, size in enumerate(sizes)]
    rows = [count * size for size in sizes]
    assert sum(rows) == OUT
    weights = model["lin"].weight.split(rows)
    wanted = [turned_rows(w, rotation(p, alpha * r)) for w, p, r in zip(weights, parts, rows, strict=True)]
    file = {f"lora_unet_lin.oft_blocks.{n}": part for n, part in enumerate(parts)}
    assert_as_trained(tmp_path, model, {**file, "lora_unet_lin.alpha": torch.tensor(alpha)}, {"lin": torch.cat(wanted)})


def test_parts_of_a_fused_layer_alone_are_what_they_are_in_the_whole():
    weight = rand(OUT, IN, seed=9)
    split = oft.SplitOftAdapter(tuple(OftAdapter(rand(4, size, size, seed=size), alpha=0.02) for size in (1, 2, 3)))
    whole = split.patch(weight.clone(), 0.7, None)
    for start, length in ((0, 4), (4, 8), (12, 12), (0, 12), (4, 20), (15, 6)):
        part = split.rows(start, length).patch(weight[start : start + length].clone(), 0.7, None)
        assert torch.allclose(part, whole[start : start + length], atol=1e-6), (start, length)
    assert split.rows(2, 4) is None
    flipped = split.patch(weight.clone(), 0.7, lambda delta: delta.flip(0))
    assert torch.allclose(flipped - weight, (whole - weight).flip(0), atol=1e-6)
    with pytest.raises(LoraMismatchError, match=r"OFT gives \[24\], the weight is \[20, 16\]"):
        split.check((20, 16), may_expand=False)


def test_a_missing_part_is_named(tmp_path):
    save_file({f"lora_unet_lin.oft_blocks.{n}": rand(4, 2, 2, seed=n) for n in (0, 2)}, tmp_path / "x.safetensors")
    assert_refused(tmp_path, "lora_unet_lin is incomplete")


def test_ready_rotations_of_early_lycoris(tmp_path):
    model = net()
    turn = {name: rotation(rand(4, 6, 6, seed=n, scale=0.1)) for n, name in enumerate(("lin", "conv"))}
    # A row scale was multiplied in: `rescale * r`.
    turn["lin"] = turn["lin"] * (1 + rand(4, 6, 1, seed=7, scale=0.2).double())
    wanted = {name: turned_rows(model[name].weight, r) for name, r in turn.items()}
    assert_as_trained(tmp_path, model, {f"lora_unet_{n}.oft_diag": r.float() for n, r in turn.items()}, wanted)


def test_differences_under_the_name_of_ready_rotations_are_refused(tmp_path):
    save_file({"lora_unet_lin.oft_diag": rand(4, 6, 6, seed=1, scale=0.1)}, tmp_path / "x.safetensors")
    assert_refused(tmp_path, "oft_diag is a part of its oft that LoRA Guard does not know")


def test_blocks_in_fp8_with_a_bound_are_cut_into_rows(tmp_path):
    """Merged by rows, as a large weight is."""
    model = net()
    blocks = rand(4, 6, 6, seed=1).to(torch.float8_e4m3fn)
    wanted = turned_rows(model["lin"].weight, rotation(blocks.float(), 1e-2 * OUT))
    file = {"lora_unet_lin.oft_blocks": blocks, "lora_unet_lin.alpha": torch.tensor(1e-2)}
    assert_as_trained(tmp_path, model, file, {"lin": wanted})
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        adapter = OftAdapter(rand(4, 6, 6, seed=1).to(dtype), alpha=1e-2)
        weight = rand(OUT, IN, seed=9)
        whole = adapter.patch(weight.clone(), 1.0, None)
        assert torch.allclose(adapter.rows(6, 12).patch(weight[6:18].clone(), 1.0, None), whole[6:18], atol=1e-6)


# ---- OneTrainer and peft: the input columns


def series(packed, size):
    """peft's and OneTrainer's five Neumann terms: I + 2Q + 2Q^2 + 2Q^3 + Q^4."""
    skew = skew_of(packed, size)
    eye = torch.eye(size).double()
    return eye + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew


def skew_of(packed, size):
    upper = torch.triu_indices(size, size, 1)
    skew = torch.zeros(packed.shape[0], size, size).double()
    skew[:, upper[0], upper[1]] = packed.double()
    return skew - skew.mT


def onetrainer(weight, packed, size):
    """Linear layers turn their input, `W R^T`; convolutions their flattened weight, `W R`."""
    turn = series(packed, size)
    turn = turn.mT if weight.dim() == 2 else turn
    flat = weight.double().flatten(1)
    blocks = flat.reshape(flat.shape[0], -1, size)
    return torch.einsum("ork,rkc->orc", blocks, turn.expand(blocks.shape[1], -1, -1)).reshape(weight.shape)


SIZE = 4
ELEMENTS = SIZE * (SIZE - 1) // 2
BLOCKS = {"lin": IN // SIZE, "conv": 9, "conv1": IN // SIZE}


def packed_for(model, scale):
    return {name: rand(BLOCKS[name], ELEMENTS, seed=n + 20, scale=scale) for n, name in enumerate(model)}


@pytest.mark.parametrize(
    ("marker", "divisor"),
    [
        (None, 1.0),
        (torch.tensor(True), 2 * math.sqrt(SIZE - 1)),
        (torch.tensor(1.0), 2 * math.sqrt(SIZE - 1)),
        (torch.tensor(1.0, dtype=torch.bfloat16), 2 * math.sqrt(SIZE - 1)),
        (torch.tensor(SIZE), 2 * math.sqrt(SIZE - 1)),
        (torch.tensor(SIZE, dtype=torch.float16), 2 * math.sqrt(SIZE - 1)),
        (torch.tensor(1), math.sqrt(ELEMENTS)),
    ],
    ids=str,
)
def test_scaled_oft_of_onetrainer(marker, divisor, tmp_path):
    model = net()
    packed = packed_for(model, 0.1 * divisor)
    wanted = {name: onetrainer(model[name].weight, p / divisor, SIZE) for name, p in packed.items()}
    file = {f"lora_unet_{name}.oft_R.weight": p for name, p in packed.items()}
    if marker is not None:
        file |= {f"lora_unet_{name}.oft_R.scaled_oft": marker.clone() for name in packed}
    assert_as_trained(tmp_path, model, file, wanted)


def test_a_block_for_the_whole_input_of_a_convolution(tmp_path):
    model, packed = net(), rand(1, ELEMENTS, seed=2, scale=0.1)
    wanted = {"conv": onetrainer(model["conv"].weight, packed, SIZE)}
    assert_as_trained(tmp_path, model, {"lora_unet_conv.oft_R.weight": packed}, wanted)


@pytest.mark.parametrize("told_by", ["header", "marker"])
def test_a_convolution_of_onetrainer_in_names_of_diffusers(told_by, tmp_path):
    """Its format DIFFUSERS_LORA has dots, as PEFT's files have, and keeps OneTrainer's formula."""
    model, marked = net(), told_by == "marker"
    divisor = 2 * math.sqrt(SIZE - 1) if marked else 1.0
    packed = packed_for(model, 0.1 * divisor)
    wanted = {name: onetrainer(model[name].weight, p / divisor, SIZE) for name, p in packed.items()}
    file = {f"unet.{name}.oft_R.weight": p for name, p in packed.items()}
    if marked:
        file |= {f"unet.{name}.oft_R.scaled_oft": torch.tensor(True) for name in packed}
    assert_as_trained(tmp_path, model, file, wanted, metadata=None if marked else {"ot_revision": "0123abc"})


@pytest.mark.parametrize(("sizes", "used"), [((4, 4, 5), 3), ((4, 8, 6), 3), ((4, 16, 16), 2)])
def test_one_block_in_every_layer_of_about_one_size_is_shared(sizes, used, tmp_path):
    """OneTrainer's `oft_block_share` stands nowhere in its file; one block of a layer's width is another thing."""
    model = layers(
        x_embedder=torch.nn.Linear(32, 8), to_q=torch.nn.Linear(16, 8), to_k=torch.nn.Linear(sizes[2] * 2, 8)
    )
    packed = {n: rand(1, size * (size - 1) // 2, seed=size, scale=0.1) for n, size in zip(model, sizes, strict=True)}
    wanted = {n: onetrainer(model[n].weight, p, size) for (n, p), size in zip(packed.items(), sizes, strict=True)}
    lost = 3 - used
    if lost:
        del wanted["x_embedder"]
    file = {f"lora_unet_{name}.oft_R.weight": p for name, p in packed.items()}
    assert_as_trained(tmp_path, model, file, wanted, lost=lost)


@pytest.mark.parametrize("marker", [torch.tensor(False), torch.tensor(7), torch.tensor(0.5)], ids=str)
def test_a_marker_that_is_not_known_refuses_the_file(marker, tmp_path):
    packed = rand(4, ELEMENTS, seed=1)
    save_file(
        {"lora_unet_lin.oft_R.weight": packed, "lora_unet_lin.oft_R.scaled_oft": marker}, tmp_path / "x.safetensors"
    )
    assert_refused(tmp_path, r"scaled in a way that LoRA Guard does not know \(oft_R.scaled_oft is")


@pytest.mark.parametrize("part", ["cans_oft", "cans_exp", "other"])
def test_another_part_of_the_rotation_refuses_the_file(part, tmp_path):
    file = {"lora_unet_lin.oft_R.weight": rand(4, ELEMENTS, seed=1), f"lora_unet_lin.oft_R.{part}": torch.ones(1)}
    save_file(file, tmp_path / "x.safetensors")
    assert_refused(tmp_path, rf"oft_R.{part} is a part of its oft that LoRA Guard does not know")


def by_row(numbers, weight):
    return numbers.double().reshape(-1, *[1] * (weight.dim() - 1))


@pytest.mark.parametrize("with_norm", [False, True], ids=["norm of the weight", "norm in the file"])
def test_dora_oft_of_onetrainer(with_norm, tmp_path):
    """DoRAOFTModule: the turned rows times dora_scale / the rows' norm before training; the bias stays."""
    model, packed = net(), packed_for(net(), 0.1)
    wanted, file = {}, {}
    for n, (name, layer) in enumerate(model.items()):
        weight = layer.weight
        norm = weight.double().flatten(1).norm(dim=1) * (1.1 if with_norm else 1.0)
        magnitude = norm * (1 + rand(OUT, seed=40 + n, scale=0.2).double())
        turned = onetrainer(weight, packed[name], SIZE)
        wanted[name] = by_row(magnitude / norm, weight) * turned
        shape = (OUT, *[1] * (weight.dim() - 1))
        file[f"lora_unet_{name}.oft_R.weight"] = packed[name]
        file[f"lora_unet_{name}.dora_scale"] = magnitude.float().reshape(shape)
        if with_norm:
            file[f"lora_unet_{name}.initial_norm"] = norm.float().reshape(shape)
    # Part of the way moves the rotation and the scale each by that part.
    assert_full_strength(tmp_path, model, file, wanted)


@pytest.mark.parametrize("logarithm", [False, True])
def test_multipliers_of_onetrainers_later_dora_oft(logarithm, tmp_path):
    model, packed = net(), packed_for(net(), 0.1)
    wanted, file = {}, {}
    for n, (name, layer) in enumerate(model.items()):
        factor = 1 + rand(OUT, seed=40 + n, scale=0.2)
        wanted[name] = by_row(factor, layer.weight) * onetrainer(layer.weight, packed[name], SIZE)
        file[f"lora_unet_{name}.oft_R.weight"] = packed[name]
        file[f"lora_unet_{name}.dora_log_multiplier" if logarithm else f"lora_unet_{name}.dora_multiplier"] = (
            factor.log() if logarithm else factor
        )
    assert_full_strength(tmp_path, model, file, wanted)


def assert_full_strength(folder, model, file, wanted):
    assert_as_trained(folder, model, file, wanted, strengths=(1.0,))


def test_rows_of_a_dora_oft_are_those_of_the_whole():
    from lib_lora_guard.adapters import PeftOftAdapter

    weight, packed = rand(OUT, IN, seed=9), rand(4, ELEMENTS, seed=1, scale=0.1)
    adapter = PeftOftAdapter(packed, magnitude=1 + rand(OUT, 1, seed=2), initial_norm=1 + rand(OUT, 1, seed=3).abs())
    whole = adapter.patch(weight.clone(), 0.7, None)
    assert torch.allclose(adapter.rows(5, 9).patch(weight[5:14].clone(), 0.7, None), whole[5:14], atol=1e-6)


# ---- peft's constrained OFT, by hand; against peft itself: references/test_peft.py


@pytest.mark.parametrize("eps", [6e-5, 1e-2])
@pytest.mark.parametrize("shared", [False, True])
def test_peft_bounds_each_block_by_eps_over_the_root_of_their_number(eps, shared, tmp_path):
    model = net()
    packed = rand(1 if shared else 4, ELEMENTS, seed=1, scale=0.01)
    skew = skew_of(packed, SIZE)
    norm = skew.flatten(1).norm(dim=1)[:, None, None]
    bound = eps / math.sqrt(packed.shape[0])
    skew = torch.where(norm <= bound, skew, skew * bound / norm)
    eye = torch.eye(SIZE).double()
    turn = torch.linalg.solve(eye + skew, eye - skew, left=False).expand(4, -1, -1)
    wanted = model["lin"].weight.double() @ torch.block_diag(*turn).T
    settings = {"peft_type": "OFT", "coft": True, "eps": eps, "use_cayley_neumann": False}
    assert_as_trained(
        tmp_path,
        model,
        {"lin.oft_R.weight": packed},
        {"lin": wanted},
        metadata={"lora_adapter_metadata": json.dumps(settings)},
    )


def test_an_eps_that_is_no_number_refuses_the_file(tmp_path):
    settings = {"lora_adapter_metadata": json.dumps({"coft": True, "eps": "small"})}
    save_file({"lin.oft_R.weight": rand(4, ELEMENTS, seed=1)}, tmp_path / "x.safetensors", metadata=settings)
    assert_refused(tmp_path, "an eps that is no usable number")
