"""Forge's names for the LoRAs of a stack, and the keys that other extensions put beside them."""

import pytest

from lib_lora_guard.hosts.forge.identifiers import describe, parse, stack_name, with_online, with_strength

FORGES = ("C:\\loras\\style.safetensors", 0.8, 1.0, False)


@pytest.mark.parametrize(
    ("identifier", "described"),
    [
        (FORGES, ("style.safetensors", 0.8)),
        (("/loras/style.safetensors", 1, 1.0, True), ("style.safetensors", 1.0)),
        (("default", 0.5, 1.0, False), ("default", 0.5)),
        (("", 0.5), ("", 0.5)),
        (("a", "b"), ("('a', 'b')", 1.0)),
        ("style 12:30", ("style 12:30", 1.0)),
        (7, ("7", 1.0)),
    ],
)
def test_the_file_without_its_folder_and_the_strength(identifier, described):
    assert describe(identifier) == described


def test_only_identifiers_of_four_are_forges():
    assert parse(FORGES) == FORGES
    assert parse(FORGES).online is False
    assert [parse(key) for key in ("style", ("a", 1.0), (*FORGES, 1), None)] == [None] * 4


def test_another_strength_changes_nothing_else_and_the_result_has_forges_own_text():
    changed = with_strength(FORGES, 0.25)
    assert changed == (FORGES[0], 0.25, 1.0, False)
    assert str(changed) == str((FORGES[0], 0.25, 1.0, False))
    assert with_strength(FORGES, 0.8) is FORGES
    assert with_strength("key of another extension", 0.25) == "key of another extension"


def test_another_way_of_applying_for_a_key_of_another_extension_too():
    assert str(with_online(FORGES, True)) == str((*FORGES[:3], True))
    assert with_online("key", False) == ("key", 1.0, 1.0, False)


def test_a_stack_is_named_as_forge_does():
    stack = {FORGES: {}, "key": {}}
    assert stack_name(stack) == str(list(stack.keys()))
    assert stack_name(()) == "[]"
