"""What LoRA factors take is in what Neo keeps free, for as long as they are not on the device."""

import types

import pytest
import torch
from support.make import rand

from lib_lora_guard.adapters import LoraAdapter, Term
from lib_lora_guard.adapters.whole import DiffAdapter
from lib_lora_guard.hosts.neo.memory import NeoMemory, NeoSizes
from lib_lora_guard.hosts.neo.patchers import LORAS
from lib_lora_guard.hosts.neo.swapped import Swapped
from lib_lora_guard.runtime.host import FittedLora
from lib_lora_guard.runtime.journal import Journal
from lib_lora_guard.runtime.ram_copies import RamCopies
from lib_lora_guard.runtime.rule_log import RuleLog

CUDA = torch.device("cuda")


class Engine:
    def __init__(self, on_device, resident):
        self.device_bytes, self.resident_bytes = lambda: on_device, lambda: resident


class Stacks:
    stack, current = None, False

    def known(self, model):
        return self.stack

    def is_current(self, patcher):
        return self.current


def patcher(*adapters, device=CUDA):
    model = torch.nn.Linear(8, 8)
    model.computation_dtype = torch.bfloat16
    made = types.SimpleNamespace(model=model, load_device=device, patches={})
    terms = {f"w{n}": [Term(adapter, 1.0)] for n, adapter in enumerate(adapters)}
    setattr(made, LORAS, (FittedLora("a.safetensors", terms, 0.5),) if adapters else ())
    return made


LOW_RANK = LoraAdapter(up=rand(8, 2, seed=1), down=rand(2, 8, seed=2), alpha=1.0)
WHOLE = DiffAdapter(rand(8, 8, seed=3))


@pytest.fixture
def memory():
    def unknown():
        raise OSError("no look at the memory")

    return NeoMemory(
        types.SimpleNamespace(get_total_memory=lambda device: 1 << 20),
        Stacks(),
        Journal(unknown),
        RuleLog(),
        Swapped(RamCopies(lambda: False)),
    )


def test_low_rank_factors_count_in_the_dtype_that_they_are_used_in(memory):
    assert memory.factor_bytes(patcher(LOW_RANK)) == 32 * 2
    assert memory.factor_bytes(patcher(LOW_RANK, LOW_RANK, WHOLE)) == 32 * 2, "each once; a difference is merged"
    assert memory.factor_bytes(patcher()) == 0
    assert memory.factor_bytes(patcher(LOW_RANK, device=torch.device("cpu"))) == 0


def test_what_is_on_the_device_already_counts_no_more(memory):
    memory._stacks.stack, memory._stacks.current = types.SimpleNamespace(engine=Engine(100, 30)), True
    assert memory.factor_bytes(patcher(LOW_RANK)) == 70
    memory._stacks.current = False
    assert memory.factor_bytes(patcher(LOW_RANK)) == 64, "another stack comes"


def test_both_of_neos_numbers_grow_by_the_factors(memory):
    asked = []

    def original(models, memory_required, force, minimum):
        asked.append((memory_required, force, minimum))
        return "loaded"

    models = [patcher(LOW_RANK), patcher()]
    assert memory.load_models_gpu(original, models, 1000, minimum_memory_required=500) == "loaded"
    assert memory.load_models_gpu(original, models[:1], memory_required=10) == "loaded"
    assert asked == [(1064, False, 564), (74, False, None)]


def test_factors_are_told_once_of_each_model(memory, lines):
    models = [patcher(LOW_RANK), patcher(LOW_RANK, LOW_RANK)]
    for model in models * 3:
        memory.load_models_gpu(lambda *args: None, [model])
    assert len(lines.about("LG-R06")) == len(models)


@pytest.mark.parametrize(("wanted", "given"), [(-5.0, 0), (float("nan"), 0), (1e9, 1 << 20), (1e30, 1e30)])
def test_no_request_is_larger_than_the_card_negative_or_no_number(memory, lines, wanted, given):
    asked = []
    memory.load_models_gpu(lambda models, required, *rest: asked.append(required), [patcher()], wanted)
    assert asked == [given]
    assert lines.about("LG-R0") != []


def test_sizes_by_device_count_what_is_stored():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False, device="meta"))
    sizes, cpu = NeoSizes(), torch.device("cpu")
    assert sizes.module_size(model) == 128
    assert sizes.module_size(model, include_device=cpu) == 64
    assert sizes.module_size(model, exclude_device=cpu) == 64
    assert sizes.module_size(model, exclude_device=torch.device("meta"), include_device=cpu) == 64
