"""The operators for torch.compile are there whole, or not at all, whatever ends their definition."""

import pytest
import torch

from lib_lora_guard.patching import operators


@pytest.fixture
def anew():
    if not operators.define_operators():
        pytest.skip("this torch has no operators")
    operators._are_there.cache_clear()
    yield
    operators._are_there.cache_clear()
    assert operators.define_operators()


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("place", [0, 1, 4, 5, 6])
def test_an_interrupt_while_they_are_defined_leaves_nothing_in_the_way(place, monkeypatch):
    calls, kept = 0, []

    def interrupted(original):
        def call(*given, **named):
            nonlocal calls
            calls += 1
            if calls == place + 1:
                raise KeyboardInterrupt
            return original(*given, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("register_fake", "register_autograd"):
            patch.setattr(torch.library, name, interrupted(getattr(torch.library, name)))
        try:
            operators.define_operators()
        except KeyboardInterrupt as error:
            # Its traceback holds what the function had.
            kept.append(error)
    assert kept
    assert operators.define_operators()
    # A number that no layer has: they return what they got.
    x, output = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    assert torch.equal(operators.patched_weight(x, 0), x)
    operators.bypass(operators.scaled_input(x, 0), output, 0).sum().backward()
    assert (x.grad.tolist(), output.grad.tolist()) == ([0.0] * 3, [1.0] * 3)
