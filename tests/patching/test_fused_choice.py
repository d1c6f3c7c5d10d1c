"""Which way the images of one stack take while kernels are compiled."""

import logging

import pytest
import torch

from lib_lora_guard.kernels.choice import COMPILING, REFUSED, UNTRIED, WORKS
from lib_lora_guard.patching import fused_choice
from lib_lora_guard.patching.fused_choice import FusedChoice, Key
from lib_lora_guard.patching.fused_measured import beats_host_cast

CARD = torch.device("meta")
KEY, WIDER = (Key("nf4 64", CARD, torch.bfloat16, rank) for rank in (16, 32))
TOKEN = KEY._replace(kind=f"token {KEY.kind}", rank=200)


class Compiler:
    """The kernel is there after as many looks as `looks` says; None for never."""

    def __init__(self, looks=None):
        self.looks, self.asked = looks, []
        self.is_refused = False

    def ready(self, *key):
        if self.looks:
            self.looks -= 1
        return self.looks == 0

    def prepare(self, kinds, device, dtype, ranks, soon=False):
        self.asked.append((list(kinds), list(ranks), soon))

    def state(self, kind):
        return f"{REFUSED}: why" if self.is_refused else WORKS if self.looks == 0 else COMPILING


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds go by where the choice sleeps."""
    now = [0.0]
    monkeypatch.setattr(fused_choice.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(fused_choice.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def image(choice, *keys):
    with choice.image():
        return [choice.takes(key) for key in keys]


def test_the_first_image_of_a_stack_waits_for_a_kernel_that_is_being_compiled(clock):
    choice = FusedChoice(Compiler(looks=100))
    assert image(choice, KEY) == [True]
    assert 0.9 < clock[0] < 1.1


def test_an_image_waits_once_and_its_repeat_is_made_in_the_same_way(clock, caplog):
    caplog.set_level(logging.INFO, "lib_lora_guard.patching.fused_choice")
    choice = FusedChoice(Compiler())
    choice.prepare([KEY, WIDER], are_new_files=True)
    assert image(choice, KEY, WIDER) == [False, False]
    assert 2.9 < clock[0] < 3.1
    choice.compiler.looks = 0
    assert image(choice, KEY, WIDER) == [False, False]
    assert [f"rank {rank}, was not compiled within 3 s" in caplog.text for rank in (16, 32, 64)] == [True, True, False]
    assert len(caplog.records) == 2
    # Another strength of the same files.
    choice.prepare([KEY, WIDER])
    assert image(choice, KEY, WIDER) == [False, False]
    choice.prepare([KEY, WIDER], are_new_files=True)
    assert image(choice, KEY, WIDER) == [True, True]
    assert clock[0] < 3.1


def test_each_kind_is_compiled_for_its_own_ranks():
    choice = FusedChoice(Compiler())
    dora, loha, lokr = (
        KEY._replace(kind=f"{before} {KEY.kind}", rank=rank) for before, rank in (("dora", 8), ("loha", 8), ("lokr", 1))
    )
    choice.prepare([dora, WIDER, lokr, KEY, loha])
    assert choice.compiler.asked == [
        ([dora.kind, loha.kind], [8], True),
        ([KEY.kind, TOKEN.kind], [16, 32], True),
        ([lokr.kind], [1], True),
    ]


def test_files_that_change_in_an_image_leave_it_and_its_repeat_as_they_are():
    choice = FusedChoice(Compiler())
    with choice.image():
        assert not choice.takes(KEY)
        choice.compiler.looks = 0
        choice.prepare([KEY, WIDER], are_new_files=True)
        assert [choice.takes(KEY), choice.takes(WIDER)] == [False, True]
    assert image(choice, KEY, WIDER) == [False, True]


def test_without_images_and_without_a_compiler_at_work_there_is_no_wait(clock, monkeypatch):
    choice = FusedChoice(Compiler())
    assert not choice.takes(KEY)
    monkeypatch.setattr(choice.compiler, "state", lambda kind: UNTRIED)
    assert image(choice, KEY) == [False]
    assert clock[0] == 0


def test_kernels_that_were_switched_off_are_no_late_ones():
    choice = FusedChoice(Compiler(looks=0))
    choice.is_on = fused_choice.never
    choice.expect(["nf4 64"], CARD, torch.bfloat16)
    assert image(choice, KEY) == [False]
    assert not choice.compiler.asked
    choice.is_on = fused_choice.always
    assert image(choice, KEY) == [True]


def test_usual_ranks_are_expected_and_a_stack_comes_first():
    choice = FusedChoice(Compiler())
    choice.expect(["nf4 64"], CARD, torch.bfloat16)
    choice.casts_too = fused_choice.always
    choice.expect(["nf4 64"], CARD, torch.bfloat16)
    choice.expect([], CARD, torch.bfloat16)
    choice.prepare([WIDER])
    usual = [(["nf4 64"], [rank], False) for rank in (16, 8, 32, 64, 48, 128, 96)]
    usual.append((["token nf4 64"], [16], False))
    assert choice.compiler.asked == [*usual, (["nf4 64"], [0], False), *usual, (["nf4 64", "token nf4 64"], [32], True)]


def test_four_bits_have_products_with_one_token_unless_the_switch_takes_them_away(monkeypatch):
    kinds = ["nf4 64", "nf4 64 crossing", "nf4 32", "fp8 e4m3"]
    choice = FusedChoice(Compiler(looks=0))
    choice.expect(kinds, CARD, torch.bfloat16)
    assert choice.compiler.asked[-1] == ([TOKEN.kind], [16], False)
    assert (choice.may_take(TOKEN), image(choice, TOKEN)) == (True, [True])
    assert not choice.may_take(TOKEN._replace(kind="token dora nf4 64"))
    monkeypatch.setenv(fused_choice.TOKEN_SWITCH, "0")
    choice = FusedChoice(Compiler(looks=0))
    choice.expect(kinds, CARD, torch.bfloat16)
    assert not any(kind.startswith("token") for asked, _, _ in choice.compiler.asked for kind in asked)
    assert (choice.may_take(TOKEN), image(choice, TOKEN)) == (False, [False])


@pytest.mark.parametrize(
    ("kind", "largest"), [("nf4 64 by bf16", 128), ("fp8 e4m3", 128), ("fp8 e4m3 scaled", 256), ("Q4_K baked", 256)]
)
def test_a_stack_whose_bypass_is_faster_keeps_it(kind, largest):
    choice = FusedChoice(Compiler(looks=0))
    for rank in (0, 16, 64, 128, 256):
        key = Key(kind, CARD, torch.bfloat16, rank)
        assert choice.may_take(key) is (rank <= largest), rank
        assert image(choice, key) == [rank <= largest]


def test_the_host_casts_what_it_casts_faster():
    small, large = 3072 * 3072, 3072 * 12288
    assert [beats_host_cast(kind, small) for kind in ("fp8 e4m3", "fp8 e4m3 scaled", "nf4 64", "Q4_K baked")] == [
        False,
        True,
        True,
        True,
    ]
    assert beats_host_cast("fp8 e4m3", large)
    assert not any(beats_host_cast(kind, large) for kind in ("fp8 e4m3 odd", "nf4 64 crossing", "mxfp8"))


@pytest.mark.parametrize("is_said_already", [False, True])
def test_a_kernel_that_fails_ends_its_kind_for_the_image(caplog, is_said_already):
    other = Key("fp8 e4m3", CARD, torch.bfloat16, 16)
    choice = FusedChoice(Compiler(looks=0))
    with choice.image():
        assert all(choice.takes(key) for key in (KEY, WIDER, other))
        choice.compiler.is_refused = is_said_already
        choice.failed(KEY, ValueError("a wrong kernel"))
        choice.failed(KEY, ValueError("a wrong kernel"))
        assert [choice.takes(key) for key in (KEY, WIDER, other)] == [False, False, True]
    assert len(caplog.records) == (0 if is_said_already else 1)
