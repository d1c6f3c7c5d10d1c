"""The needs of a step where nothing was measured."""

import math

import pytest
import torch

from lib_lora_guard.hosts.forge import facts
from lib_lora_guard.runtime.corrections import Corrections
from lib_lora_guard.runtime.step_estimates import Estimates


@pytest.mark.parametrize("forges", [7, 7.9, math.inf, math.nan, "much", None])
@pytest.mark.parametrize("shape", [[2, 4, 8, 8], [2, 4], [2, 4, 1, 8, 8], ["b", 4, 8, 8], None])
def test_an_estimate_that_cannot_be_had_is_forges(forges, shape):
    estimates = Estimates(Corrections(), facts)
    model = torch.nn.Linear(2, 2)
    found = estimates.memory_required(lambda model, shape: forges, model, shape)
    assert found == forges or (forges == 7.9 and found == 7) or found is forges
