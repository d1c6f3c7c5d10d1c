"""The choice of a mode: a table of facts, and that nothing but facts and wish decides."""

import dataclasses

import pytest
from support.make import host_value

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.errors import ModeError
from lib_lora_guard.models.fit import is_input_projection
from lib_lora_guard.planning.mode import Mode, WeightFacts, Wish, choose_mode

LINEAR = WeightFacts("block.proj.weight", (24, 16), "fp8", wide=False, can_bypass=True, can_on_the_fly=True)
DENSE = dataclasses.replace(LINEAR, format="bf16", wide=True)


def terms(kind="lora", shape=(24, 16), **changes):
    entry = [
        0.8,
        host_value(kind, shape, 1, rank=changes.pop("rank", 4), dora=changes.pop("dora", None)),
        changes.get("strength_model", 1.0),
        changes.get("offset"),
        changes.get("function"),
    ]
    return [parse_term(entry, {})]


@pytest.mark.parametrize(
    ("facts", "stack", "wish", "mode"),
    [
        (LINEAR, terms(), "auto", "bypass"),
        (LINEAR, terms("loha", rank=16), "auto", "bypass"),
        (LINEAR, terms("loha", rank=17), "auto", "on_the_fly"),
        (LINEAR, terms("loha", rank=17), "bypass", "bypass"),
        (LINEAR, terms() + terms("loha"), "auto", "bypass"),
        (LINEAR, terms() + terms("glora"), "auto", "on_the_fly"),
        (LINEAR, terms("lokr"), "auto", "on_the_fly"),
        (LINEAR, terms("lokr"), "bypass", "bypass"),
        (dataclasses.replace(LINEAR, one_token=True), terms("lokr"), "auto", "bypass"),
        (LINEAR, terms(dora="output"), "auto", "bypass"),
        (LINEAR, terms(dora="input"), "auto", "bypass"),
        (LINEAR, terms() + terms(dora="output"), "auto", "bypass"),
        (LINEAR, terms() + terms(dora="input"), "auto", "on_the_fly"),
        (LINEAR, terms("loha", dora="output"), "auto", "on_the_fly"),
        (LINEAR, terms(strength_model=0.5), "auto", "bypass"),
        (LINEAR, terms(shape=(24, 8), offset=(1, 8, 8), strength_model=0.5), "auto", "on_the_fly"),
        (LINEAR, terms(function=lambda d: d.flip(0)), "auto", "bypass"),
        (LINEAR, terms(function=lambda d: d.flip(1)), "auto", "on_the_fly"),
        (LINEAR, terms(function=lambda d: 2 * d), "auto", "on_the_fly"),
        (LINEAR, terms(function=lambda d: d.view(3, 8, 16)), "auto", "on_the_fly"),
        (LINEAR, terms(function=lambda d: d[:, 0]), "auto", "on_the_fly"),
        (LINEAR, terms(shape=(8, 16), offset=(0, 8, 8)), "auto", "bypass"),
        (LINEAR, terms(shape=(24, 8), offset=(1, 8, 8)), "auto", "bypass"),
        (LINEAR, terms(shape=(24, 40)), "auto", "on_the_fly"),
        (LINEAR, terms(), "on_the_fly", "on_the_fly"),
        (LINEAR, terms(), "bypass", "bypass"),
        (DENSE, terms(), "auto", "bypass"),
        (DENSE, terms(), "merge", "merge"),
        (DENSE, terms("diff"), "auto", "merge"),
        (DENSE, terms() + terms("nested"), "auto", "merge"),
        (DENSE, terms("diff"), "on_the_fly", "on_the_fly"),
        (LINEAR, terms("diff"), "auto", "on_the_fly"),
        (dataclasses.replace(DENSE, can_bypass=False), terms(), "auto", "on_the_fly"),
        (dataclasses.replace(DENSE, can_on_the_fly=False), terms("glora"), "auto", "merge"),
        (dataclasses.replace(LINEAR, can_on_the_fly=False), terms(), "on_the_fly", "bypass"),
        (dataclasses.replace(DENSE, can_bypass=False, can_on_the_fly=False), terms(), "auto", "merge"),
        (dataclasses.replace(LINEAR, shape=(24,)), [], "auto", "merge"),
    ],
)
def test_mode(facts, stack, wish, mode):
    choice = choose_mode(facts, stack, Wish(wish))
    assert choice.mode is Mode(mode)
    assert choice.reason


@pytest.mark.parametrize(
    ("facts", "stack", "wish", "message"),
    [
        (LINEAR, terms(), Wish.MERGE, "stored as fp8; merging would round most of the LoRA away"),
        (
            dataclasses.replace(LINEAR, can_bypass=False, can_on_the_fly=False),
            terms(),
            Wish.AUTO,
            "read outside any layer",
        ),
        (dataclasses.replace(LINEAR, can_on_the_fly=False), terms("glora"), Wish.AUTO, "gives no access"),
    ],
)
def test_a_mode_that_would_lose_the_lora_is_refused_with_the_key(facts, stack, wish, message):
    with pytest.raises(ModeError, match=message) as refusal:
        choose_mode(facts, stack, wish)
    assert str(refusal.value).startswith("block.proj.weight: ")


@pytest.mark.parametrize(
    ("key", "widened"),
    [
        ("diffusion_model.img_in.weight", True),
        ("diffusion_model.input_blocks.0.0.weight", True),
        ("patch_embedding.weight", True),
        ("diffusion_model.input_blocks.1.0.weight", False),
        ("single_blocks.3.linear1.weight", False),
    ],
)
def test_only_input_projections_may_be_widened(key, widened):
    assert is_input_projection(key) is widened


def test_facts_hold_nothing_about_free_memory():
    assert {f.name for f in dataclasses.fields(WeightFacts)} == {
        "key",
        "shape",
        "format",
        "wide",
        "can_bypass",
        "can_on_the_fly",
        "can_merge",
        "obstacle",
        "one_token",
    }
