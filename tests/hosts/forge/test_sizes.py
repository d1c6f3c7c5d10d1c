"""A GGUF model that grows when it is baked, on a card that is not there: room is made for what it will take, once."""

import functools
import gc

import pytest
import torch
from support.card_scene import flux, scene_of, t5, vae
from support.fake_card import CARD, Denoiser, Layer, bytes_on_card, parameter, size_of
from support.walks import walks_of

from lib_lora_guard.hosts.forge.sizes import module_size
from lib_lora_guard.planning.last_plan import LastPlan

CPU = torch.device("cpu")


class Q4_K:
    """Forge's class of that name as far as sizes go: `GgufDenoiser` bakes."""

    @staticmethod
    def bake(parameter):
        pass


class GgufLayer(Layer):
    """Keeps what a parameter knows of its blocks when it moves, as Forge's own do."""

    def _apply(self, function, recurse=True):
        for name, old in list(self.named_parameters(recurse=False)):
            new = torch.nn.Parameter(function(old), requires_grad=False)
            new.__dict__.update(vars(old))
            setattr(self, name, new)
        return self


class GgufDenoiser(Denoiser):
    """`sizes` are those of the file; an eighth of each is a bias, which is not baked."""

    def __init__(self, machine, sizes, fixed=0):
        super().__init__(machine, sizes, fixed)
        for layer in self.layers():
            layer.__class__ = GgufLayer
            layer.weight.gguf_cls, layer.weight.baked = Q4_K, False

    def bake(self):
        if getattr(self, "gguf_baked", False):
            return
        for layer in self.layers():
            machine, old = layer.weight.machine, layer.weight
            values = old.nelement() * 10 // 9
            layer.weight = parameter(machine, (values,), old.dtype, old.device)
            layer.weight.gguf_cls, layer.weight.baked = Q4_K, True
        self.gguf_baked = True


def baking(scene):
    """The host bakes right after it has placed a model."""
    loaded_model = scene.memory.LoadedModel
    place = loaded_model.model_load

    def model_load(self, *args, **kwargs):
        found = place(self, *args, **kwargs)
        if hasattr(self.model.model, "bake"):
            self.model.model.bake()
        return found

    loaded_model.model_load = model_load


@pytest.fixture
def scene(parts):
    with scene_of(parts) as found:
        baking(found)
        yield found


def gguf(scene, layers=16):
    """16 128 bytes in the file: 2 016 of biases, 14 112 of blocks, which become 15 680."""
    return scene.patcher(GgufDenoiser, [1008] * layers)


def test_room_is_made_for_what_it_will_take(scene):
    text, denoiser = t5(scene, 8), gguf(scene)
    scene.load(text)
    stored = size_of(denoiser.model)
    scene.load(denoiser, required=2_000)
    baked = size_of(denoiser.model)
    assert (stored, baked) == (16_128, 17_696)
    # All of it is there, and what a step needs beside it.
    assert bytes_on_card(denoiser.model) == baked
    assert scene.machine.free() >= 2_000
    assert scene.machine.free() < 2_000 + 8_000 // 20 + 1, "no more left than had to"


def test_without_the_guard_a_step_lacks_what_it_grew_by(parts):
    with scene_of(parts, total=16_128 + 1_000, guarded=False) as scene:
        baking(scene)
        denoiser = gguf(scene)
        scene.load(denoiser)
        assert bytes_on_card(denoiser.model) == size_of(denoiser.model) == 17_696
        assert scene.machine.free() < 0


@pytest.mark.parametrize("total", [17_000, 18_000, 18_695, 18_696, 19_000])
def test_what_does_not_fit_baked_is_swapped_and_a_step_keeps_its_room(parts, total):
    with scene_of(parts, total=total) as scene:
        baking(scene)
        denoiser = gguf(scene)
        scene.load(denoiser)
        assert scene.machine.free() >= 1_000
        assert (bytes_on_card(denoiser.model) == 17_696) is (total >= 18_696)


def test_it_is_counted_once(scene):
    denoiser, text = gguf(scene), t5(scene, 4)
    for _ in range(3):
        scene.load(text)
        scene.load(denoiser, required=2_000)
        assert bytes_on_card(denoiser.model) == 17_696
        assert scene.memory.module_size(denoiser.model, include_device=CARD) == 17_696
        assert scene.machine.free() >= 2_000
        scene.load(vae(scene))


def test_the_last_plan_is_of_the_denoiser_as_it_lies(scene):
    assert scene.guard.loading.plans.last is None
    denoiser, text = gguf(scene), t5(scene, 4)
    scene.load(text)
    assert scene.guard.loading.plans.last is None, "a step is the denoiser's"
    scene.load(denoiser, required=2_000, hard=300)
    plan = scene.guard.loading.plans.last
    assert plan == LastPlan("GgufDenoiser", 17_696, 17_696, 0, 2_000, 300)
    assert (plan.copied_bytes, plan.device_bytes) == (0, 17_696 + 2_300)
    scene.load(vae(scene))
    assert scene.guard.loading.plans.last == plan
    scene.load(denoiser, required=9_000)
    larger = scene.guard.loading.plans.last
    assert (larger.step_bytes, larger.other_bytes) == (9_000, 0)
    assert larger.on_card_bytes == bytes_on_card(denoiser.model) == 17_696 - larger.copied_bytes
    assert larger.copied_bytes > 0


def test_a_plan_goes_with_its_model(scene):
    denoiser = flux(scene, 5)
    scene.load(denoiser)
    assert scene.guard.loading.plans.last.weights_bytes == size_of(denoiser.model)
    assert scene.guard.loading.plans.last.step_bytes == 1_000
    scene.memory.current_loaded_models.clear()
    del denoiser
    gc.collect()
    assert scene.guard.loading.plans.last is None


def test_factors_on_the_card_are_in_the_plan(scene, monkeypatch):
    monkeypatch.setattr(scene.guard.stacks, "resident_bytes", lambda loader: 123)
    denoiser = flux(scene, 5)
    scene.load(denoiser, hard=50)
    assert (scene.guard.loading.plans.last.factor_bytes, scene.guard.loading.plans.last.other_bytes) == (123, 50)


def test_factors_that_came_in_the_load_are_in_the_plan_once(scene, monkeypatch):
    loras, on_card = scene.guard.loras, [0]
    monkeypatch.setattr(scene.guard.stacks, "resident_bytes", lambda loader: on_card[0])
    monkeypatch.setattr(loras, "factor_bytes", lambda patcher: 300 - on_card[0])
    monkeypatch.setattr(loras, "after_load", lambda *args: on_card.__setitem__(0, 250))
    scene.load(flux(scene, 5), hard=50)
    plan = scene.guard.loading.plans.last
    assert (plan.factor_bytes, plan.other_bytes) == (300, 50)


class FourBit(torch.nn.Module):
    """One weight as bitsandbytes keeps it: `values` of 16 bits before it is packed, half as many bytes after."""

    def __init__(self, values, packed=False, kind="nf4", **attributes):
        super().__init__()
        data = torch.zeros(values // 2, dtype=torch.uint8) if packed else torch.zeros(values, dtype=torch.bfloat16)
        self.weight = torch.nn.Parameter(data, requires_grad=False)
        vars(self.weight).update(quant_type=kind, **attributes)


def forges_size(module, exclude_device=None, include_device=None, return_split=False):
    """Forge's own count: 0.55 bytes a value on its way, 1.1 bytes a packed byte."""
    size = module.weight.nelement() * (0.55 if module.weight.element_size() > 1 else 1.1)
    return (size, size, 0.0) if return_split else size


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("attributes", "block"), [({}, 64), ({"blocksize": None}, 64), ({"blocksize": 64}, 64), ({"blocksize": 256}, 256)]
)
def test_a_four_bit_weight_on_its_way_counts_as_it_will_be_packed(kind, attributes, block):
    """Half a byte a value, and a scale of 4 bytes for each block."""
    values = 64 * 256
    model = FourBit(values, kind=kind, **attributes)
    packed = values / 2 + 4 * values / block
    assert module_size(forges_size, model) == pytest.approx(packed)
    assert module_size(forges_size, model, return_split=True) == pytest.approx((packed, packed, 0))
    assert module_size(forges_size, model, include_device=CPU) == pytest.approx(packed)
    assert module_size(forges_size, model, exclude_device=CPU) == forges_size(model), "left to Forge's own number"


def test_a_packed_weight_without_its_scales_counts_as_forge_counts_it():
    model = FourBit(64 * 256, packed=True)
    assert module_size(forges_size, model) == forges_size(model)


def test_other_quantised_weights_count_as_forge_counts_them():
    model = FourBit(64 * 256, kind="int8")
    assert module_size(forges_size, model) == forges_size(model)


def forges(seen):
    """Forge's own function, by the names in its code; `seen` gets the model that it was given."""

    def module_size(module, exclude_device=None, include_device=None, return_split=False):
        seen["model"] = module
        total = 0
        for _, p in module.named_parameters():
            t = p.data
            if t.device != exclude_device and getattr(p, "quant_type", None) is None:
                total += t.nelement() * t.element_size()
        return total

    return module_size


def nested():
    block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4, bias=False))
    return torch.nn.Sequential(block, torch.nn.Linear(2, 2)), block, 4 * (4 * 8 + 8 + 8 * 4 + 2 * 2 + 2)


def test_forges_own_function_gets_the_list_that_is_made_for_the_correction():
    (model, block, wanted), seen = nested(), {}
    assert walks_of(lambda: seen.update(found=module_size(forges(seen), model)), block) == [1]
    assert seen["found"] == wanted
    assert seen["model"] is not model


def test_a_forks_function_that_asks_for_more_gets_the_model():
    (model, block, wanted), seen = nested(), {}
    inner = forges(seen)

    def module_size_of_a_fork(module, exclude_device=None, include_device=None, return_split=False):
        assert module.training
        return inner(module, exclude_device)

    module_size_of_a_fork.__name__ = "module_size"
    assert walks_of(lambda: seen.update(found=module_size(module_size_of_a_fork, model)), block) == [2]
    assert seen["found"] == wanted
    assert seen["model"] is model


def test_another_extensions_function_gets_the_model():
    model, seen = torch.nn.Linear(2, 2), {}
    inner = forges(seen)

    @functools.wraps(inner)
    def others(module, *args):
        return inner(module, *args)

    assert module_size(others, model) == 4 * 6
    assert seen["model"] is model
