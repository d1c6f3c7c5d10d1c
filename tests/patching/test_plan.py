"""A plan is carried from one change to the next: what does not depend on a strength is worked out once."""

import pytest
import torch
from support.make import host_value, rand
from support.measure import same_bits

from lib_lora_guard.adapters import LoraAdapter, parse_term
from lib_lora_guard.hosts.plain import PlainAccess
from lib_lora_guard.patching import plan
from lib_lora_guard.patching.engine import Engine, LoraRequest
from lib_lora_guard.patching.strengths import set_strengths
from lib_lora_guard.planning import cheap
from lib_lora_guard.planning.mode import Mode, Wish

LAYERS, WIDTH = 10, 16
KEYS = [f"{n}.weight" for n in range(LAYERS)]
X = rand(3, WIDTH, seed=5)


def lora(seed, keys=KEYS, **more):
    return {key: host_value("lora", (WIDTH, WIDTH), seed + n, **more) for n, key in enumerate(keys)}


FIRST, SECOND, DORA = lora(1), lora(50), lora(90, dora="output")


def stack(*loras):
    """Adapter objects are parsed anew for each stack, as Forge's are; their tensors are the same."""
    return [
        LoraRequest(
            f"lora{origin}",
            strength,
            {key: [parse_term([strength, value, 1.0, None, None], {}, origin)] for key, value in patches.items()},
        )
        for origin, (patches, strength) in enumerate(loras)
    ]


class Counted:
    """An engine on ten layers, and how often cheap forms were derived."""

    def __init__(self, monkeypatch):
        self.model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).requires_grad_(False)
        self.engine, self.access = Engine(), PlainAccess(self.model)
        self.forms = self.forwards = 0
        form_of, cheap_forward = cheap.form_of, LoraAdapter.cheap_forward

        def counting_form(*args, **kwargs):
            self.forms += 1
            return form_of(*args, **kwargs)

        def counting_forward(adapter):
            self.forwards += 1
            return cheap_forward(adapter)

        for module in (cheap, plan):
            monkeypatch.setattr(module, "form_of", counting_form)
        monkeypatch.setattr(LoraAdapter, "cheap_forward", counting_forward)

    def change(self, *loras, wish=Wish.AUTO):
        """The calls of `form_of` and of `cheap_forward` in this change."""
        self.forms = self.forwards = 0
        report = self.engine.change(self.access, stack(*loras), wish)
        assert not report.refused
        return self.forms, self.forwards

    def modes(self):
        return {attachment.mode for attachment in self.engine.attached.values()}

    def picture(self):
        with torch.no_grad():
            return self.model(X)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.parametrize("patches", [FIRST, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("wish", [Wish.AUTO, Wish.ON_THE_FLY])
def test_cheap_forms_are_derived_once_for_each_weight(counted, patches, wish):
    assert counted.change((patches, 0.7), wish=wish) == (LAYERS, LAYERS)
    assert counted.modes() == {Mode.BYPASS if wish is Wish.AUTO else Mode.ON_THE_FLY}
    assert counted.change((patches, 0.3), wish=wish) == (0, 0), "a change of strength"
    assert counted.change((patches, 0.3), wish=wish) == (0, 0), "the same stack again"


def test_only_the_forms_of_a_lora_that_is_new_are_derived(counted):
    counted.change((FIRST, 0.7))
    assert counted.change((FIRST, 0.7), (SECOND, 0.5)) == (LAYERS, LAYERS)
    assert counted.change((FIRST, 0.2), (SECOND, 0.1)) == (0, 0)
    third = lora(150, KEYS[:3])
    assert counted.change((FIRST, 0.2), (SECOND, 0.1), (third, 1.0)) == (3, 3)
    assert counted.change((FIRST, 0.2), (third, 1.0)) == (0, 0), "a LoRA in the middle was taken off"


def test_a_lora_that_comes_first_has_its_forms_derived_anew(counted):
    """A scale of the input is exact for the first term alone."""
    counted.change((FIRST, 0.7), (SECOND, 0.5))
    assert counted.change((SECOND, 0.5)) == (LAYERS, LAYERS)


def test_merging_derives_no_forms(counted):
    assert counted.change((FIRST, 0.7), wish=Wish.MERGE) == (0, 0)
    assert counted.change((FIRST, 0.3), wish=Wish.MERGE) == (0, 0)


def test_another_mode_for_the_same_loras_derives_no_forms(counted):
    counted.change((FIRST, 0.7))
    for wish in (Wish.ON_THE_FLY, Wish.PREFER_MERGE, Wish.BYPASS, Wish.AUTO):
        assert counted.change((FIRST, 0.7), wish=wish) == (0, 0), wish


def test_strengths_between_two_steps_derive_no_forms(counted):
    counted.change((FIRST, 0.7), (DORA, 0.5))
    counted.forms = counted.forwards = 0
    set_strengths(counted.engine, {0: 0.2, 1: 0.9})
    assert (counted.forms, counted.forwards) == (0, 0)
    patched = counted.picture()
    assert counted.change((FIRST, 0.2), (DORA, 0.9)) == (0, 0)
    assert same_bits(counted.picture(), patched)


def test_factors_of_the_same_size_that_are_other_tensors_are_not_taken_for_the_same(counted):
    counted.change((FIRST, 0.7))
    copies = {key: (kind, tuple(v.clone() if v is not None and not isinstance(v, float) else v for v in content)) for key, (kind, content) in FIRST.items()}  # fmt: skip
    assert counted.change((copies, 0.7)) == (LAYERS, LAYERS)


def test_strengths_go_to_the_lora_in_its_present_place(counted):
    """Its attachments stay when the LoRA before it, which is on other weights, is taken off."""
    first, second = lora(1, KEYS[:5]), lora(50, KEYS[5:])
    counted.change((first, 0.7), (second, 0.5))
    before = dict(counted.engine.attached)
    counted.change((second, 0.5))
    assert all(counted.engine.attached[key] is before[key] for key in KEYS[5:]), "they were made anew"
    set_strengths(counted.engine, {0: 0.9})
    patched = counted.picture()
    counted.change()
    counted.change((second, 0.9))
    assert same_bits(counted.picture(), patched)
