"""Functions that run outside inference mode and without gradients, wherever they are called from."""

import contextlib

import pytest
import torch

from lib_lora_guard.inference_mode import outside_inference

AROUND = {
    "gradients": contextlib.nullcontext,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "inference mode switched off": lambda: torch.inference_mode(False),
}


def modes():
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


@outside_inference
def inside(fails=False):
    assert modes() == (False, False)
    if fails:
        raise ValueError("planted")
    return torch.ones(1) * 2


@outside_inference
def nested(fails=False):
    made = inside(fails)
    assert modes() == (False, False)
    return made


@pytest.mark.parametrize("call", [inside, nested])
@pytest.mark.parametrize("around", AROUND)
def test_both_modes_are_off_inside_and_as_before_after(around, call):
    with AROUND[around]():
        before = modes()
        assert not call().is_inference()
        assert modes() == before
        with pytest.raises(ValueError, match="planted"):
            call(fails=True)
        assert modes() == before
