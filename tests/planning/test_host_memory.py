"""Forge's arithmetic that the guard's plan uses, at its edges. The real functions are in contract/."""

import pytest

from lib_lora_guard.planning import host_memory as forge
from lib_lora_guard.planning.host_memory import Latent
from lib_lora_guard.units import GB, MB


def test_the_estimate_of_a_step():
    square = Latent.of(1024, 1024)
    assert square == Latent(1, 128, 128)
    assert forge.unet_estimate_bytes(square, 2) / MB == pytest.approx(1310.72, abs=1e-9)
    assert forge.unet_estimate_bytes(Latent.of(896, 1152), 2) / MB == pytest.approx(1290.24, abs=1e-9)
    assert forge.unet_estimate_bytes(Latent.of(1024, 1024, 3), 2) == 3 * forge.unet_estimate_bytes(square, 2)
    assert forge.unet_estimate_bytes(square, 4) == 2 * forge.unet_estimate_bytes(square, 2)
    assert forge.unet_estimate_bytes(square, 2, sliced_attention=True) / MB == pytest.approx(1689.6, abs=1e-9)
    assert int(forge.unet_estimate_bytes(square, 2)) == int(1.28 * 2 * 128 * 128 * 2 * 16384)


def test_a_side_that_is_no_multiple_of_eight_is_cut():
    assert Latent.of(1027, 769) == Latent(1, 96, 128)


@pytest.mark.parametrize(
    ("rest", "budget"), [(-1, 0), (0, 0), (1.3 * GB, GB), (10 * GB, 8.75 * GB), (5.41 * GB, 5.41 * GB / 1.3)]
)
def test_the_swap_budget(rest, budget):
    # Above 5.42 GiB the second rule is the larger one.
    assert forge.swap_budget_bytes(rest + GB, GB) == pytest.approx(budget, abs=1)
