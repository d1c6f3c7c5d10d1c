"""Tags of a prompt that are not understood: each is named, and the others of the prompt are applied."""

import pytest
from contract.lora_files import MODULES
from support.make import write_kohya


@pytest.fixture
def loras(web, tmp_path):
    for seed, name in enumerate(("good", "x")):
        write_kohya(tmp_path / f"{name}.safetensors", MODULES, seed=seed)
    return web


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("0,8", "its strength '0,8' is a list of 2 numbers without steps"),
        ("1;2", "its strength '1;2' is a list of 2 numbers without steps"),
        ("te=0,8", "its strength '0,8' is a list of 2 numbers"),
        ("1:unet=0,8", "its strength '0,8' is a list of 2 numbers"),
        ("1:hr=0,8", "its strength '0,8' is a list of 2 numbers"),
        ("1:hrte=0,8", "its strength '0,8' is a list of 2 numbers"),
        ("0.5:1,0,0,0,1,1,1,1,1,1,1,1", "its strength '1,0,0,0,1,1,1,1,1,1,1,1' is a list of 12 numbers"),
        ("0. 6", "its strength '0. 6' is neither a number nor a schedule"),
        ("FACE", "its strength 'FACE' is neither a number nor a schedule"),
        ("nan", "its strength 'nan' is neither a number nor a schedule"),
        ("1:inf", "its strength 'inf' is neither a number nor a schedule"),
        ("1e31", "its strength '1e31' is neither a number nor a schedule"),
        ("1:1:FACE", "its fourth word 'FACE' is read as the rank of a DyLoRA"),
        ("1:1:8.5", "its fourth word '8.5' is read as the rank of a DyLoRA"),
        ("0@0,1@1:1:FACE", "its fourth word 'FACE'"),
        ("1:1:dyn=x", "its dyn 'x' is not a whole number"),
        ("dyn=", "its dyn '' is not a whole number"),
        ("te=0.5=1", "its strength 'te=0.5=1' is neither a number"),
    ],
)
def test_it_is_named_with_what_was_read_and_the_others_are_applied(loras, lines, arguments, said):
    p = loras.image(f"a cat <lora:good:0.7><lora:x:{arguments}>")
    assert loras.strengths() == [("good", 0.7)]
    (line,) = lines.about("NOT applied")
    assert line.startswith(f"x NOT applied: {said}")
    assert line.endswith(f"correct it in the prompt: <lora:x:{arguments}> (LG-L03)")
    assert list(p.comments) == [f"LoRA Guard: {line}"]
    assert list(loras.takeover.schedules.left_out) == ["x"]
    loras.image("<lora:good:0.7>")
    assert loras.takeover.schedules.left_out == {}


def test_a_tag_without_a_name_is_named(loras, lines):
    loras.image("<lora:te=0.5><lora:good:1>")
    assert loras.strengths() == [("good", 1.0)]
    (line,) = lines.about("NOT applied")
    assert line.startswith("<lora:te=0.5> NOT applied: the tag has no name")


@pytest.mark.parametrize(
    ("arguments", "unet"),
    [
        ("0.8", 0.8),
        (" 0.8 ", 0.8),
        ("-1", -1),
        ("1:1:8", 1),
        ("1:1:dyn=8", 1),
        ("1:1:FACE:dyn=8", None),
        ("1:1:8:FACE", 1),  # no fifth word is read
        ("1:lbw=OUTALL", 1),  # other extensions read their own arguments
        ("0@0,1@10", 0),
        ("0.3@0,1@1", 0.3),
        ("0.5,1@1", 0.5),  # a schedule of sd-webui-loractl whose first number counts alone
        ("te=:unet=0.4", 0.4),
    ],
)
def test_what_was_understood_is_still_understood(loras, lines, arguments, unet):
    p = loras.image(f"<lora:x:{arguments}>")
    assert loras.strengths() == ([] if unet is None else [("x", unet)])
    assert (list(p.comments) == []) is (unet is not None)


@pytest.mark.parametrize(
    ("prompt", "applied", "says"),
    [
        ("<lora:x:0.5><lora:x:0.5>", [("x", 0.5)], "x stands 2 times in the prompt with strength 0.5 for the U-Net"),
        ("<lora:x:0.5><lora:good:1><lora:x:0.5><lora:x:0.5>", [("x", 0.5), ("good", 1.0)], "x stands 3 times"),
        ("<lora:x:0.5><lora:x:0.3>", [("x", 0.5), ("x", 0.3)], None),
        ("<lora:x:0.5:1><lora:x:0.5:0.2>", [("x", 1.0), ("x", 0.2)], "with strength 0.5 for the text encoder"),
    ],
)
def test_one_file_twice_at_one_strength_counts_once_as_in_forge_and_that_is_said(loras, lines, prompt, applied, says):
    p = loras.image(prompt, n_iter=3)
    assert loras.strengths() == applied
    said = lines.about("(LG-L04)")
    assert [f"LoRA Guard: {line}" for line in said] == list(p.comments)
    assert len(said) == (says is not None)
    assert says is None or says in said[0]
