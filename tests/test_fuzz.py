"""A few of the files that `fuzz_files.py` and `fuzz_damage.py` make, and of the folders of `fuzz_data.py`: the rules hold with each."""

import os

import pytest
import torch

if not hasattr(torch, "float4_e2m1fn_x2"):
    pytest.skip("the files are of every dtype, some of which this torch lacks", allow_module_level=True)

from fuzz.damage import Maker
from fuzz_files import run


def test_files_made_at_random_are_applied_or_refused_in_a_line():
    found = run(25, seed=1, start=400, say=lambda text: None)
    assert found["files"] == 25
    # Seconds and memory are looked at in the long run only: here a first use may fall into them.
    assert [one for one in found["findings"] if one["rule"] not in ("slow", "memory")] == []


def test_damaged_files_are_refused_in_a_line_or_applied():
    found = run(12, seed=1, start=200, say=lambda text: None, maker=Maker)
    assert found["files"] == 12
    assert [one for one in found["findings"] if one["rule"] not in ("slow", "memory")] == []


@pytest.mark.skipif(os.name != "posix", reason="pipes and links of this kind")
def test_damaged_folders_keep_nothing_from_starting():
    import fuzz_data

    found = fuzz_data.run(25, first=1000, say=lambda text: None)
    assert found["folders"] == 25
    assert [one for one in found["findings"] if one["rule"] != "memory"] == []
