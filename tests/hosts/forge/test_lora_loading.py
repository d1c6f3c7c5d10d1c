"""The LoRAs of the models that Forge loads."""

import contextlib

from support.card_scene import flux

from lib_lora_guard.recorder.flight_recorder import Phase


def test_an_engine_tells_the_journal_what_it_is_about_to_do(scene):
    told = []
    scene.guard.journal.phase = lambda phase, plan: told.append((phase, plan)) or contextlib.nullcontext()
    denoiser = flux(scene, 5)
    with scene.guard.control._state(denoiser.lora_loader).engine.watch(Phase.MERGE, 7):
        assert told == [(Phase.MERGE, {"ram": 7})]
