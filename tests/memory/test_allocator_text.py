"""The text of the allocator options: what is written is one whole string that torch reads."""

import re
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory.allocator_double import OWN_ENTRIES

from lib_lora_guard.memory.allocator_text import (
    BACKEND,
    EXPANDABLE,
    OPTIONS,
    SPLIT,
    AllocatorTextError,
    compose,
    for_now,
    parse,
    same_effect,
    start_line,
    variable_in_force,
)

# Not from a regular expression: hypothesis encodes every character there is before it draws the first of these.
words = st.text(string.ascii_letters + string.digits + "_.>", min_size=1, max_size=8)
lists = st.lists(st.tuples(words, words).map(":".join), min_size=1, max_size=3).map(
    lambda pairs: f"[{','.join(pairs)}]"
)
entries = st.dictionaries(words.filter(lambda word: word not in OPTIONS), words | lists, max_size=4)


@settings(deadline=None, max_examples=60)
@given(entries, OWN_ENTRIES, st.sampled_from(["", " ", "\t", " \n"]))
def test_composed_text_parses_back_with_any_blanks(others, own, blanks):
    given_entries = {**others, **own}
    text = compose(given_entries)
    assert parse(text) == given_entries
    assert parse(blanks + blanks.join(text)) == given_entries
    assert same_effect(text, text)


@settings(deadline=None, max_examples=60)
@given(entries, OWN_ENTRIES)
@example({BACKEND: "a"}, {})
def test_a_running_torch_gets_everything_but_the_backend_and_off_is_said(others, own):
    told = parse(for_now({**others, **own, BACKEND: "native"}))
    others.pop(BACKEND, None)
    assert told == {EXPANDABLE: "False", **others, **own}
    assert BACKEND not in told


def test_a_list_is_one_value_and_of_a_key_given_twice_the_last_counts():
    text = "roundup_power2_divisions:[256:1,512:2,>:4], max_split_size_mb:64,max_split_size_mb:128,"
    assert parse(text) == {"roundup_power2_divisions": "[256:1,512:2,>:4]", SPLIT: "128"}
    assert parse("") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_split_size_mb", 'expected key:value, found "max_split_size_mb"'),
        (",max_split_size_mb:64", 'expected key:value, found ","'),
        ("expandable_segments:True,,backend:native", 'expected key:value, found ","'),
        ("max_split_size_mb:64:65", 'expected a comma before ":"'),
        ("max_split_size_mb:", '"max_split_size_mb" has no value'),
        ("a:[1:2", "a list is opened with [ and not closed"),
        ("a:[1:[2]]", "a list is opened with [ and not closed"),
        ("a:b&c", '"b&c" contains signs that belong to no setting'),
        ('a:"%PATH%"', "contains signs that belong to no setting"),
        ("expandable_segments:true", 'expandable_segments cannot be "true"'),
        ("max_split_size_mb:abc", 'max_split_size_mb cannot be "abc"'),
        ("garbage_collection_threshold:1.0", 'garbage_collection_threshold cannot be "1.0"'),
        ("garbage_collection_threshold:x", 'garbage_collection_threshold cannot be "x"'),
    ],
)
def test_garbage_is_refused_with_a_sentence(text, says):
    with pytest.raises(AllocatorTextError, match=re.escape(says)) as error:
        parse(text)
    assert f"“{text}”" in error.value.message.text("zh")
    assert not same_effect(text, text)


CUDA_NAME, HIP_NAME, COMMON_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize(
    ("names", "torch_version", "rocm", "read"),
    [
        ((CUDA_NAME, HIP_NAME, COMMON_NAME), (2, 12), False, CUDA_NAME),
        ((HIP_NAME, COMMON_NAME), (2, 12), False, HIP_NAME),
        ((COMMON_NAME,), (2, 12), False, COMMON_NAME),
        ((COMMON_NAME,), (2, 9), False, None),
        ((HIP_NAME,), (2, 3), False, None),
        ((HIP_NAME,), (2, 3), True, HIP_NAME),
        ((HIP_NAME, CUDA_NAME), (2, 3), True, CUDA_NAME),
        ((), (2, 12), True, None),
    ],
)
def test_which_variable_torch_reads(names, torch_version, rocm, read):
    assert variable_in_force(dict.fromkeys(names, ""), torch_version, rocm) == read


def test_the_line_for_the_start_file_is_quoted():
    text = "roundup_power2_divisions:[256:1,>:4],expandable_segments:True"
    assert str(start_line(text, windows=True)) == f'Put this line into webui-user.bat: set "{CUDA_NAME}={text}"'
    assert start_line(text, windows=False).facts["line"] == f'export {CUDA_NAME}="{text}"'
