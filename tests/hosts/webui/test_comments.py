"""What stands under an image: one sentence for each LoRA that is left out or applied in part, once in an image."""

import pytest
from contract.lora_files import MODULES
from support.make import rand, write_kohya
from support.webui import OldRequest, Request, page

from lib_lora_guard.reporting.report import ApplyReport, LoraReport

OTHER = {"lora_unet_middle": (8, 8), "lora_unet_out": (8, 8)}


@pytest.fixture
def loras(web, tmp_path):
    write_kohya(tmp_path / "good.safetensors", MODULES)
    write_kohya(tmp_path / "part.safetensors", {**MODULES, **OTHER}, seed=1)
    write_kohya(tmp_path / "other.safetensors", OTHER, seed=2)
    write_kohya(tmp_path / "wrong.safetensors", {"lora_unet_blocks_0_proj": (48, 32)}, seed=3)
    write_kohya(tmp_path / "lost.safetensors", MODULES, extra={"lora_unet_blocks_0_proj.diff_b": rand(40, seed=4)})
    (tmp_path / "broken.safetensors").write_bytes(b"no LoRA")
    return web


def starts(request):
    return [text.removeprefix("LoRA Guard: ").partition(" (first")[0].partition(": ")[0] for text in request.comments]


PROMPT = "<lora:good:1><lora:part:0.5><lora:other:1><lora:wrong:1><lora:broken:1><lora:gone:1><lora:good:0,8>"


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("hires", [None, PROMPT])
def test_each_is_said_once_in_an_image_and_again_in_the_next(loras, lines, times, hires):
    for _ in range(2):
        lines.lines.clear()
        p = loras.image(PROMPT, n_iter=times, hr_prompt=hires)
        assert sorted(starts(p)) == [
            "broken.safetensors NOT applied",
            "gone NOT applied",
            "good NOT applied",
            "other.safetensors NOT applied",
            "part.safetensors",
            "wrong.safetensors NOT applied",
        ]
        assert not any("good.safetensors" in text for text in p.comments), "it is applied"
        shown = [line for _, line in lines.lines if "(LG-L0" in line]
        assert sorted(f"LoRA Guard: {line}" for line in shown) == sorted(p.comments), "the log says the same, once"
    assert loras.strengths() == [("good", 1.0), ("part", 0.5)]


def test_good_loras_say_nothing(loras):
    p = loras.image("<lora:good:1>", n_iter=2, hr_prompt="<lora:good:0.5>")
    assert p.comments == {}
    assert page(p) == "<p class='comments'></p>"


BLOCK = {"lora_unet_blocks_0_qkv": (96, 32), "lora_unet_blocks_0_proj": (32, 32)}


@pytest.mark.parametrize(
    ("left", "applied", "says"),
    [
        (0, True, None),
        (1, True, "that is 33 % of the file, so the picture lacks a good part of it"),
        (2, True, "that is 50 % of the file, so the picture lacks a good part of it"),
        (3, False, "NOT applied: 3 of its 5 modules have no place in this model"),
    ],
)
def test_how_much_is_left_out_is_said_and_above_half_of_it_nothing_is_applied(loras, tmp_path, left, applied, says):
    extra = {f"lora_unet_middle_{n}": (8, 8) for n in range(left)}
    write_kohya(tmp_path / "some.safetensors", {**BLOCK, **extra}, seed=1)
    for _ in range(2):
        p = loras.image("<lora:some:1>", n_iter=2)
        assert bool(loras.strengths()) is applied
        assert len(p.comments) == (says is not None)
        assert all(says in text for text in p.comments)
        loras.image("<lora:good:1>")


def test_a_small_part_is_said_and_the_rest_is_applied(loras, tmp_path, monkeypatch):
    from lib_lora_guard.adapters import left_out

    monkeypatch.setattr(left_out, "MUCH", 0.6)
    (text,) = loras.image("<lora:part:1>").comments
    assert text.endswith("that is 50 % of the file, the rest is applied (LG-L02)")


def test_what_cannot_be_applied_is_said_with_its_reason(loras):
    (text,) = loras.image("<lora:lost:1>").comments
    assert text.startswith("LoRA Guard: lost.safetensors: 1 keys cannot be applied to this model: blocks.0.proj.bias: ")
    assert text.endswith("(LG-L02)")


def test_a_pass_that_has_other_loras_adds_its_own_sentences(loras):
    p = loras.image("<lora:broken:1>", hr_prompt="<lora:gone:1>")
    assert starts(p) == ["broken.safetensors NOT applied", "gone NOT applied"]
    assert starts(loras.image("<lora:good:1>")) == [], "of the last image"


def test_an_image_in_an_image_has_sentences_of_its_own(loras):
    inner = []

    def adetailer(p):
        if not inner:
            inner.append(None)
            inner[0] = loras.image("<lora:gone:1><lora:broken:1>")

    loras.after = adetailer
    outer = loras.image("<lora:gone:1>", n_iter=2)
    assert starts(outer) == ["gone NOT applied"]
    assert starts(inner[0]) == ["gone NOT applied", "broken.safetensors NOT applied"]
    assert not loras.words.is_open


def test_an_image_that_ends_early_leaves_nothing_behind(loras):
    with pytest.raises(RuntimeError, match="stopped"):
        loras.image(PROMPT, n_iter=2, stop_at=0)
    assert not loras.words.is_open
    assert len(loras.image(PROMPT).comments) == 6


def test_a_host_without_comments_has_the_log(loras, lines):
    loras.image(PROMPT, request=OldRequest, n_iter=2)
    assert len([line for _, line in lines.lines if "(LG-L0" in line]) == 6
    assert loras.network.errors == {"gone": 1}, "what such a host shows itself"


def test_the_hosts_own_line_does_not_say_it_again(loras):
    p = loras.image("<lora:gone:1>")
    assert len(p.comments) == 1
    assert not any("Networks with errors" in text for text in p.comments)


def test_a_comment_that_fails_costs_no_image(loras, lines):
    class Failing(Request):
        def comment(self, text):
            raise RuntimeError("planted")

    loras.image(PROMPT, request=Failing)
    assert loras.strengths() == [("good", 1.0), ("part", 0.5)]
    assert len([line for _, line in lines.lines if "(LG-L0" in line]) == 6


def test_names_are_shown_as_they_are_and_never_as_markup(loras, tmp_path):
    name = "<img src=x onerror=alert(1)>&amp;"
    try:
        (tmp_path / f"{name}.safetensors").write_bytes(b"no LoRA")
    except OSError:
        pytest.skip("no such names on this system")
    loras.networks.list_available_networks()
    p = Request("")
    with loras.words.image(id(p), p.comment):
        loras.activate(p, "<lora:line\nbreak:1>")
        loras.networks.load_networks([name], [1.0], [1.0], [None])
    broken, missing = sorted(p.comments, reverse=True)
    assert "line?break NOT applied" in broken + missing
    shown = page(p)
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;amp;.safetensors NOT applied" in shown, "escaped once, by the host"
    assert "<img" not in shown
    assert shown.count("<br>") == len(p.comments), "one line each"


def test_the_readers_language(loras, lines):
    loras.settings.options = {"lora_guard_language": "zh"}
    (text,) = loras.image("<lora:gone:1>").comments
    assert text.startswith("LoRA Guard: gone 未应用：没有这个名称的 LoRA")
    assert lines.about("gone NOT applied"), "the log keeps both"
    loras.settings.options = {"localization": "zh_CN"}
    (text,) = loras.image("<lora:gone:1>").comments
    assert "未应用" in text


def test_an_extension_that_activates_outside_of_an_image_is_heard_too(loras, lines):
    p = Request("")
    loras.activate(p, "<lora:gone:1><lora:x:0,8>")
    assert starts(p) == ["x NOT applied", "gone NOT applied"]
    assert not loras.words.is_open


def test_a_model_that_lacks_a_lora_at_work_is_named(loras, lines):
    refused = LoraReport("nan.safetensors", 1.0, refused="it holds NaN")
    lost = LoraReport("half.safetensors", 1.0, used=3, lost=["a.weight: too large"])
    report = ApplyReport("KModel", [refused, lost, LoraReport("good.safetensors", 1.0, used=4)], 0, 0, 1.0)
    loras.after = lambda p: [loras.words.tell_of([report], is_logged=True), loras.words.tell_of([report])]
    p = loras.image("<lora:good:1>", n_iter=2)
    assert list(p.comments) == [
        "LoRA Guard: nan.safetensors NOT applied to KModel: it holds NaN (LG-L01)",
        "LoRA Guard: half.safetensors: 1 of its weights are left out of KModel: a.weight: too large (LG-L02)",
    ]
    assert lines.about("nan.safetensors") == [], "the log has the report itself"
    loras.after = lambda p: loras.words.tell_of([report])
    loras.image("<lora:good:1>", n_iter=2)
    assert len(lines.about("nan.safetensors")) == 1


def test_factors_that_a_whole_difference_replaces_are_keys_of_their_module_and_no_modules(loras, tmp_path):
    write_kohya(tmp_path / "both.safetensors", MODULES, extra={"lora_unet_blocks_0_proj.diff": rand(32, 32, seed=4)})
    loras.networks.list_available_networks()
    (line,) = loras.image("<lora:both:1>").comments
    # 3 of the file's 7 tensors; its two modules are both applied.
    assert "3 keys cannot be applied to this model: " in line
    assert "that is 43 % of the file, the rest is applied" in line


def test_a_lora_has_one_line_even_if_parts_of_it_are_lost_in_different_places(loras, lines):
    lost = LoraReport("part.safetensors", 0.5, used=3, lost=["a.weight: too large"])
    loras.after = lambda p: loras.words.tell_of([ApplyReport("KModel", [lost], 0, 0, 1.0)])
    p = loras.image("<lora:good:1><lora:part:0.5>", n_iter=2)
    (line,) = p.comments
    assert line.startswith(
        "LoRA Guard: part.safetensors: 2 of its keys have no place in this model and are left out (first: "
    )
    assert line.endswith("; part.safetensors: 1 of its weights are left out of KModel: a.weight: too large (LG-L02)")
    assert sum("LG-L02" in text for text in lines.about("part.safetensors")) == 2, "the log says each when it is found"


def test_the_same_sentence_on_two_models_is_one_that_names_both(loras):
    models = ("KModel", "CLIP", "T5")
    refused = [
        ApplyReport(model, [LoraReport("nan.safetensors", 1.0, refused="it holds NaN")], 0, 0, 1.0) for model in models
    ]
    loras.after = lambda p: loras.words.tell_of(refused)
    assert list(loras.image("<lora:good:1>", n_iter=2).comments) == [
        "LoRA Guard: nan.safetensors NOT applied to KModel, CLIP, T5: it holds NaN (LG-L01)"
    ]


def test_a_host_that_takes_no_line_back_shows_both(loras):
    shown = []
    with loras.words.image(1, shown.append):
        for model in ("KModel", "CLIP"):
            loras.words.tell_of([ApplyReport(model, [LoraReport("nan", 1.0, refused="NaN")], 0, 0, 1.0)])
    assert [line.partition(": ")[2] for line in shown] == [
        "nan NOT applied to KModel: NaN (LG-L01)",
        "nan NOT applied to CLIP: NaN (LG-L01)",
    ]
