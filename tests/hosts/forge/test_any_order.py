"""Loading, freeing, cloning and dropping models in any order, on a card that is not there (`support.fake_card`)."""

import contextlib
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.card_scene import REST, TOTAL, assert_as_built, assert_sound, scene_of
from support.fake_card import (
    CARD,
    NO_RAM,
    Denoiser,
    IntegratedAutoencoderKL,
    JointTextEncoder,
    Upscaler,
    bytes_on_card,
    is_swapped,
    sides_of,
    size_of,
)

from lib_lora_guard.planning import activations, on_card

pytestmark = pytest.mark.usefixtures("swapping_in_bytes")

KINDS = (Denoiser, JointTextEncoder, IntegratedAutoencoderKL, Upscaler)


def parts_of(layer):
    return SimpleNamespace(parts=[layer])


sizes = st.lists(st.integers(8, 4_000), min_size=2, max_size=8)

fixed = st.one_of(st.integers(0, 40), st.integers(0, 4_000))

models = st.tuples(st.sampled_from(KINDS), sizes, fixed, st.sets(st.integers(0, 9), max_size=3))

amounts = st.one_of(st.just(0), st.integers(0, 6_000), st.integers(0, 60_000), st.just(math.nan), st.just(-100.0))

places = st.integers(0, 3)

steps = st.one_of(
    st.tuples(st.just("load"), places, amounts, st.integers(0, 500)),
    st.tuples(st.just("load"), places, amounts, st.integers(0, 500)),
    st.tuples(st.just("load_two"), places, places, amounts),
    st.tuples(st.just("free"), amounts, st.one_of(st.none(), places)),
    st.tuples(st.just("clone"), places),
    st.tuples(st.just("free_all")),
    st.tuples(st.just("drop"), places),
    st.tuples(st.just("ballast"), st.integers(0, 3_000)),
)


class Run:
    """Carries out steps and holds the invariants after each."""

    def __init__(self, scene, drawn):
        gc.freeze()
        self.scene = scene
        self.patchers = {}
        self.merged, self.needed = {}, {}
        for place, (kind, sizes, fixed, merged) in enumerate(drawn):
            patcher = scene.patcher(kind, sizes, fixed)
            self.patchers[place] = patcher
            layers = patcher.model.layers()
            self.merged[id(patcher.model)] = {id(layers[i]) for i in merged if i < len(layers)}
        self.sizes = {place: size_of(p.model) for place, p in self.patchers.items()}
        residency = scene.residency
        residency._merged_layers = lambda model: [
            layer for layer in model.layers() if id(layer) in self.merged[id(model)]
        ]

    def on_card(self):
        return {place: bytes_on_card(p.model) for place, p in self.patchers.items()}

    def step(self, name, *values):
        getattr(self, name)(*values)
        self.check()

    def check(self):
        scene = self.scene
        assert scene.machine.free() >= 0
        listed = [one.model.model for one in scene.memory.current_loaded_models]
        assert len({id(model) for model in listed}) == len(listed)
        for place, patcher in self.patchers.items():
            model = patcher.model
            assert size_of(model) == self.sizes[place]
            is_loaded = any(model is one for one in listed)
            assert_sound(model, is_loaded)
            away = [layer for layer in model.layers() if is_swapped(layer) and id(layer) not in self.merged[id(model)]]
            assert scene.away(patcher) == sum(size_of(layer) - bytes_on_card(parts_of(layer)) for layer in away)
            if not is_loaded and model not in scene.guard.placement._given_up:
                assert_as_built(model)
                assert not away

    def needs(self, patchers, required, hard):
        def within(value):
            return 0 if math.isnan(value) else max(0, min(value, TOTAL))

        is_vae = any(isinstance(p.model, IntegratedAutoencoderKL) for p in patchers)
        share = activations.VAE_HOLDS_WHERE_FORGE_HAS if is_vae else 1
        estimate = within(required * share)
        return max(REST, int(estimate)) + int(within(hard))

    def load(self, place, required, hard):
        self.load_all([place], required, hard)

    def lacks_room(self, others, free):
        """True if a denoiser runs swapped that cannot be whole beside what comes."""
        there = [p for p in others if isinstance(self.patchers[p].model, Denoiser)]
        lacking = sum(self.sizes[p] - bytes_on_card(self.patchers[p].model) for p in there)
        return lacking > max(0, free - max((self.needed.get(p, 0) for p in there), default=0))

    def too_much(self, place):
        """The bytes of a model that may leave beyond what is missing: it leaves by the layer, or as a whole if its rest cannot
        run without it."""
        model = self.patchers[place].model
        sizes = [size_of(layer) for layer in model.layers()]
        merged = [size_of(layer) for layer in model.layers() if id(layer) in self.merged[id(model)]]
        return max(sizes) + sum(merged) + size_of(model.norm)

    def load_two(self, one, two, required):
        self.load_all(list(dict.fromkeys((one, two))), required, 0)

    def load_all(self, wanted, required, hard):
        wanted = [place for place in wanted if place in self.patchers]
        if not wanted:
            return
        scene, patchers = self.scene, [self.patchers[place] for place in wanted]
        scene.guard.memory.drop_abandoned()
        before, free = self.on_card(), scene.machine.free()
        new = {place for place in wanted if not scene.is_loaded(self.patchers[place])}
        outside = sum(
            self.sizes[place] - before[place] if place in new else scene.away(self.patchers[place]) for place in wanted
        )
        # Layers that the host itself swaps do not come back, and room for copies of them is kept.
        in_part = any(self.sizes[p] - before[p] > scene.away(self.patchers[p]) for p in wanted if p not in new)
        scene.load(*patchers, required=required, hard=hard)
        after, need = self.on_card(), self.needs(patchers, required, hard)
        self.needed.update(dict.fromkeys(wanted, need))
        listed = [one.model.model for one in scene.memory.current_loaded_models]
        others = [p for p in self.patchers if p not in wanted and any(self.patchers[p].model is one for one in listed)]
        assert all(scene.is_loaded(p) for p in patchers)
        room_kept = on_card.SWAPPING_BYTES if in_part else 0
        runs_often = not isinstance(patchers[0].model, (JointTextEncoder, IntegratedAutoencoderKL))
        left = sum(before[place] - after[place] for place in before if place not in wanted)
        if free - outside >= need + (room_kept if runs_often else 0):
            assert left == 0
        missing = max(0, outside + need + on_card.SWAPPING_BYTES - free)
        assert left <= missing + max((self.too_much(p) for p in before if p not in wanted), default=0)
        if free - outside >= need:
            # It fits: all of it is there, unless a denoiser lacks what a text encoder would take.
            is_kept_out = isinstance(patchers[0].model, JointTextEncoder) and self.lacks_room(others, free - outside)
            assert free - outside - need < room_kept or is_kept_out or all(scene.away(p) == 0 for p in patchers)
            assert all(after[place] == self.sizes[place] for place in new if not before[place])
        if scene.machine.free() < need:
            # As far as it can be helped: whatever could leave has left, but what was counted and cannot be split.
            assert all(after[place] == 0 for place in others)
            kept = sum(
                size_of(layer)
                for p in patchers
                for layer in p.model.layers()
                if sides_of(layer) == {CARD} and id(layer) not in self.merged[id(p.model)]
            )
            assert kept == 0
        alone = len(wanted) == 1 and isinstance(patchers[0].model, (Denoiser, Upscaler))
        if alone and sum(after[p] for p in others) > 0:
            # Nothing of it waits outside while others have what it lacks.
            assert scene.away(patchers[0]) == 0

    def free(self, asked, kept):
        scene = self.scene
        scene.guard.memory.drop_abandoned()
        before, free = self.on_card(), scene.machine.free()
        keep = [one for one in scene.memory.current_loaded_models if one.model is self.patchers.get(kept)]
        scene.memory.free_memory(asked, CARD, keep_loaded=keep)
        wanted = 0 if math.isnan(asked) else max(0, min(asked, TOTAL))
        after = self.on_card()
        if free >= wanted:
            assert after == before
        if keep:
            assert after[kept] == before[kept]
        if scene.machine.free() < wanted:
            listed = {id(one.model.model) for one in scene.memory.current_loaded_models if one not in keep}
            assert all(after[p] == 0 for p in self.patchers if id(self.patchers[p].model) in listed)

    def clone(self, place):
        if place in self.patchers:
            self.patchers[place] = self.patchers[place].clone()

    def free_all(self):
        self.scene.free_all()
        assert not self.scene.memory.current_loaded_models

    def drop(self, place):
        if place not in self.patchers:
            return
        gone = weakref.ref(self.patchers.pop(place).model)
        self.scene.memory.free_memory(0, CARD)
        gc.collect()
        assert gone() is None

    def ballast(self, size):
        # Other programs take what is free and no more.
        machine = self.scene.machine
        machine.ballast = min(size, machine.ballast + machine.free())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(models, min_size=2, max_size=4), st.lists(steps, min_size=3, max_size=14))
@example(
    [
        (Denoiser, [8, 8], 0, set()),
        (Denoiser, [8, 8, 88, 206, 248, 3076, 4000, 4000], 40, set()),
        (JointTextEncoder, [8, 8, 8, 8, 320, 2742, 3840, 3846], 40, set()),
        (Denoiser, [8, 346], 40, set()),
    ],
    [("load", 1, 0, 0), ("load", 3, 0, 0), ("load", 2, 0, 113), ("ballast", 2999), ("load", 2, 0, 96)],
)
@example(
    [
        (Denoiser, [8, 8, 8, 124, 2016, 3058, 3100], 0, set()),
        (Denoiser, [1024, 3058, 3100, 3218, 3760], 0, set()),
        (Denoiser, [8, 8], 0, set()),
        (JointTextEncoder, [8, 8], 40, set()),
    ],
    [("load", 0, 0, 0), ("load", 1, 0, 0), ("load", 3, 0, 479)],
)
@example(
    [
        (Denoiser, [82, 144, 308, 940, 2388, 2782, 2962, 3700], 0, set()),
        (Denoiser, [2962, 3696, 8, 8, 8, 308, 2388, 2782], 0, {0}),
    ],
    [("load", 0, 0, 0), ("load_two", 0, 1, 0), ("load", 1, 0, 0)],
)
@example(
    [(Denoiser, [8, 8, 8, 1338, 1672], 0, set()), (IntegratedAutoencoderKL, [8, 8], 8, set())],
    [("load_two", 0, 1, 28735)],
)
@example(
    [
        (Denoiser, [302, 508, 880, 2060, 3606], 1416, set()),
        (Denoiser, [8, 1404, 1806, 1806, 2376, 3998], 1416, set()),
    ],
    [("load_two", 0, 1, 0)],
)
def test_any_order_of_loading_and_freeing(parts, drawn, todo):
    with scene_of(parts) as scene:
        run = Run(scene, drawn)
        for step in todo:
            run.step(*step)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(models, min_size=2, max_size=3),
    st.lists(steps, min_size=3, max_size=8),
    st.sets(st.integers(1, 60), max_size=12),
)
def test_any_order_with_ram_that_runs_out(parts, drawn, todo, failing):
    """Nothing is asked of the room then, only that every model can run and the host goes on."""
    with scene_of(parts) as scene:
        run = Run(scene, drawn)
        scene.machine.fails = lambda move: RuntimeError(NO_RAM) if move in failing else None
        for name, *values in todo:
            if name in ("load", "load_two"):
                wanted = {run.patchers[p] for p in values[: 1 if name == "load" else 2] if p in run.patchers}
                with contextlib.suppress(RuntimeError):  # the host's own placing moves layers to RAM too
                    scene.load(*wanted, required=values[-1])
            elif name == "free":
                scene.memory.free_memory(values[0], CARD)
        scene.machine.fails = lambda move: None
        scene.free_all()
        for patcher in run.patchers.values():
            scene.load(patcher)
            assert_sound(patcher.model, True)
            scene.free_all()
            assert bytes_on_card(patcher.model) == 0
            assert_as_built(patcher.model)
