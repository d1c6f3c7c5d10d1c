"""The strengths of a prompt's tags times a number, in every way to write them."""

import pytest
from support.machine_speed import CpuTime

from lib_lora_guard.planning.prompt_strengths import times
from lib_lora_guard.planning.schedule import read_strengths


@pytest.mark.parametrize(
    ("tags", "half"),
    [
        ("a cat", "a cat"),
        ("<lora:a:0.8> a <lora:b:-1:0.5> cat", "<lora:a:0.4> a <lora:b:-0.5:0.25> cat"),
        ("<lora:a>", "<lora:a:0.5>"),
        ("<lora:a:te=0.5>", "<lora:a:te=0.25>"),
        ("<lora:a:unet=0.5>", "<lora:a:0.5:unet=0.25>"),
        ("<lora:a:1:1:8>", "<lora:a:0.5:0.5:8>"),
        ("<lora:a:1:dyn=8>", "<lora:a:0.5:dyn=8>"),
        ("<lora:a:0@0,1@0.5;0.3~1:hr=0.6>", "<lora:a:0@0,0.5@0.5;0.15~1:hr=0.3>"),
        ("<lora:a:1,0.5@0.8>", "<lora:a:0.5,0.25@0.8>"),
        ("<lyco:a:1><loractl:a:1><hypernet:a:1>", "<lyco:a:0.5><loractl:a:0.5><hypernet:a:1>"),
        ("<lora:a:0,8> <lora:a:x> <lora:a:1e999>", "<lora:a:0,8> <lora:a:x> <lora:a:1e999>"),
        ("<lora:a=b=c:1>", "<lora:a=b=c:0.5>"),
        ("<b>x</b> <lora:>", "<b>x</b> <lora:>"),
        ("<lora:a:1> <lora:b:1", "<lora:a:0.5> <lora:b:1"),
        ("<lora:a <lora:b:1>", "<lora:a <lora:b:1>"),
        ("<lora:a:1>> <b:1", "<lora:a:0.5>> <b:1"),
    ],
)
def test_every_strength_is_multiplied_and_nothing_else(tags, half):
    assert times(tags, 0.5) == half
    assert times(tags, 1) == tags


def test_zero_and_minus_one():
    assert times("<lora:a:-0.5>", 0) == "<lora:a:0>"
    assert times("<lora:a:0.8:hrte=0.1>", -1) == "<lora:a:-0.8:hrte=-0.1>"


@pytest.mark.parametrize("words", ["0@0,1@1", "1,0.2@0.5", "0.7"])
def test_a_schedule_is_that_many_times_as_strong_at_each_step(words):
    (after,) = times(f"<lora:a:{words}>", 0.25)[8:-1].split(":")
    before, scaled = read_strengths([words], {}).model, read_strengths([after], {}).model
    assert [scaled.at(n, 10) for n in range(9)] == pytest.approx([before.at(n, 10) / 4 for n in range(9)])


@pytest.mark.parametrize("part", ["<lora:", "<lora:<", "<lora:a:1", "<lora", "<", "<lora:>"])
def test_tags_without_an_end_are_read_once(part):
    """Milliseconds of the processor; a minute or more where the end of the prompt is read anew at each of them."""
    prompt = part * (300_000 // len(part))
    with CpuTime(5):
        assert times(prompt, 0.5) == prompt
