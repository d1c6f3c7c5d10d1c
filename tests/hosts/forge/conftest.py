import logging

import pytest
from contract.host import Host
from support.card_scene import parts_of, scene_of
from support.still_ram import keep_ram_still

from lib_lora_guard.planning import on_card


@pytest.fixture(scope="module", autouse=True)
def _still_ram():
    with pytest.MonkeyPatch.context() as patch:
        keep_ram_still(patch)
        yield


@pytest.fixture(scope="module")
def parts():
    with parts_of(Host()) as found:
        yield found


@pytest.fixture(scope="module")
def swapping_in_bytes():
    """On a card of a few kilobytes: of real megabytes a quarter of the room would always be less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_card, "SWAPPING_BYTES", 768)
        patch.setattr(on_card, "swapping_bytes", lambda *_: on_card.SWAPPING_BYTES)
        yield


@pytest.fixture
def scene(parts):
    with scene_of(parts) as found:
        yield found


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    return lambda: [record.getMessage() for record in caplog.records]
