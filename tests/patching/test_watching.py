"""The messages of an engine on its work: once for all layers, where there are any, with the RAM it may take."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.make import Net, host_value

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching import watching
from lib_lora_guard.patching.backup import BackupStore
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.planning.mode import Wish
from lib_lora_guard.recorder.flight_recorder import Phase

SHAPES = {name: tuple(value.shape) for name, value in Net(32, depth=2).state_dict().items()}
KEYS = [name for name, shape in SHAPES.items() if len(shape) == 2]
BYTES = {key: 4 * SHAPES[key][0] * SHAPES[key][1] for key in KEYS}
VALUES = {key: host_value("lora", SHAPES[key], 0) for key in KEYS}


def stack(*keys, strength=1.0):
    terms = {key: [parse_term([strength, VALUES[key], 1.0, None, None], {}, 0)] for key in keys}
    return [LoraRequest("style", strength, terms)]


class Watched:
    def __init__(self):
        self.told, self.open = [], []
        self.model = Net(32, depth=2)
        self.engine, self.access = Engine(self.watch), PlainAccess(self.model)

    @contextlib.contextmanager
    def watch(self, phase, ram_bytes):
        self.told.append((phase, ram_bytes))
        self.open.append(phase)
        try:
            yield
        finally:
            self.open.pop()

    def change(self, requests, wish=Wish.PREFER_MERGE):
        self.told.clear()
        self.engine.change(self.access, requests, wish)
        assert self.open == []
        return self.told


def test_merging_and_restoring_are_announced_with_their_ram():
    watched = Watched()
    size = BYTES[KEYS[0]] + BYTES[KEYS[1]]
    assert watched.change(stack(*KEYS[:2])) == [(Phase.MERGE, size)]
    assert watched.change(stack(*KEYS[:2])) == [], "nothing changed"
    assert watched.change(stack(*KEYS[:2], strength=0.5)) == [(Phase.MERGE, size)], "one takes the other's place"
    assert watched.change(stack(*KEYS[1:3])) == [(Phase.RESTORE, 0), (Phase.MERGE, BYTES[KEYS[1]] + BYTES[KEYS[2]])]
    assert watched.change(stack(*KEYS[:2], strength=0.5)) == [(Phase.RESTORE, 0), (Phase.MERGE, size)]
    assert watched.change(stack(KEYS[0], strength=0.5)) == [(Phase.RESTORE, 0)]
    assert watched.change([]) == [(Phase.RESTORE, 0)]


def test_suspending_merges_and_taking_all_off_are_announced_once():
    watched = Watched()
    watched.change(stack(KEYS[0]))
    watched.told.clear()
    assert watched.engine.suspend_merges()
    assert not watched.engine.suspend_merges()
    assert watched.told == [(Phase.RESTORE, 0)]
    watched.change(stack(KEYS[0]))
    watched.told.clear()
    assert watched.engine.detach_all()
    assert watched.engine.detach_all()
    assert watched.told == [(Phase.RESTORE, 0)]


def test_bypass_is_not_announced():
    watched = Watched()
    for requests in (stack(*KEYS), stack(*KEYS, strength=0.5), []):
        assert watched.change(requests, Wish.NEVER_MERGE) == []
    watched.change(stack(*KEYS), Wish.NEVER_MERGE)
    watched.engine.suspend_merges()
    watched.engine.detach_all()
    assert watched.told == []


def test_backups_of_weights_on_a_device_are_announced(monkeypatch):
    monkeypatch.setattr(watching, "lies_in_ram", lambda parameter: False)
    watched = Watched()
    seen = []
    monkeypatch.setattr(
        BackupStore,
        "keep",
        lambda store, *given, keep=BackupStore.keep: seen.append([*watched.open]) or keep(store, *given),
    )
    size = BYTES[KEYS[0]] + BYTES[KEYS[1]]
    assert watched.change(stack(*KEYS[:2])) == [(Phase.BACKUP, size), (Phase.MERGE, 0)]
    assert seen == [[Phase.BACKUP]] * 2
    merge = (Phase.MERGE, 0)
    assert watched.change(stack(*KEYS[:2], strength=0.5)) == [merge], "their originals are kept"
    assert watched.change(stack(*KEYS[:3], strength=0.5)) == [(Phase.BACKUP, BYTES[KEYS[2]]), merge]
    assert watched.change(stack(*KEYS[1:3], strength=0.3)) == [(Phase.RESTORE, 0), merge]
    watched.change([])
    copies = {KEYS[0]: watched.model.state_dict()[KEYS[0]]}
    with watched.engine.offloaded(copies):
        assert watched.change(stack(*KEYS[:2])) == [(Phase.BACKUP, BYTES[KEYS[1]]), merge], "the host left a copy"


def test_a_change_that_fails_ends_its_phase(monkeypatch):
    watched = Watched()
    watched.change(stack(KEYS[0]))
    set_parameter, wanted = PlainAccess.set_parameter, {"fails": True}

    def failing(access, site, parameter):
        if wanted["fails"] and site.key == KEYS[1]:
            wanted["fails"] = False
            assert watched.open == [Phase.MERGE]
            raise MemoryError
        set_parameter(access, site, parameter)

    monkeypatch.setattr(PlainAccess, "set_parameter", failing)
    with pytest.raises(MemoryError):
        watched.engine.change(watched.access, stack(*KEYS[:2], strength=0.3), Wish.PREFER_MERGE)
    assert watched.open == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([Wish.PREFER_MERGE, Wish.NEVER_MERGE])), max_size=6))
def test_a_watched_engine_gives_the_bits_of_an_unwatched_one(changes):
    """The same sequence with and without one: the same bits."""
    watched, plain = Watched(), Net(32, depth=2)
    plain.load_state_dict(watched.model.state_dict())
    engine, access = Engine(), PlainAccess(plain)
    for count, wish in changes:
        requests = stack(*KEYS[:count])
        watched.change(requests, wish)
        engine.change(access, requests, wish)
        wanted = plain.state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in watched.model.state_dict().items())
        assert sum(phase is Phase.MERGE for phase, _ in watched.told) <= 1
