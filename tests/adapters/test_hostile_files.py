"""Valid safetensors files whose LoRAs are refused on reading, or whose settings and names are meant to do harm.

What is wrong with a file itself is tested in tests/files/test_hostile.py, what its factors can do in test_hostile_factors.py.
"""

import json

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
    lora,
    module,
    number,
    save,
    t,
)

from lib_lora_guard import LoraGuard
from lib_lora_guard.adapters.files import lora_of_header, open_lora, read_lora_file
from lib_lora_guard.errors import LoraFileError, LoraMismatchError

pytestmark = pytest.mark.usefixtures("warm", "no_grad")

NAN, INF = float("nan"), float("inf")
AGAIN = "download or train it again"

NOT_FINITE = f"it holds values that are not finite numbers (NaN or Inf); {AGAIN}"
FILES = {
    "NaN in a factor": ({**LORA, UP: t(24, 2, value=NAN)}, f"{UP}: {NOT_FINITE}"),
    "Inf in a factor": ({**LORA, DOWN: t(2, 16, value=-INF)}, f"{DOWN}: {NOT_FINITE}"),
    "Inf and -Inf": ({**LORA, DOWN: torch.tensor([[INF] * 16, [-INF] * 16])}, f"{DOWN}: {NOT_FINITE}"),
    "NaN in fp8": ({**LORA, UP: t(24, 2, value=NAN).to(torch.float8_e4m3fn)}, f"{UP}: {NOT_FINITE}"),
    "NaN in a magnitude": ({**LORA, "lin.dora_scale": t(24, value=NAN)}, f"lin.dora_scale: {NOT_FINITE}"),
    "NaN in a replacement": (module("lin", set_weight=t(24, 16, value=NAN)), f"lin.set_weight: {NOT_FINITE}"),
    "alpha NaN": ({**LORA, "lin.alpha": number(NAN)}, f"lin.alpha: {NOT_FINITE}"),
    "alpha Inf": ({**LORA, "lin.alpha": number(INF)}, f"lin.alpha: {NOT_FINITE}"),
    "alpha of text": ({**LORA, "lin.alpha": torch.tensor(list(b"16"), dtype=torch.uint8)}, "lin.alpha has 2 values instead of one; the file is damaged"),
    "alpha of nothing": ({**LORA, "lin.alpha": t(0)}, "lin.alpha has 0 values instead of one; the file is damaged"),
    "alpha complex": ({**LORA, "lin.alpha": number(1 + 1j, torch.complex64)}, "lin.alpha: it is stored as torch.complex64, floating-point numbers were expected"),
    "on_input of two values": (module("lin", weight=t(16), on_input=t(2)), "lin.on_input has 2 values instead of one; the file is damaged"),
    "on_input of nothing": (module("lin", weight=t(16), on_input=t(0)), "lin.on_input has 0 values instead of one; the file is damaged"),
    "whole numbers": ({**LORA, UP: t(24, 2).to(torch.int64)}, f"{UP}: it is stored as torch.int64, floating-point numbers were expected"),
    "truth values": ({**LORA, UP: t(24, 2).bool()}, f"{UP}: it is stored as torch.bool, floating-point numbers were expected"),
    "complex numbers": ({**LORA, UP: t(24, 2).to(torch.complex64)}, f"{UP}: it is stored as torch.complex64, floating-point numbers were expected"),
    "one tensor in two spellings": ({**LORA, "lin.lora_A.weight": t(2, 16)}, f"lin.lora_A.weight and {DOWN} say the same thing twice; the file is damaged"),
    "two adapter names": ({"lin.lora_A.weight": t(2, 16), "lin.lora_A.x.weight": t(2, 16), "lin.lora_B.weight": t(24, 2)}, "lin.lora_A.weight and lin.lora_A.x.weight say the same thing twice"),
    "two kinds": ({**LORA, "lin.lokr_w1": t(24, 16)}, "lin is described as lokr and lora at once; the file is damaged"),
    "half a LoRA": (module("lin", lora_up__weight=t(24, 2)), "lin is incomplete (a lora without 'down'); download the file again"),
    "a name that steers the console": ({"a\n\x1b[2J<script>\u202e.lora_up.weight": t(24, 2)}, "a??[2J<script>? is incomplete"),
    "a name of 100 kB": ({f"{'<b>' * 33_000}.lora_up.weight": t(24, 2)}, f"{'<b>' * 19}<...b>{'<b>' * 19} is incomplete"),
    "a GLoRA core without a matrix": (glora("conv", t(4, 2), t(2, 4), t(8, 2), number(1.0), bm__weight=t(2, 2, 3, 3)), "conv"),
    "a GLoRA core of one dimension": (glora("conv", t(4, 2), t(2, 4), t(8, 2), t(2, 4), bm__weight=t(2)), "conv"),
    "a GLoRA core of another rank": (glora("conv", t(4, 2), t(2, 4), t(8, 2), t(3, 4), bm__weight=t(2, 2, 3, 3)), "conv"),
}  # fmt: skip


def read_lora_header(path):
    return lora_of_header(open_lora(path))


@pytest.mark.parametrize("read", [read_lora_file, read_lora_header])
@pytest.mark.parametrize("case", FILES)
def test_refused_when_the_file_is_read(case, read, tmp_path):
    tensors, expected = FILES[case]
    try:
        path = save(tmp_path / "a.safetensors", tensors)
    except KeyError as error:
        pytest.skip(f"this safetensors cannot write {error}")
    if read is read_lora_header and expected.endswith(AGAIN) and "alpha" not in case:
        read(path)  # has no values to look at
        return
    with pytest.raises(LoraFileError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith("a.safetensors: ")
    assert expected in message
    assert_fit_to_show(message)


HUGE = "1" + "0" * 400
SETTINGS = {
    "alpha of 400 digits": f'{{"lora_alpha": {HUGE}}}',
    "alpha of 400 digits, rsLoRA": f'{{"lora_alpha": {HUGE}, "use_rslora": true}}',
    "alpha of 5000 digits": f'{{"lora_alpha": 1{"0" * 5000}}}',
    "pattern with 400 digits": f'{{"alpha_pattern": {{"lin": {HUGE}}}}}',
    "alpha 1e999": '{"lora_alpha": 1e999}',
    "alpha NaN": '{"lora_alpha": NaN}',
    "alpha of text": '{"lora_alpha": "16"}',
    "alpha an object": '{"lora_alpha": {"a": 1}}',
    "patterns of other types": '{"alpha_pattern": {"lin": "a"}, "rank_pattern": [1], "r": "x", "use_rslora": "yes"}',
    "a list": "[1]",
    "text": '"abc"',
    "deep lists": "[" * 900_000,
    "deep objects": '{"a":' * 130_000,
    "many entries": json.dumps({f"key{n}": n for n in range(40_000)}),
    "many patterns": json.dumps({"alpha_pattern": {f"xxxxxxxxxxxx{n}.*": 1 for n in range(25_000)}}),
    "many stars": json.dumps({"alpha_pattern": {".*a" * 100_000: 1}}),
    "an expression": json.dumps({"alpha_pattern": {"(a+)+$": 1}, "feedforward_modules": "(a+)+$"}),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_cannot_do_harm(case, tmp_path, good, caplog):
    path = save(tmp_path / "a\u202e.safetensors", LORA, SETTINGS[case])
    assert path.stat().st_size < 1_000_000
    said = assert_harmless(path, good)
    refused = case in ("alpha 1e999", "alpha NaN", "patterns of other types") or "400 digits" in case
    too_much = {"many patterns": "too long together", "many stars": "not understood"}.get(case)
    assert (too_much in said) if too_much else ("no usable number" in said) if refused else said is None
    for message in caplog.messages:
        assert_fit_to_show(message)


def test_many_patterns_for_many_modules_are_not_multiplied(tmp_path, good):
    modules = {key: value for n in range(100) for key, value in lora(f"b{n}", 1, 1, 1).items()}
    settings = json.dumps({"alpha_pattern": {f"x{n}": 1 for n in range(4_000)}})
    path = save(tmp_path / "a.safetensors", {**LORA, **modules}, settings)
    assert path.stat().st_size < 1_000_000
    assert_harmless(path, good)


def test_a_rank_of_400_digits_for_kinds_that_ask_the_settings(tmp_path, good):
    whole_sides = module("lin", lokr_w1=t(2, 2), lokr_w2=t(12, 8))
    assert_harmless(save(tmp_path / "a.safetensors", whole_sides, f'{{"r": {HUGE}, "lora_alpha": 2}}'), good)


NAMES = {
    "100 kB": "n" * 100_000,
    "100 kB of a trainer's prefix": "lora_" * 20_000,
    "100 kB of dots": "." * 100_000,
    "100 kB of numbers": "down_blocks." + "9" * 100_000,
    "100 kB of attached names": "_lora" * 20_000,
    "control characters": "bad\n\r\x1b[2J\x00\x7f",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "right to left": "\u202egnp.\u2066abc\u2069\u200f",
    "nothing": "",
    "spaces": " \u3000\u00a0",
    "format strings": "%s%n{0}{report.__class__}",
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_modules_that_no_model_has(case, tmp_path, good):
    tensors = {**LORA, **lora(NAMES[case])}
    model = Model()
    assert assert_harmless(save(tmp_path / "a.safetensors", tensors), good) is None
    report = LoraGuard(model).apply([(tmp_path / "a.safetensors", 1.0)])
    assert (report.loras[0].used, len(report.loras[0].skipped)) == (1, 1)
    assert_fit_to_show(report.line())
    save(tmp_path / "b.safetensors", lora(NAMES[case]))
    with pytest.raises(LoraMismatchError, match=r"^b\.safetensors: none of its 1 modules is in this Model;") as caught:
        LoraGuard(model).apply([(tmp_path / "b.safetensors", 1.0)])
    assert_fit_to_show(str(caught.value))


@pytest.mark.parametrize("spelling", ["lora_unet_lin", "transformer.lin"])
def test_two_spellings_of_one_weight_are_one_lora_and_the_other_is_named(spelling, tmp_path, good):
    """The first one counts; the second is not added to it in silence."""
    tensors = {**LORA, **{key: 5 * value for key, value in lora(spelling).items()}}
    said = assert_harmless(save(tmp_path / "a.safetensors", tensors), good)
    assert "says already" in said
    both, one = Model(), Model()
    report = LoraGuard(both).apply([(tmp_path / "a.safetensors", 1.0)])
    assert len(report.loras[0].lost) == 1
    assert report.is_worrying
    assert_fit_to_show(report.line())
    # safetensors sorts by name.
    first = min(tensors).partition(".lora_")[0]
    alone = {key: value for key, value in tensors.items() if key.startswith(f"{first}.lora_")}
    LoraGuard(one).apply([(save(tmp_path / "one.safetensors", alone), 1.0)])
    assert torch.equal(both()[0], one()[0])


def test_many_hostile_names_at_once_stay_cheap(tmp_path, good):
    names = ("lora_" * 20_000 + str(n) for n in range(4))
    path = save(tmp_path / "a.safetensors", {k: v for name in names for k, v in lora(name, 1, 1, 1).items()} | LORA)
    assert path.stat().st_size < 1_000_000
    assert_harmless(path, good)
