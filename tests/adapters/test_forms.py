"""The cheap forms: what fits, what they cost, and that the numbers are those of the factors."""

import pytest
import torch
from support.make import rand

from lib_lora_guard.adapters.forms import (
    KHATRI_RAO_RANK,
    Decomposed,
    InputScale,
    KhatriRao,
    Kronecker,
    LowRank,
    OutputScale,
)

SHAPE = (24, 16)


def low_rank(rank=4, **more):
    return LowRank(rand(24, rank, seed=1), rand(rank, 16, seed=2), 0.5, **more)


def khatri_rao(rank=3):
    a, b = rand(24, rank, seed=1), rand(rank, 16, seed=2)
    return KhatriRao(a, b, a, b, 0.5)


FORMS = {
    "low rank": low_rank(),
    "elementwise product": khatri_rao(),
    "Kronecker": Kronecker((rand(2, 2, seed=1),), (rand(12, 8, seed=2),), 0.5),
    "Kronecker of factors": Kronecker((rand(2, 3, seed=1), rand(3, 2, seed=2)), (rand(12, 3, seed=3), rand(3, 8, seed=4)), 0.5),
    "rows scaled": OutputScale(rand(24, seed=1)),
    "columns scaled": InputScale(rand(16, seed=1)),
    "DoRA by row": Decomposed(low_rank(), rand(24, seed=1), by_row=True, patched_norm=False),
    "DoRA by column": Decomposed(low_rank(), rand(16, seed=1), by_row=False, patched_norm=True),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_form_fits_the_weight_it_was_made_for(name):
    assert FORMS[name].fits(SHAPE)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_does_not_fit_a_weight_with_other_rows_and_columns(name):
    assert not FORMS[name].fits((12, 12))


def test_a_convolution_is_measured_with_its_kernel():
    up, down, core = rand(12, 4, seed=1), rand(4, 8, seed=2), rand(4, 4, 3, 3, seed=3)
    tucker = LowRank(up, down, 1.0, mid=core)
    assert tucker.fits((12, 8, 3, 3))
    assert not tucker.fits((12, 8))
    assert Kronecker((rand(2, 2, seed=1),), (rand(6, 4, 3, 3, seed=2),), 1.0).fits((12, 8, 3, 3))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("low rank", 4 * (24 + 16)),
        ("DoRA by row", 4 * (24 + 16)),
        ("Kronecker", 2 * 2 + 12 * 8),
        ("Kronecker of factors", 2 * 2 + 12 * 3 + 3 * 8),
        ("rows scaled", 0),
        ("columns scaled", 0),
    ],
)
def test_factors_lie_on_the_device_in_the_compute_dtype(name, values):
    assert (FORMS[name].device_bytes(2), FORMS[name].device_bytes(4)) == (2 * values, 4 * values)


def test_an_elementwise_product_stays_in_the_dtype_of_its_file():
    assert khatri_rao().device_bytes(2) == 4 * 2 * 3 * (24 + 16)


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("low rank", 4 * (24 + 16)),
        ("elementwise product", 9 * (24 + 16)),
        ("Kronecker", 16 * 12 + 2 * 24),
        ("DoRA by column", 4 * (24 + 16)),
        ("rows scaled", 24),
    ],
)
def test_operations_grow_with_the_tokens(name, per_token):
    assert FORMS[name].flops(SHAPE, 100) == 2 * 100 * per_token


def test_only_large_elementwise_products_and_kronecker_products_of_many_tokens_do_not_pay():
    assert all(form.pays(one_token=True) for form in FORMS.values())
    assert {name for name, form in FORMS.items() if not form.pays(one_token=False)} == {"Kronecker", "Kronecker of factors"}  # fmt: skip
    assert khatri_rao(16).rank == KHATRI_RAO_RANK
    assert khatri_rao(16).pays(one_token=False)
    assert not khatri_rao(17).pays(one_token=True)


def test_only_factors_with_rows_of_their_own_are_reordered():
    order = torch.arange(24).flip(0)
    assert torch.equal(low_rank().with_rows(order).up, low_rank().up.flip(0))
    assert [name for name, form in FORMS.items() if form.with_rows(order) is not None] == ["low rank"]


def test_scales_of_rows_and_columns_are_multiplied_in_without_rounding_the_factors():
    rows, columns = rand(24, seed=5), rand(16, seed=6)
    form = low_rank(row_scale=rows, column_scale=columns)
    assert torch.equal(form.dense_up(torch.float32, "cpu"), form.up * rows[:, None])
    assert torch.equal(form.dense_down(torch.float32, "cpu"), form.down * columns)
