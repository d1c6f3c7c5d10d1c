"""LoRAs whose factors are impossible, or meant to fill the memory: refused with one line, at once, and alone."""

import pytest
import torch
from support.hostile_loras import (
    DOWN,
    LORA,
    UP,
    Model,
    assert_fit_to_show,
    assert_harmless,
    glora,
    loha,
    lora,
    module,
    number,
    requests,
    save,
    t,
)

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraFileError, LoraMismatchError
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.models.names import NameMap
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.planning.mode import Wish

pytestmark = pytest.mark.usefixtures("warm", "no_grad")

WEIGHT = "the weight is [24, 16]"
ZERO = "a single number where a factor belongs"
NO_NUMBER = "not a usable number"
EMPTY = "must be matrices"
LEFT_OUT = {
    "OFT by more than half a turn": (module("lin", oft_blocks=t(6, 4, 4) * 1e9), "its rotation is"),
    "BOFT by more than half a turn": (module("lin", oft_blocks=t(1, 6, 4, 4) * 1e9), "its rotation is"),
    "peft's OFT by more than half a turn": (module("lin", **{"oft_R.weight": t(4, 6) * 1e9}), "its rotation is"),
    "rank 0": (lora(rank=0), "factors [24, 0] and [0, 16] are no pair of matrices"),
    "rank 0 with a bias": ({**lora(rank=0), "lin.alpha": number(1.0), "lin.lora_B.bias": t(24)}, "cannot be those of a lora"),
    "LoHa of rank 0": (loha("lin", t(24, 0), t(0, 16), t(24, 0), t(0, 16), alpha=number(1.0)), EMPTY),
    "LoHa of rank 0 without alpha": (loha("lin", t(24, 0), t(0, 16), t(24, 0), t(0, 16)), EMPTY),
    "LoKr of rank 0": (module("lin", lokr_w1=t(2, 2), lokr_w2_a=t(12, 0), lokr_w2_b=t(0, 8), alpha=number(1.0)), EMPTY),
    "LoKr of rank 0 without alpha": (module("lin", lokr_w1=t(2, 2), lokr_w2_a=t(12, 0), lokr_w2_b=t(0, 8)), EMPTY),
    "LoKr with a left side of rank 0": (module("lin", lokr_w1_a=t(2, 0), lokr_w1_b=t(0, 2), lokr_w2=t(12, 8), alpha=number(1.0)), EMPTY),
    "LoKr with an empty side": (module("lin", lokr_w1=t(0, 2), lokr_w2=t(12, 8)), "LoKr sides must be matrices, found [0, 2] and [12, 8]"),
    "GLoRA of rank 0": (glora("lin", t(16, 0), t(0, 16), t(24, 0), t(0, 16), alpha=number(1.0)), EMPTY),
    "empty kernel of a core": (module("conv", lora_up__weight=t(8, 2, 1, 1), lora_down__weight=t(2, 4, 1, 1), lora_mid__weight=t(2, 2, 0, 3)), "up @ down gives [8, 0], the weight is [8, 4, 3, 3]"),
    "ranks that differ": ({UP: t(24, 3), DOWN: t(2, 16)}, "up [24, 3] and down [2, 16] do not multiply"),
    "LoHa ranks that differ": (loha("lin", t(24, 3), t(2, 16), t(24, 2), t(2, 16)), "LoHa factors [24, 3] and [2, 16] do not multiply"),
    "LoKr ranks that differ": (module("lin", lokr_w1=t(2, 2), lokr_w2_a=t(12, 3), lokr_w2_b=t(2, 8)), "LoKr factors do not multiply: "),
    "GLoRA ranks that differ": (glora("lin", t(16, 3), t(2, 16), t(24, 2), t(2, 16)), "GLoRA factors do not multiply: [[16, 3], [2, 16], [24, 2], [2, 16]]"),
    "one core of two": (loha("conv", t(2, 8), t(2, 4), t(2, 8), t(2, 4), hada_t1=t(2, 2, 3, 3)), "LoHa factors [2, 8] and [2, 4] do not multiply"),
    "core of two dimensions": ({**LORA, "lin.lora_mid.weight": t(2, 2)}, "up [24, 2] and down [2, 16] do not multiply over mid [2, 2]"),
    "LoHa core of one dimension": (loha("lin", t(2, 24), t(2, 16), t(2, 24), t(2, 16), hada_t1=t(2)), "LoHa factors [2, 24] and [2, 16] do not multiply"),
    "0-d factors": ({UP: number(1.0), DOWN: number(1.0), "lin.alpha": number(1.0)}, ZERO),
    "0-d factor with a bias": ({"lin.lora_B.weight": t(24, 2), "lin.lora_A.weight": number(1.0), "lin.alpha": number(1.0), "lin.lora_B.bias": t(24)}, ZERO),
    "1-d factors": ({UP: t(24), DOWN: t(16)}, "factors [24] and [16] are no pair of matrices"),
    "0-d LoHa": (loha("lin", *[number(1.0)] * 4), ZERO),
    "1-d LoKr factor": (module("lin", lokr_w1=t(2, 2), lokr_w2_a=t(12), lokr_w2_b=t(12, 8)), "LoKr factors do not multiply: [12] times [12, 8]"),
    "4-d LoKr factors": (module("lin", lokr_w1=t(2, 2), lokr_w2_a=t(12, 2, 1, 1), lokr_w2_b=t(2, 8, 1, 1)), "LoKr factors do not multiply: [12, 2, 1, 1] times"),
    "0-d LoKr": (module("lin", lokr_w1=number(1.0), lokr_w2=t(12, 8)), ZERO),
    "0-d LoKr factor": (module("lin", lokr_w1=t(2, 2), lokr_w2_a=t(12, 2), lokr_w2_b=number(1.0)), "cannot be those of a lokr"),
    "1-d LoKr": (module("lin", lokr_w1=t(2), lokr_w2=t(12, 8)), "LoKr sides must be matrices, found [2] and [12, 8]"),
    "0-d GLoRA": (glora("lin", *[number(1.0)] * 4), ZERO),
    "0-d OFT": (module("lin", oft_blocks=number(1.0)), ZERO),
    "empty OFT": (module("lin", oft_blocks=t(0, 0, 0)), f"OFT gives [0], {WEIGHT}"),
    "0-d OFT of peft": (module("lin", oft_R__weight=number(1.0)), ZERO),
    "1-d OFT of peft": (module("lin", oft_R__weight=t(6)), "peft OFT must be (n, b * (b - 1) / 2), found [6]"),
    "empty OFT of peft": (module("lin", oft_R__weight=t(16, 0)), "peft OFT must be (n, b * (b - 1) / 2), found [16, 0]"),
    "BOFT without stages": (module("lin", oft_blocks=t(0, 12, 2, 2)), "BOFT blocks must be (m, n, b, b), found [0, 12, 2, 2]"),
    "BOFT of 5000 stages": (module("lin", oft_blocks=t(5000, 12, 2, 2)), f"BOFT gives [24], {WEIGHT}"),
    "BOFT with another rescale": (module("lin", oft_blocks=t(1, 12, 2, 2), rescale=t(5)), f"rescale gives [5], {WEIGHT}"),
    "0-d IA3": (module("lin", weight=number(1.0), on_input=number(1.0)), ZERO),
    "0-d magnitude": ({**LORA, "lin.dora_scale": number(1.0)}, ZERO),
    "magnitude of another size": ({**LORA, "lin.dora_scale": t(7)}, f"dora_scale gives [7], {WEIGHT}"),
    "a rotation and a magnitude": (module("lin", oft_blocks=t(1, 24, 24), dora_scale=t(24)), "a DoRA magnitude (dora_scale) beside its oft"),
    "0-d replacement": (module("lin", set_weight=number(1.0)), f"set gives [], {WEIGHT}"),
    "empty difference": (module("lin", diff=t(0)), f"diff gives [0], {WEIGHT}"),
    "0-d bias": (module("lin", diff_b=number(1.0)), "diff gives [], the weight is [24]"),
    "alpha times scalar": ({**LORA, "lin.alpha": number(1e300, torch.float64), "lin.scalar": number(1e30, torch.float64)}, NO_NUMBER),
    "scalar of 1e300": ({**LORA, "lin.alpha": number(1.0), "lin.scalar": number(1e300, torch.float64)}, "as large as 1.0e+300, and fp32 ends at"),
    "alpha of 1e308": ({**LORA, "lin.alpha": number(1e308, torch.float64)}, NO_NUMBER),
    "a difference with more outputs": (module("conv_in", diff=t(400, 4, 3, 3)), "diff gives [400, 4, 3, 3], the weight is"),
    "a difference with a larger kernel": (module("conv_in", diff=t(320, 4, 5, 5)), "diff gives [320, 4, 5, 5], the weight is"),
}  # fmt: skip
"""Case: tensors, and what the refusal says."""


@pytest.mark.parametrize("wish", [Wish.AUTO, Wish.MERGE])
@pytest.mark.parametrize("case", LEFT_OUT)
def test_left_out_with_a_reason_while_the_other_lora_is_applied(case, wish, tmp_path, good):
    tensors, expected = LEFT_OUT[case]
    said = assert_harmless(save(tmp_path / "a.safetensors", tensors), good, wish)
    assert said is not None, "it was applied"
    assert expected in said


@pytest.mark.parametrize("case", LEFT_OUT)
def test_the_plain_host_refuses_it_by_name_and_changes_nothing(case, tmp_path):
    tensors, expected = LEFT_OUT[case]
    path, model = save(tmp_path / "a\u202e.safetensors", tensors), Model()
    if case in ("empty difference", "0-d bias") or case.startswith("a difference"):
        pytest.skip("a difference of another size is left out alone, the rest of its file is applied")
    with pytest.raises((LoraMismatchError, LoraFileError)) as caught:
        LoraGuard(model).apply([(path, 1.0)])
    message = str(caught.value)
    assert message.startswith("a?.safetensors: ")
    assert expected in message
    assert_fit_to_show(message)
    assert not any(layer._forward_hooks for layer in model.modules())


FITS = {
    "8-d factors": {UP: t(24, 2, 1, 1, 1, 1, 1, 1), DOWN: t(2, 16, 1, 1, 1, 1, 1, 1)},
    "8-d factors of a convolution": module("conv", lora_up__weight=t(8, 2, 1, 1, 1, 1, 1, 1), lora_down__weight=t(2, 4, 3, 3, 1, 1, 1, 1)),
    "kernel before channels": module("conv", lora_up__weight=t(8, 2), lora_down__weight=t(2, 9, 4)),
    "8-d core": module("conv", lora_up__weight=t(8, 2, 1, 1), lora_down__weight=t(2, 4, 1, 1), lora_mid__weight=t(2, 2, 3, 3, 1, 1, 1, 1)),
    "8-d magnitude": {**LORA, "lin.dora_scale": t(24, 1, 1, 1, 1, 1, 1, 1)},
    "alpha in three dimensions": {**LORA, "lin.alpha": t(1, 1, 1)},
    "alpha a whole number": {**LORA, "lin.alpha": number(2, torch.int64)},
    "alpha a truth value": {**LORA, "lin.alpha": number(True, torch.bool)},
    "magnitude of zeros": {**LORA, "lin.dora_scale": t(24, value=0.0)},
    "fp8 factors": {key: value.to(torch.float8_e4m3fn) for key, value in LORA.items()},
}  # fmt: skip


@pytest.mark.parametrize("wish", [Wish.AUTO, Wish.MERGE, Wish.ON_THE_FLY])
@pytest.mark.parametrize("case", FITS)
def test_odd_and_yet_right(case, wish, tmp_path, good):
    assert assert_harmless(save(tmp_path / "a.safetensors", FITS[case]), good, wish) is None


TERABYTES = {
    "LoRA": lora(out=100_000, inner=100_000, rank=1),
    "LoHa": loha("lin", t(50_000, 1), t(1, 50_000), t(50_000, 1), t(1, 50_000)),
    "LoKr": module("lin", lokr_w1_a=t(100_000, 1), lokr_w1_b=t(1, 100_000), lokr_w2=t(2, 2)),
    "LoKr of whole sides": module("lin", lokr_w1=t(300, 300), lokr_w2=t(300, 300)),
    "LoKr without a byte": module("lin", lokr_w1_a=torch.empty(2**40, 0), lokr_w1_b=torch.empty(0, 2**40), lokr_w2=t(2, 2)),
    "LoKr sides without a byte": module("lin", lokr_w1=torch.empty(2**40, 0), lokr_w2=torch.empty(0, 2**40)),
    "GLoRA": glora("lin", t(60_000, 1), t(1, 60_000), t(60_000, 1), t(1, 60_000)),
    # 100000 here would be 40 GB where it is made: 6000 is what a failing test may take.
    "GLoRA core": glora("conv", t(4, 2), t(2, 4), t(8, 2), t(1, 6000), bm__weight=t(6000, 1)),
    "OFT": module("lin", oft_blocks=t(1, 480, 480)),
    "OFT of peft": module("lin", oft_R__weight=t(1, 499 * 500 // 2)),
    "BOFT": module("lin", oft_blocks=t(16, 1, 120, 120)),
    "Tucker LoRA": module("lin", lora_up__weight=t(24, 2), lora_down__weight=t(2, 100), lora_mid__weight=t(2, 2, 200, 200)),
}  # fmt: skip


@pytest.mark.parametrize("case", TERABYTES)
def test_products_of_another_size_are_refused_by_shape_before_any_is_made(case, tmp_path, good):
    path = save(tmp_path / "a.safetensors", TERABYTES[case])
    assert path.stat().st_size < 1_000_000
    assert assert_harmless(path, good) is not None


OUT = "conv_out"  # (4, 320, 3, 3): few rows, so that a rank of thousands is a small file
BLOW_UPS = {
    "LoRA core": module(OUT, lora_up__weight=t(4, 6_000, 1, 1), lora_down__weight=t(1, 320, 1, 1), lora_mid__weight=t(6_000, 1, 3, 3)),
    "LoHa cores": loha(OUT, t(6_000, 4), t(1, 320), t(2, 4), t(2, 320), hada_t1=t(6_000, 1, 3, 3), hada_t2=t(2, 2, 3, 3)),
    "LoKr core": module(OUT, lokr_w1=t(1, 1), lokr_w2_a=t(6_000, 4), lokr_w2_b=t(1, 320), lokr_t2=t(6_000, 1, 3, 3)),
    "GLoRA rank": glora("conv_in", t(4, 9_000), t(9_000, 4), t(320, 2), t(2, 36)),
    "a difference that grows an input": module("conv_in", diff=t(1, 1, 120, 120)),
    "a LoRA that widens an input": lora("img_in", inner=200_000, rank=1),
}  # fmt: skip


@pytest.mark.parametrize("wish", [Wish.AUTO, Wish.MERGE, Wish.ON_THE_FLY])
@pytest.mark.parametrize("case", BLOW_UPS)
def test_products_on_the_way_to_the_right_size_are_bounded(case, wish, tmp_path, good):
    """The result fits the weight (or may widen it), what lies between does not fit a memory: refused or made small."""
    path = save(tmp_path / "a.safetensors", BLOW_UPS[case])
    assert path.stat().st_size < 1_000_000
    assert_harmless(path, good, wish)


FUSED = "double_blocks.0.img_attn.qkv"
SWAPPED = "final_layer.adaLN_modulation.1"
BROKEN_PARTS = {
    "LoRA of fewer rows": lambda m: lora(m, 5),
    "LoRA of more rows": lambda m: lora(m, 60),
    "0-d LoRA": lambda m: module(m, lora_up__weight=number(1.0), lora_down__weight=t(2, 16)),
    "LoRA with a 0-d magnitude": lambda m: lora(m, 48, dora_scale=number(1.0)),
    "0-d LoHa": lambda m: loha(m, *[number(1.0)] * 4),
    "1-d LoHa": lambda m: loha(m, *[t(48)] * 4, hada_t1=t(2), hada_t2=t(2)),
    "0-d LoKr": lambda m: module(m, lokr_w1=number(1.0), lokr_w2=number(1.0)),
    "LoKr of empty blocks": lambda m: module(m, lokr_w1=t(3, 2), lokr_w2=t(0, 2)),
    "LoKr of fewer rows": lambda m: module(m, lokr_w1=t(1, 2), lokr_w2=t(16, 8)),
    "1-d GLoRA": lambda m: glora(m, *[t(3)] * 4),
    "GLoRA of fewer rows": lambda m: glora(m, t(16, 2), t(2, 16), t(5, 2), t(2, 16)),
    "0-d difference": lambda m: module(m, diff=number(1.0)),
    "difference of fewer rows": lambda m: module(m, diff=t(5, 16)),
    "0-d replacement": lambda m: module(m, set_weight=number(1.0)),
    "0-d OFT": lambda m: module(m, oft_blocks=number(1.0)),
    "OFT of empty blocks": lambda m: module(m, oft_blocks=t(4, 0, 0)),
    "OFT of fewer rows": lambda m: module(m, oft_blocks=t(1, 16, 16)),
    "0-d BOFT of peft": lambda m: module(m, boft_R=number(1.0), boft_s=t(2)),
    "0-d OFT of peft": lambda m: module(m, oft_R__weight=number(1.0)),
    "IA3 of fewer rows": lambda m: module(m, weight=t(5), on_input=number(0.0)),
    "0-d bias": lambda m: module(m, diff_b=number(1.0)),
}


class Parts(torch.nn.Module):
    """As much of Flux in the layout of diffusers as the name map needs: query, key and value apart, a turned modulation."""

    def __init__(self):
        super().__init__()
        block = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({f"to_{x}": torch.nn.Linear(16, 16) for x in "qkv"})})
        self.transformer_blocks = torch.nn.ModuleList([block])
        self.single_transformer_blocks = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"proj_mlp": torch.nn.Linear(16, 64)})]
        )
        self.norm_out = torch.nn.ModuleDict({"linear": torch.nn.Linear(16, 32)})
        self.sq = torch.nn.Linear(16, 16)
        self.requires_grad_(False)


@pytest.mark.parametrize("place", [FUSED, SWAPPED])
@pytest.mark.parametrize("case", BROKEN_PARTS)
def test_a_broken_fused_tensor_on_a_model_that_has_its_parts(case, place, tmp_path, good):
    """Taking it apart comes before the check of its shape, and must not end otherwise than the check."""
    path = save(tmp_path / "a.safetensors", BROKEN_PARTS[case](place))
    model, engine = Parts(), Engine()
    access = PlainAccess(model)
    assert NameMap(access.shapes()).routes(FUSED)[0].source is not None, "the name map takes it apart"
    assert NameMap(access.shapes()).routes(SWAPPED)[0].swap_halves
    try:
        stack = requests(access, path, good)
    except (LoraFileError, LoraMismatchError) as error:
        assert_fit_to_show(str(error))
        return
    report = engine.change(access, stack)
    assert (report.loras[0].used, report.loras[1].used) == (0, 1)
    assert report.loras[0].is_worrying
    assert_fit_to_show(report.line())
