"""Arguments of `apply` that are none: one line each, and the model keeps what it had."""

import decimal
import fractions
from pathlib import Path

import pytest
import torch
from contract.lora_files import MODULES
from support.make import Net, write_kohya

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraFileError, LoraGuardError, LoraMismatchError, ModeError
from lib_lora_guard.hosts.plain.stack_argument import read_stack


@pytest.fixture
def guard(tmp_path):
    """A guard whose model has a LoRA already."""
    path = tmp_path / "style.safetensors"
    write_kohya(path, MODULES)
    model = Net(32)
    made = LoraGuard(model)
    made.apply([(path, 0.5)])
    made.kept = model
    made.file = path
    return made


TOKENS = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def same_picture(guard):
    """Whatever was wrong, the model has the stack it had."""
    before = guard.kept(TOKENS)
    yield
    assert torch.equal(guard.kept(TOKENS), before)


class Unprintable:
    def __repr__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("strength", "said"),
    [
        ("0.8", r"this is '0\.8' \(str\)"),
        ("strong", r"this is 'strong' \(str\)"),
        (None, r"this is None \(NoneType\)"),
        (True, r"this is True \(bool\)"),
        (1j, r"this is 1j \(complex\)"),
        ([1.0], r"this is \[1\.0\] \(list\)"),
        (b"1", r"this is b'1' \(bytes\)"),
        (torch.ones(2, 2), r"this is tensor\(\[\[1\., 1\.\], \[1\., 1\.\]\]\) \(Tensor\)"),
        (Unprintable(), r"this is \? \(Unprintable\)"),
        (["x" * 500], r"this is \['x+\.\.\.x+'\] \(list\)"),
    ],
)
def test_a_strength_that_is_no_number(guard, strength, said):
    with pytest.raises(TypeError, match=rf"^style\.safetensors: its strength must be a number, such as in .*; {said}$"):
        guard.apply([(guard.file, strength)])


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), 10**400, 1e30, -1e300])
def test_a_number_out_of_range_is_named(guard, strength):
    with pytest.raises(LoraMismatchError, match=r"^style\.safetensors: .*its strength is .*, not a usable number"):
        guard.apply([(guard.file, strength)])


@pytest.mark.parametrize(
    "strength",
    [1, 0.25, decimal.Decimal("0.25"), fractions.Fraction(1, 4), torch.tensor(0.25), torch.tensor([2]).numpy()[0]],
)
def test_numbers_of_every_library_are_numbers(strength):
    assert read_stack([("a", strength)]) == [(Path("a"), float(strength))]


@pytest.mark.parametrize(
    "stack", [None, 3, "style.safetensors", {"style.safetensors": 1}, ("a", 1.0), [("a",)], {1, 2}]
)
def test_a_stack_that_is_no_list_of_pairs(guard, stack):
    with pytest.raises(TypeError, match=r"^stack must be a list of \(file, strength\) pairs"):
        guard.apply(stack)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((name, "no such file") for name in ("x" * 300, "x" * 5000, "a/" * 3000, "a\0b", "\ud800", "a\nb\x1b[2J")),
        ("", "^.: this is a folder; give a file in it"),
    ],
)
def test_names_that_no_file_can_have(guard, name, says):
    with pytest.raises(LoraFileError, match=says) as raised:
        guard.apply([(name, 1.0)])
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("name", [None, 3, b"style.safetensors", 1.5])
def test_a_file_that_is_no_path(guard, name):
    with pytest.raises(TypeError, match=rf"^a file of the stack must be a path, .* this is a {type(name).__name__}$"):
        guard.apply([(name, 1.0)])


@pytest.mark.parametrize("mode", ["Auto", "never_merge", "prefer_merge", "fp16", "", None, 3, ["merge"]])
def test_every_mode_but_the_four_is_refused(guard, mode):
    with pytest.raises(ModeError, match=r"^mode must be one of auto, bypass, on_the_fly, merge, not "):
        guard.apply([(guard.file, 0.7)], mode=mode)
    assert issubclass(ModeError, LoraGuardError)


def test_the_four_modes_are_taken(guard):
    for mode in ("auto", "bypass", "on_the_fly", "merge", "auto"):
        assert guard.apply([(guard.file, 0.5)], mode=mode).loras[0].label == "style.safetensors"
