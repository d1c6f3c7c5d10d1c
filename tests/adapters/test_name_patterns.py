"""Patterns of PEFT's configurations against PEFT's own rule, and expressions that a file chooses to cost time."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.machine_speed import CpuTime

from lib_lora_guard.adapters.name_patterns import Expression, Patterns
from lib_lora_guard.errors import LoraFileError

PATTERNS = [
    "proj_out", "^proj_out", "^proj_out$", "attn.proj_out", "^blocks.0.*", r"blocks\.0\.attn\.proj_out", r"blocks\.\d+\.proj_out",
    "(to_q|to_k)", r"to_[qkv]", "blocks.0.attn", ".*", ".*proj_out", ".+proj_out", "pr.j_out", r"blocks\.(0|2)\..*", "x", "",
    "to_q|proj_out", "^to_q|proj_out", r"blocks.\d{1,2}.attn.to_.", r"(?:blocks\.)?\d+\.attn.*", r"[^.]+", r"\w+\.0\.attn\.to_q",
    "blocks.1", "(attn|ff)?.*to_out.0", "to_out.0", "proj_outs?", "^(blocks.0).attn.to_q$", "a{2}", "(a|b)*", r"\Aproj_out\Z", "proj)(_out",
]  # fmt: skip
NAMES = [
    "proj_out", "blocks.0.attn.proj_out", "blocks.10.attn.proj_out", "blocks.2.attn.to_q", "single.blocks.0.attn.to_k",
    "blocks.0.proj_out", "to_out.0", "blocks.0.attn.to_out.0", "aa", "abba", "x", "blocks_0_attn_to_q", "blocks.1", "blocksx1",
]  # fmt: skip


def by_peft(keys, name):
    """The first key that fits, by PEFT's rule; None if none does."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)


def first(keys, name):
    return Patterns({key: n for n, key in enumerate(keys)}).first(name)


def test_every_pattern_with_every_name_is_as_in_peft():
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    for key in PATTERNS:
        for name in NAMES:
            wanted = by_peft([key], name)
            assert wanted is None or get_pattern_key([key], name) == wanted
            assert (first([key], name) == 0) == (wanted is not None), f"{key!r} on {name!r}"


@pytest.mark.parametrize("name", NAMES)
def test_the_first_entry_of_the_json_counts(name):
    for keys in (PATTERNS, PATTERNS[::-1], PATTERNS[7:], PATTERNS[3:4] + PATTERNS[:1], PATTERNS[1::3]):
        wanted = by_peft(keys, name)
        assert first(keys, name) == (None if wanted is None else keys.index(wanted))


words = st.sampled_from(["a", "b", "ab", "0", "10", "to_q", "proj_out"])
names = st.lists(words, min_size=1, max_size=4).map(".".join)
atoms = st.sampled_from(
    ["a", "b", "0", ".", r"\.", ".*", r"\d", r"\d+", "[ab]", "[^a]", "^", "$", "to_q", "(a|b)", "(?:ab)?", "a{2}", "b{1,2}", "a*?"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(atoms, min_size=1, max_size=5).map("".join), min_size=1, max_size=3, unique=True), names)
def test_made_up_patterns_are_as_in_peft(keys, name):
    try:
        wanted = by_peft(keys, name)
    except re.error:
        assume(False)
    assert first(keys, name) == (None if wanted is None else keys.index(wanted))


@pytest.mark.parametrize(
    "expression", ["(a", "a))(", "[a", r"(a)\1", "(?=a)b", "(?i)a", r"\bx", "a++", "a{5000}", "(" * 60 + ")" * 60]
)
def test_what_is_not_understood_is_refused(expression):
    with pytest.raises(LoraFileError, match="is not understood"):
        Patterns({expression: 1})


@pytest.mark.parametrize(
    "expression", ["(a+)+", "(a|a)*b", "(.*)*(.*)*(.*)*x", "(a|aa)+b", ".*.*.*.*.*.*.*b", "(a{1,20}){1,20}b"]
)
def test_no_expression_runs_for_ever(expression):
    with CpuTime(2):
        matched = Patterns({f"{expression}$": 1}).first("a" * 900 + "!")
    assert matched is None


def test_many_names_and_many_keys_are_not_multiplied():
    keys = [f"blocks.{n}.attn.to_{letter}" for n in range(500) for letter in "qkv"]
    patterns = Patterns({key: n for n, key in enumerate(keys)})
    with CpuTime(2):
        assert [patterns.first(f"transformer.{key}") for key in keys] == list(range(len(keys)))


def test_a_whole_expression_is_matched_as_a_whole():
    for text in ("a|ab", "(a|b)c?", r"[a-c]+\.x", "", ".?"):
        for name in ("a", "ab", "b", "bc", "abc.x", "", "abcd"):
            assert Expression(text).fits(name) == (re.fullmatch(text, name) is not None), (text, name)
