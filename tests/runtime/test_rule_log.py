"""The changes made by the memory rules are logged once while they stay the same."""

import logging

import pytest
import torch

from lib_lora_guard.memory.rules import Finding
from lib_lora_guard.messages import Message
from lib_lora_guard.runtime.image_words import ImageWords
from lib_lora_guard.runtime.rule_log import RuleLog


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def negative(megabytes, rule="LG-R03"):
    return Finding(rule, Message("rule.negative", {"asked_mb": megabytes}))


def test_a_finding_is_logged_once_while_it_stays_the_same(logged):
    rules = RuleLog()
    for _ in range(3):
        rules.tell(negative(-5))
    assert len(logged()) == 1
    rules.tell(negative(-6))
    rules.tell(negative(-5))
    assert len(logged()) == 3, "the number has changed twice"


def test_each_rule_is_remembered_apart(logged):
    rules = RuleLog()
    for _ in range(2):
        rules.tell(negative(-5))
        rules.tell(negative(-5, rule="LG-R02"))
    assert [line.split(":")[0] for _, line in logged()] == ["LG-R03", "LG-R02"]


def step(megabytes, rule="LG-R05"):
    return Finding(rule, Message("rule.step", {"model": "A", "needed_mb": megabytes, "left_mb": 1.0}))


@pytest.mark.parametrize("rule", ["LG-R05", "LG-R06", "LG-R09"])
def test_two_models_of_an_image_do_not_repeat_each_others_findings(logged, rule):
    rules, denoiser, vae = RuleLog(), torch.nn.Module(), torch.nn.Module()
    for _ in range(3):
        rules.tell(step(1_500, rule), denoiser)
        rules.tell(step(3_300, rule), vae)
    assert len(logged()) == 2


def test_two_works_do_not_repeat_each_others_findings(logged):
    rules = RuleLog()
    for _ in range(3):
        for what in ("reading", "moving"):
            rules.tell(Finding("LG-R08", Message("rule.ram_slow", {"what": what, "needed_mb": 2.0, "fast_mb": 1.0})))
    assert len(logged()) == 2


@pytest.mark.parametrize(("rule", "again"), [("LG-R05", "DEBUG"), ("LG-R06", "DEBUG"), ("LG-R09", "WARNING")])
def test_room_that_is_kept_is_told_once_of_each_model(logged, caplog, rule, again):
    caplog.set_level(logging.DEBUG, logger="lib_lora_guard")
    rules, model, other = RuleLog(), torch.nn.Module(), torch.nn.Module()
    for megabytes, about in ((1_500, model), (3_000, model), (1_500, model), (1_500, other)):
        rules.tell(step(megabytes, rule), about)
    first = "WARNING" if rule == "LG-R09" else "INFO"
    assert [level for level, _ in logged()] == [first, again, again, first]


def test_a_rule_that_changed_nothing_is_not_logged(logged):
    RuleLog().tell(None)
    assert logged() == []


@pytest.mark.parametrize(
    ("rule", "level"),
    [("LG-R01", "INFO"), ("LG-R03", "WARNING"), ("LG-R05", "INFO"), ("LG-R06", "INFO"), ("LG-R10", "DEBUG")],
)
def test_what_usual_settings_lead_to_is_information(logged, caplog, rule, level):
    caplog.set_level(logging.DEBUG, logger="lib_lora_guard")
    RuleLog().tell(negative(-5, rule=rule))
    assert [found for found, _ in logged()] == [level]


def test_what_makes_an_image_slow_stands_under_each_and_once(logged):
    words, images = ImageWords(), ([], [])
    slow = [Message("rule.ram_slow", {"what": "reading", "needed_mb": size, "fast_mb": 1.0}) for size in (2.0, 3.0)]
    rules = RuleLog(words)
    for shown in images:
        with words.image(id(shown), shown.append):
            for finding in (negative(-5), *(Finding("LG-R08", says) for says in slow)):
                rules.tell(finding)
    assert images == ([f"LoRA Guard: LG-R08: {slow[0]}"], [f"LoRA Guard: LG-R08: {slow[0]}"])
    assert len(logged()) == 5, "the log has each change"
