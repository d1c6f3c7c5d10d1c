"""The LoRAs of the models that Forge loads: the VRAM that their factors will take, and what an engine is about to do."""

import contextlib

import pytest
import torch
from support.card_scene import flux
from support.fake_card import RAM

from lib_lora_guard.hosts.forge import lora_loading
from lib_lora_guard.recorder.flight_recorder import Phase
from lib_lora_guard.settings import LoraMode

NAME = "style.safetensors"
RANK, OUT, IN = 4, 32, 16
FACTORS = RANK * (OUT + IN)
"""Numbers in the factors of `lora()`."""
WHOLE = OUT * IN
"""Numbers in the change of `diff()`."""


def lora():
    return "lora", (torch.zeros(OUT, RANK), torch.zeros(RANK, IN), None, None, None)


def diff():
    return "diff", (torch.zeros(OUT, IN),)


@pytest.fixture
def stacked(scene):
    """A denoiser on the card with a stack of the given values, one to each layer."""

    def made(*values, online=False, **model):
        patcher = flux(scene, 5)
        for name, value in model.items():
            setattr(patcher.model, name, value)
        keys = [name for name, _ in patcher.model.named_parameters() if name.endswith("weight")]
        patches = dict(zip(keys, values, strict=False))
        patcher.lora_patches = {
            (NAME, 0.5, 1.0, online): {key: [[0.5, value, 1.0, None, None]] for key, value in patches.items()}
        }
        return patcher

    return made


@pytest.mark.parametrize(
    ("model", "element_bytes"),
    [
        ({"computation_dtype": torch.float32}, 4),
        ({"computation_dtype": torch.bfloat16}, 2),
        ({"computation_dtype": torch.float16}, 2),
        # As in a model of another extension: fp16.
        ({"computation_dtype": None}, 2),
        ({"computation_dtype": "fp8"}, 2),
    ],
)
def test_factors_take_what_they_are_in_the_dtype_that_the_model_computes_in(scene, stacked, model, element_bytes):
    patcher = stacked(lora(), lora(), **model)
    assert scene.guard.loras.factor_bytes(patcher) == 2 * FACTORS * element_bytes


def test_the_factors_of_every_lora_of_the_stack_count(scene, stacked):
    patcher = stacked(lora())
    (patches,) = patcher.lora_patches.values()
    patcher.lora_patches = {**patcher.lora_patches, ("other.safetensors", 1.0, 1.0, False): patches}
    assert scene.guard.loras.factor_bytes(patcher) == 2 * FACTORS * 2


@pytest.mark.parametrize(
    ("storage", "merged"),
    [
        ({}, True),
        ({"storage_dtype": torch.float16}, True),
        ({"storage_dtype": torch.bfloat16}, True),
        ({"storage_dtype": torch.float32}, True),
        ({"storage_dtype": torch.float8_e4m3fn}, False),
        ({"storage_dtype": "nf4"}, False),
        ({"storage_dtype": "gguf"}, False),
    ],
)
def test_a_change_of_the_whole_weight_takes_nothing_where_it_is_merged(scene, stacked, storage, merged):
    patcher = stacked(lora(), diff(), **storage)
    assert scene.guard.loras.factor_bytes(patcher) == 2 * (FACTORS + (0 if merged else WHOLE))


def test_factors_that_are_on_the_card_already_are_not_reserved_again(scene, stacked, monkeypatch):
    patcher, resident = stacked(lora(), lora()), [0]
    monkeypatch.setattr(scene.guard.stacks, "resident_bytes", lambda loader: resident[0])
    for resident[0], coming in ((300, 2 * FACTORS * 2 - 300), (2 * FACTORS * 2, 0), (9_999, 0)):
        assert scene.guard.loras.factor_bytes(patcher) == coming


@pytest.mark.parametrize(
    ("resident", "comes", "is_current", "left"),
    [
        (900, False, False, 0),
        # As much comes as is there: they make room for each other, and nothing goes over the link twice.
        (900, True, False, 900),
        (900, False, True, 900),
        # Too little to be worth it.
        (400, False, False, 400),
    ],
    ids=["removed", "another", "the same", "small"],
)
def test_factors_that_a_smaller_stack_replaces_leave_before_room_is_made(
    scene, stacked, monkeypatch, resident, comes, is_current, left
):
    """Of a stack that is taken off the factors lay on the card while the room for the next steps was counted."""
    monkeypatch.setattr(lora_loading, "SURPLUS_BYTES", 500)
    patcher = stacked(lora(), lora()) if comes else stacked()
    there, stacks = [resident], scene.guard.stacks
    monkeypatch.setattr(stacks, "resident_bytes", lambda loader: there[0])
    monkeypatch.setattr(stacks, "is_current", lambda patcher: is_current)
    monkeypatch.setattr(stacks, "drop_device_copies", lambda loader: there.__setitem__(0, 0))
    counted = []
    factor_bytes = scene.guard.loras.factor_bytes
    monkeypatch.setattr(
        scene.guard.loras, "factor_bytes", lambda patcher: (counted.append(there[0]), factor_bytes(patcher))[1]
    )
    scene.load(patcher)
    assert there == [left]
    assert set(counted) == {left}, "what is counted is what is there"


@pytest.mark.parametrize(
    ("stack", "left"),
    [
        ([(NAME, 0.9, 1.0, False)], 9_999),
        ([(NAME, 0.9, 1.0, False), ("other.safetensors", 1.0, 1.0, False)], 9_999),
        ([("other.safetensors", 1.0, 1.0, False)], 0),
        ([], 0),
    ],
    ids=["another strength", "one more", "another", "none"],
)
def test_factors_that_stay_do_not_leave_first_whatever_is_foreseen_of_them(scene, stacked, monkeypatch, stack, left):
    """Those of a weight side are there in the dtype of their file: an fp32 LoHa takes twice what is foreseen for it."""
    monkeypatch.setattr(lora_loading, "SURPLUS_BYTES", 500)
    patcher, stacks = stacked(lora(), lora()), scene.guard.stacks
    scene.load(patcher)
    (on_it,) = stacks.report_for(patcher).loras
    # The layers of this model are too small for it.
    on_it.refused, there = None, [9_999]
    monkeypatch.setattr(stacks, "resident_bytes", lambda loader: there[0])
    monkeypatch.setattr(stacks, "drop_device_copies", lambda loader: there.__setitem__(0, 0))
    (patches,) = patcher.lora_patches.values()
    changed = patcher.clone()
    changed.lora_patches = dict.fromkeys(stack, patches)
    scene.load(changed)
    assert there == [left]


def test_a_step_has_its_factors_once_wherever_they_are(scene, stacked, monkeypatch):
    patcher, resident = stacked(lora(), lora()), [0]
    monkeypatch.setattr(scene.guard.stacks, "resident_bytes", lambda loader: resident[0])
    foreseen = 2 * FACTORS * 2
    for resident[0], in_step in ((0, foreseen), (300, foreseen), (foreseen, foreseen), (9_999, 9_999)):
        assert scene.guard.loras.step_bytes(patcher) == in_step
    engine = scene.guard.stacks.state(patcher.lora_loader).engine
    monkeypatch.setattr(engine, "device_bytes", lambda: 777)
    assert scene.guard.loras.step_bytes(patcher) == 9_999, "they are not applied yet"
    monkeypatch.setattr(scene.guard.stacks, "is_current", lambda patcher: True)
    assert scene.guard.loras.step_bytes(patcher) == 777, "what was foreseen is known now"


def test_a_patch_that_cannot_be_read_takes_nothing(scene, stacked):
    patcher = stacked(lora(), ("unheard of", (1, 2)), None, ("lora", ()))
    assert scene.guard.loras.factor_bytes(patcher) == FACTORS * 2


def test_without_a_stack_or_a_card_nothing_is_reserved(scene, stacked):
    assert scene.guard.loras.factor_bytes(stacked()) == 0
    on_cpu = stacked(lora())
    on_cpu.load_device = RAM
    assert scene.guard.loras.factor_bytes(on_cpu) == 0


def test_what_is_left_to_forge_is_reserved_by_forge(scene, stacked):
    patcher = stacked(lora())
    assert scene.guard.loras.factor_bytes(patcher) > 0
    assert not patcher.has_online_lora()
    scene.guard.settings.mode = lambda: LoraMode.OWN
    with_own = stacked(lora(), online=True)
    assert scene.guard.loras.factor_bytes(with_own) == 0
    # And Forge is told its own answer.
    assert with_own.has_online_lora()


def test_an_engine_tells_the_journal_what_it_is_about_to_do(scene):
    told = []
    scene.guard.journal.phase = lambda phase, plan: told.append((phase, plan)) or contextlib.nullcontext()
    denoiser = flux(scene, 5)
    with scene.guard.stacks.state(denoiser.lora_loader).engine.watch(Phase.MERGE, 7):
        assert told == [(Phase.MERGE, {"ram": 7})]
