"""A stack is changed by the user's mode: what is wished for, what is done where memory ends in a merge, what is reported."""

import contextlib
import gc
import logging

import pytest
import torch
from support.make import host_value

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.errors import RestoreError
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.watching import unwatched
from lib_lora_guard.planning.mode import Mode, Wish
from lib_lora_guard.recorder.crash_report import Precaution
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.runtime.model_stack import MERGE_ATTEMPTS, ModelStack, ModelStacks
from lib_lora_guard.settings import LoraMode


class ScriptedEngine:
    """Ends with the errors of its script, in order; then every change succeeds."""

    def __init__(self, *script):
        self.script, self.wishes, self.attached, self.restores = list(script), [], {}, True

    def change(self, access, requests, wish):
        self.wishes.append(wish)
        error = self.script.pop(0) if self.script else None
        if error is not None:
            raise error
        return ApplyReport("Net", [], 0, 0, 1.0)

    def detach_all(self):
        return self.restores


class Access:
    name = "Net"


def stacks_of(precautions=()):
    return ModelStacks(lambda model: precautions, unwatched)


def change(stacks, stack, mode):
    stack.mode = mode
    return stacks.change(stack, Access(), torch.nn.Linear(1, 1), [], mode)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("mode", "wish"),
    [
        (LoraMode.AUTOMATIC, Wish.AUTO),
        (LoraMode.FP16, Wish.NEVER_MERGE),
        (LoraMode.MERGE, Wish.PREFER_MERGE),
    ],
)
def test_each_mode_has_its_wish(mode, wish):
    stack = ModelStack(ScriptedEngine())
    assert change(stacks_of(), stack, mode)
    assert stack.engine.wishes == [wish]
    assert stack.report.model == "Net"


def test_after_a_crash_in_a_merge_there_is_none_and_that_is_logged_once(lines):
    stacks, stack = stacks_of({Precaution.NO_MERGE}), ModelStack(ScriptedEngine())
    for mode in (LoraMode.MERGE, LoraMode.MERGE, LoraMode.FP16):
        change(stacks, stack, mode)
    assert stack.engine.wishes == [Wish.AUTO, Wish.AUTO, Wish.NEVER_MERGE]
    assert len(lines()) == 1


def test_where_memory_ends_in_a_merge_the_stack_is_applied_without_one(lines):
    stack = ModelStack(ScriptedEngine(MemoryError("planted")))
    assert not change(stacks_of(), stack, LoraMode.MERGE)
    assert stack.engine.wishes == [Wish.PREFER_MERGE, Wish.NEVER_MERGE]
    assert stack.report is not None
    assert "planted" in lines()[0]


@pytest.mark.parametrize(
    ("script", "mode"),
    [
        ([MemoryError("planted"), MemoryError("again")], LoraMode.MERGE),
        ([MemoryError("planted")], LoraMode.FP16),
        ([RuntimeError("planted")], LoraMode.MERGE),
    ],
    ids=["without a merge too", "where none was wished for", "another error"],
)
def test_other_errors_are_the_hosts_to_answer_and_the_report_stays(script, mode):
    stack = ModelStack(ScriptedEngine(*script))
    before = stack.report = ApplyReport("Net", [], 0, 0, 2.0)
    with pytest.raises((MemoryError, RuntimeError)):
        change(stacks_of(), stack, mode)
    assert stack.report is before


def test_a_merge_of_one_stack_is_tried_again_and_then_not_until_it_succeeds_or_another_comes():
    stack = ModelStack(ScriptedEngine())
    tries = [stack.merges_again("a", is_as_wished=False) for _ in range(MERGE_ATTEMPTS + 1)]
    assert tries == [True] * (MERGE_ATTEMPTS - 1) + [False, False]
    assert stack.merges_again("b", is_as_wished=False)
    assert not stack.merges_again("b", is_as_wished=True)
    assert stack.merges_again("b", is_as_wished=False)


def test_what_cannot_be_taken_off_is_an_error():
    stack = ModelStack(ScriptedEngine())
    stack.detach()
    stack.engine.restores = False
    with pytest.raises(RestoreError):
        stack.detach()


def test_reports_are_those_of_living_models_as_they_were_published():
    stacks, first, second = stacks_of(), ModelStack(ScriptedEngine()), ModelStack(ScriptedEngine())
    for stack in (first, second):
        stacks.add(stack)
        change(stacks, stack, LoraMode.AUTOMATIC)
    assert stacks.reports() == ()
    stacks.publish_reports()
    assert set(map(id, stacks.reports())) == {id(first.report), id(second.report)}
    assert stacks.engines() in ([first.engine, second.engine], [second.engine, first.engine])
    first.report = None
    assert len(stacks.reports()) == 2, "until it is published"
    stacks.publish_reports()
    assert stacks.reports() == (second.report,)
    del stack, second
    gc.collect()
    assert stacks.reports() == ()
    stacks.forget()
    assert stacks.engines() == []


def test_a_report_with_something_to_worry_about_is_a_warning(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    stacks = stacks_of()
    for loras in ([], [LoraReport("style", 1.0, refused="broken")]):
        stack = ModelStack(ScriptedEngine(), mode=LoraMode.AUTOMATIC)
        stack.report = ApplyReport("Net", loras, 0, 0, 1.0)
        stacks.publish(stack, "Net")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_a_stack_that_was_left_to_the_host_has_nothing_to_publish(lines):
    stacks_of().publish(ModelStack(ScriptedEngine(), mode=LoraMode.OWN), "Net")
    assert lines() == []


def low_bit(mode):
    """A stack on a weight in fp8, which the guard merges in no mode; the model, so that it lives."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    stacks, stack = stacks_of(), ModelStack(mode=mode)
    request = LoraRequest(
        "a", 1.0, {"0.weight": [parse_term([1.0, host_value("lora", (32, 32), 1), 1.0, None, None], {})]}
    )
    with torch.no_grad():
        assert stacks.change(stack, PlainAccess(model), model, [request], mode)
    assert stack.engine.attached["0.weight"].mode is not Mode.MERGE
    return model, stacks, stack


def test_what_merging_would_lose_is_said_once_a_model_in_the_mode_that_asks_for_it(lines):
    _model, stacks, stack = low_bit(LoraMode.MERGE)
    for _ in range(2):
        stacks.publish(stack, "Net")
    (loss,) = [line for line in lines() if "0.weight" in line]
    assert "float8_e4m3fn" in loss or "fp8" in loss
    assert stack.merge_loss_is_logged
    _model, stacks, stack = low_bit(LoraMode.AUTOMATIC)
    stacks.publish(stack, "Net")
    assert not stack.merge_loss_is_logged


def test_a_loss_that_cannot_be_measured_is_no_error(lines, monkeypatch):
    monkeypatch.setattr("lib_lora_guard.runtime.model_stack.merge_loss", lambda attachments: 1 / 0)
    _model, stacks, stack = low_bit(LoraMode.MERGE)
    stacks.publish(stack, "Net")
    assert not stack.merge_loss_is_logged
    assert len(lines()) == 1


def test_the_work_of_an_engine_is_watched():
    seen = []

    def watch(phase, ram_bytes):
        seen.append(phase)
        return contextlib.nullcontext()

    engine = ModelStacks(lambda model: (), watch).new_engine()
    assert isinstance(engine, Engine)
    with engine.watch("phase", 0):
        assert seen == ["phase"]
