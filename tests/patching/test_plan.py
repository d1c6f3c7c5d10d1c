"""A plan is carried from one change to the next: what does not depend on a strength is worked out once."""

import pytest
from patching.planned_layers import DORA, FIRST, KEYS, LAYERS, SECOND, Counted, lora

from lib_lora_guard.planning.mode import Mode, Wish


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.parametrize("patches", [FIRST, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("wish", [Wish.AUTO, Wish.ON_THE_FLY])
def test_cheap_forms_are_derived_once_for_each_weight(counted, patches, wish):
    assert counted.change((patches, 0.7), wish=wish) == (LAYERS, LAYERS)
    assert counted.modes() == {Mode.BYPASS if wish is Wish.AUTO else Mode.ON_THE_FLY}
    assert counted.change((patches, 0.3), wish=wish) == (0, 0), "a change of strength"
    assert counted.change((patches, 0.3), wish=wish) == (0, 0), "the same stack again"


def test_only_the_forms_of_a_lora_that_is_new_are_derived(counted):
    counted.change((FIRST, 0.7))
    assert counted.change((FIRST, 0.7), (SECOND, 0.5)) == (LAYERS, LAYERS)
    assert counted.change((FIRST, 0.2), (SECOND, 0.1)) == (0, 0)
    third = lora(150, KEYS[:3])
    assert counted.change((FIRST, 0.2), (SECOND, 0.1), (third, 1.0)) == (3, 3)
    assert counted.change((FIRST, 0.2), (third, 1.0)) == (0, 0), "a LoRA in the middle was taken off"


def test_a_lora_that_becomes_the_first_has_its_forms_derived_anew(counted):
    """A scale of the input is exact for the first term alone."""
    counted.change((FIRST, 0.7), (SECOND, 0.5))
    assert counted.change((SECOND, 0.5)) == (LAYERS, LAYERS)


def test_merging_derives_no_forms(counted):
    assert counted.change((FIRST, 0.7), wish=Wish.MERGE) == (0, 0)
    assert counted.change((FIRST, 0.3), wish=Wish.MERGE) == (0, 0)


def test_another_mode_for_the_same_loras_derives_no_forms(counted):
    counted.change((FIRST, 0.7))
    for wish in (Wish.ON_THE_FLY, Wish.PREFER_MERGE, Wish.BYPASS, Wish.AUTO):
        assert counted.change((FIRST, 0.7), wish=wish) == (0, 0), wish


def test_equal_factors_in_other_tensors_do_not_count_as_the_same_lora(counted):
    counted.change((FIRST, 0.7))
    copies = {key: (kind, tuple(v.clone() if v is not None and not isinstance(v, float) else v for v in content)) for key, (kind, content) in FIRST.items()}  # fmt: skip
    assert counted.change((copies, 0.7)) == (LAYERS, LAYERS)
