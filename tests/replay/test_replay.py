"""The numbers in users' logs come out of the formulas, and of nothing else."""

import dataclasses

import pytest

from lib_lora_guard.replay import forge_memory, guard_case, known_models
from lib_lora_guard.replay import lines as lines_module
from lib_lora_guard.replay.elsewhere import elsewhere, everything_line
from lib_lora_guard.replay.field_cases import CASES, FieldCase, Outcome, thread_url
from lib_lora_guard.replay.lines import Implied, Seen, lines
from lib_lora_guard.replay.replay import GuardOutcome, replay, replay_all

REPRODUCED = [2, 3, 4, 5, 11, 12, 18, 22, 24, 25, 29, 34, 36, 38, 39, 47, 49]


def case(number) -> FieldCase:
    return CASES[number - 1]


def line(number, name):
    return next(one for one in lines(case(number)) if one.name == name)


def test_there_are_54_configurations_with_a_thread_each():
    assert [one.number for one in CASES] == list(range(1, 55))
    assert all(one.urls and all(url.startswith("https://github.com/") for url in one.urls) for one in CASES)
    assert all(one.host in ("Forge", "Neo", "Classic", "reForge", "ComfyUI") for one in CASES)
    assert {one.outcome for one in CASES} == set(Outcome) - {Outcome.REFUSED}
    assert thread_url("NP979") == "https://github.com/Haoming02/sd-webui-forge-classic/pull/979"
    first = case(1)
    assert (first.gpu, first.vram_total_mb, first.vram_free_mb, first.ram_mb) == ("RTX 3060", 12287, None, 32692)


def test_seventeen_configurations_come_out_and_the_others_say_why_not():
    replays = replay_all()
    assert [one.case.number for one in replays if one.is_reproduced] == REPRODUCED
    assert sum(one.reproduced for one in replays) == sum(len(one.seen) for one in replays) == 62
    for one in replays:
        assert (one.reason_if_none is None) is (one.case.number in REPRODUCED)
        assert one.reason_if_none is None or len(one.reason_if_none) > 10


@pytest.mark.parametrize(
    ("number", "name", "seen"),
    [
        (25, "model: Trying to free", 32585.18),
        (25, "model: Remaining", -16185.96),
        (25, "model: GPU Loaded", 5204.13),
        (25, "model: Swap Loaded", 17496.00),
        (3, "model: Remaining", 2502.53),
        (3, "merge of img_mod.lin: Tried to allocate", 216.00),
        (24, "model: Remaining", 1874.53),
        (34, "model: Remaining", -8306.37),
        (36, "slider at 80204: inference_memory", -31528),
        (38, "model: Trying to free", 47653.84),
        (39, "model: Remaining", 469.84),
        (49, "model: Remaining", 2881.59521484375),
    ],
)
def test_the_numbers_that_are_asked_about_most(number, name, seen):
    found = line(number, name)
    assert found.seen == seen
    assert found.computed == pytest.approx(seen, abs=0.02)  # three numbers of two places and their sum


@pytest.mark.parametrize(
    ("number", "name", "whole"),
    [
        (24, "picture behind the request", 96 * 96),
        (25, "picture behind the VAE's request", 180 * 135),
        (39, "slider rest behind Inference Require", 2048),
        (39, "picture behind the request", 215 * 115),
        (47, "picture behind the request", 128 * 96),
    ],
)
def test_solved_numbers_are_whole(number, name, whole):
    # Half a hundredth of a MB in three places is up to 0.2 latent pixels of 0.08 MB.
    assert line(number, name).solved == pytest.approx(whole, abs=0.2)
    assert line(number, name).reading.startswith(str(whole))


@pytest.mark.parametrize("number", REPRODUCED)
def test_a_number_of_the_log_does_not_change_its_own_prediction(number):
    """Another number in the log does not move what the formula gives for it."""
    before = [one for one in lines(case(number)) if isinstance(one, Seen)]
    tested = 0
    for key, value in case(number).numbers.items():
        other = dataclasses.replace(case(number), numbers={**case(number).numbers, key: value + 1})
        after = [one for one in lines(other) if isinstance(one, Seen)]
        for old, new in zip(before, after, strict=True):
            if old.seen != new.seen:
                tested += 1
                assert new.computed == old.computed, f"{key} goes into {old.name}"
                assert not new.is_reproduced
    assert tested == len(before)


def wrong_factor(monkeypatch):
    monkeypatch.setattr(forge_memory, "REQUEST_FACTOR", 1.25)


def wrong_copy(monkeypatch):
    for module in (forge_memory, lines_module):
        monkeypatch.setattr(module, "FP32_BYTES", 2)


def wrong_storage(monkeypatch):
    # The norms of a low-bit model in 16 bit, as all others are.
    monkeypatch.setitem(known_models.FLUX_STORAGES, "nf4", known_models.Storage(0.55, 0.55, 2, 2))


def wrong_budget(monkeypatch):
    for module in (forge_memory, lines_module, guard_case):
        monkeypatch.setattr(module, "swap_budget_bytes", lambda free, inference: int((free - inference) / 1.3))


@pytest.mark.parametrize(
    ("plant", "lost"),
    [
        (wrong_factor, [2, 3, 18, 24, 25, 29, 38, 47]),
        (wrong_copy, [3, 4, 5, 49]),
        (wrong_storage, [2, 3]),
        (wrong_budget, [25]),
    ],
    ids=["factor", "fp32", "norms", "budget"],
)
def test_a_wrong_formula_is_noticed(monkeypatch, plant, lost):
    plant(monkeypatch)
    assert [one.case.number for one in replay_all() if one.seen and not one.is_reproduced] == lost


def test_lines_of_other_threads_come_out_too():
    found = [one for _, one in elsewhere()]
    assert [one.name for one in found if isinstance(one, Seen) and not one.is_reproduced] == []
    assert len(found) == 15
    (picture,) = (one for one in found if isinstance(one, Implied))
    assert picture.solved == pytest.approx(128 * 128, abs=0.1)
    assert any(one.seen == 1310.72 for one in found if isinstance(one, Seen))


def test_the_sentinel_is_1e30_bytes():
    assert f"{everything_line().computed:.2f}" == "953674316406250018963456.00"
    assert everything_line().is_reproduced


def test_off_is_said_with_its_sign():
    seen = Seen("x", 100.0, 99.5, "formula")
    assert (seen.off, seen.is_reproduced) == (-0.5, False)
    assert Seen("x", 100.0, 100.004, "formula").is_reproduced
    assert not Seen("x", 7, 8, "formula", "weights", rounding=0).is_reproduced


def test_the_guards_column_is_the_callers():
    asked = []

    def guard(one):
        asked.append(one.number)
        if one.number == 2:
            return None
        return GuardOutcome(Outcome.OK, "made up", {"peak": 1.0})

    replays = replay_all(guard)
    assert asked == list(range(1, 55))
    assert replays[1].guard is None
    assert not replays[1].is_changed
    assert replays[2].guard == GuardOutcome(Outcome.OK, "made up", {"peak": 1.0})
    assert replays[2].is_changed
    assert not replays[7].is_changed, "it was ok before"
    assert replay(case(3)).guard is None
