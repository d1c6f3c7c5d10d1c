import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_lora_guard.adapters.finite import may_not_be_finite

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.mark.parametrize("form", DTYPES)
@given(
    words=st.lists(st.integers(0, 255), max_size=40),
    place=st.integers(0, 40),
    special=st.sampled_from(["inf", "-inf", "nan", "-nan"]),
)
def test_only_what_is_not_finite_is_found(form, words, place, special):
    dtype = DTYPES[form]
    raw = torch.tensor(words, dtype=torch.uint8)
    raw = raw[: raw.numel() // dtype.itemsize * dtype.itemsize]
    values = raw.view(dtype)
    assert may_not_be_finite(raw, form) == (not bool(values.isfinite().all()))
    if values.numel():
        values = values.nan_to_num(0.0, 0.0, 0.0)
        assert not may_not_be_finite(values.view(torch.uint8), form)
        values[place % values.numel()] = float(special)
        assert may_not_be_finite(values.view(torch.uint8), form)
