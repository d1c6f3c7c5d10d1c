"""The plan of the last load of an image model is kept for the panel."""

import gc

from support.fake_device import CARD, Memory, Module

from lib_lora_guard.planning.last_plan import LastPlan
from lib_lora_guard.runtime.last_plan import LastPlans
from lib_lora_guard.runtime.needs import Needs


def test_it_has_what_a_step_of_the_model_takes():
    plans, model = LastPlans(Memory()), Module(on=5_000, outside=700)
    assert plans.last is None
    plans.note(model, CARD, Needs(1_000, 1_400, 350, factor_bytes=300), factor_bytes=340)
    assert plans.last == LastPlan("Module", 5_700, 5_000, 340, 1_400, 50)
    plans.note(model, CARD, Needs(1_000, 900, 0), factor_bytes=340)
    assert plans.last == LastPlan("Module", 5_700, 5_000, 340, 1_000, 0)


def test_it_goes_with_its_model():
    plans, model = LastPlans(Memory()), Module(on=5_000)
    plans.note(model, CARD, Needs(1_000, 0, 0), factor_bytes=0)
    del model
    gc.collect()
    assert plans.last is None
