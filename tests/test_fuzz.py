"""A few of the files that `fuzz_files.py` makes: the rules hold with each."""

import pytest
import torch

if not hasattr(torch, "float4_e2m1fn_x2"):
    pytest.skip("the files are of every dtype, some of which this torch lacks", allow_module_level=True)

from fuzz_files import run


def test_files_made_at_random_are_applied_or_refused_in_a_line():
    found = run(25, seed=1, start=400, say=lambda text: None)
    assert found["files"] == 25
    # Seconds and memory are looked at in the long run only: here a first use may fall into them.
    assert [one for one in found["findings"] if one["rule"] not in ("slow", "memory")] == []
