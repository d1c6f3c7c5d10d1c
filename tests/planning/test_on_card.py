"""How much of a model that does not fit lies on the card, by the guard's rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_lora_guard.planning.host_memory import MB, swap_budget_bytes
from lib_lora_guard.planning.on_card import weights_on_card_bytes


@pytest.mark.parametrize(
    ("free_mb", "need_mb", "placed_mb", "forges_mb"),
    [
        # Flux in fp8 on a card of 12 GB, of 8 GB; SDXL on 6 GB.
        (12288, 1375, 12288 - 1375 - 768, 12288 - 1375 - 1280),
        (8192, 1375, 8192 - 1375 - 768, 8192 - 1375 - 1280),
        (6144, 1274, 6144 - 1274 - 768, (6144 - 1274) / 1.3),
        # A quarter of the room is less than 768 MB there: as Forge has it.
        (4096, 1024, (4096 - 1024) / 1.3, (4096 - 1024) / 1.3),
        (1000, 1000, 0, 0),
        (500, 1000, 0, 0),
    ],
)
def test_by_hand(free_mb, need_mb, placed_mb, forges_mb):
    assert weights_on_card_bytes(free_mb * MB, need_mb * MB) == pytest.approx(placed_mb * MB, abs=1)
    assert swap_budget_bytes(free_mb * MB, need_mb * MB) == pytest.approx(forges_mb * MB, abs=1)


@given(st.integers(0, 96 << 30), st.integers(0, 48 << 30), st.integers(0, 8 << 30))
def test_never_less_than_forge_and_never_into_what_has_to_be_free(free, need, more):
    placed = weights_on_card_bytes(free, need)
    assert swap_budget_bytes(free, need) <= placed <= max(0, free - need)
    assert weights_on_card_bytes(free + more, need) >= placed
    assert weights_on_card_bytes(free, need + more) <= placed
