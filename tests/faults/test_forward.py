"""An allocation that fails at the k-th operation of one forward pass: the right picture, or an error that names the layer."""

import pytest
from support.measure import contribution_error, fp32_limit, same_bits

from faults.models import SHAPES, STORAGES
from faults.planting import Faults, PlantedError, every, is_planted, passed_the_guard
from faults.scene import Scene
from lib_lora_guard.errors import LayerError
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching.bypass import Bypass

PLANS = {
    "once": (False, lambda k: ("gpu", "ram")[k % 2], 1),
    "for good": (True, lambda k: ("ram", "gpu")[k % 2], 1),
    "another error": (False, lambda k: "other", 4),
}
"""Whether it lasts, which error number k is, and the stride."""


def what_is_wrong(scene, name, picture, error, kind):
    wanted = scene.pictures[name]
    if error is None:
        if not same_bits(picture, wanted):
            off = contribution_error(picture, wanted, scene.base)
            # Slices and the CPU add up in another order.
            if off > fp32_limit(wanted, scene.base):
                yield f"a wrong picture, off by {off:.1e} of the LoRAs' contribution"
        return
    if not is_planted(error):
        yield f"another error: {error!r}"
    if kind == "other":
        if not isinstance(error, PlantedError):
            yield f"an error of another kind came out as {error!r}"
    elif isinstance(error, LayerError):
        key = str(error).partition(":")[0]
        if key not in SHAPES or "no memory left for" not in str(error):
            yield f"the layer is not named: {error}"
    elif passed_the_guard(error):
        yield f"want of memory in the guard came out as {error!r}"


@pytest.mark.parametrize(("storage", "name"), [*((s, "two") for s in STORAGES), ("bf16", "other"), ("Q8_0", "other")])
def test_memory_that_ends_in_a_forward_pass(guarded, storage, name, record_property):
    scene, runs, wrong, named = Scene(guarded, storage), {}, [], 0
    scene.settle(name)
    with Faults() as counted:
        scene.picture()
    for plan, (for_good, error_of, step) in PLANS.items():
        runs[plan] = every(counted.count, step)
        for k in runs[plan]:
            picture = error = None
            with Faults(k, error_of(k), for_good) as faults:
                try:
                    picture = scene.picture()
                except Exception as caught:
                    error = caught
            assert faults.planted
            named += isinstance(error, LayerError)
            found = list(what_is_wrong(scene, name, picture, error, error_of(k)))
            del error
            if not same_bits(scene.picture(), scene.pictures[name]):
                found.append("the next picture is another one")
            wrong += [f"{plan}, k={k} {error_of(k)}: {what}" for what in found]
    record_property("runs", {plan: len(ks) for plan, ks in runs.items()})
    assert named, "no failure was in a layer's LoRA: nothing was tested"
    assert not scene.restored()
    assert not wrong, "\n".join(wrong)


def test_a_picture_that_is_wrong_is_seen(guarded, monkeypatch):
    """What these tests are for: an output without its LoRA where memory ended."""
    scene = Scene(guarded, "fp8")
    scene.settle("two")
    call = Bypass.__call__

    def silent(self, layer, args, kwargs, output):
        before = output.clone()
        try:
            return call(self, layer, args, kwargs, output)
        except LayerError:
            return before

    monkeypatch.setattr(Bypass, "__call__", silent)
    seen = 0
    with Faults() as counted:
        scene.picture()
    for k in every(counted.count):
        with Faults(k):
            try:
                picture = scene.picture()
            except (LayerError, *OutOfMemory):
                continue
        seen += bool(list(what_is_wrong(scene, "two", picture, None, "gpu")))
    assert seen
