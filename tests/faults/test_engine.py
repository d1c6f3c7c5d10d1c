"""The engine alone, where its word is stricter than a host's: after an exception the old stack lies on the model, whole."""

import contextlib

import pytest
import torch
from support.measure import contribution_error, fp32_limit, same_bits

from faults.models import DEVICE, TOKENS, Model, dense_state, loras
from faults.planting import Faults, PlantedError, every, is_planted
from lib_lora_guard.adapters import parse_term
from lib_lora_guard.errors import RestoreError
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.patching import backup, merge_attachment
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.strengths import set_strengths
from lib_lora_guard.planning.mode import Wish

FIRST, SECOND, THIRD = loras()


def stack(*loras):
    return [
        LoraRequest(
            f"lora{origin}",
            strength,
            {key: [parse_term([strength, value, 1.0, None, None], {}, origin)] for key, value in patches.items()},
        )
        for origin, (patches, strength) in enumerate(loras)
    ]


STACKS = {
    "none": stack(),
    "two": stack((FIRST, 0.8), (SECOND, 0.5)),
    "weaker": stack((FIRST, 0.3), (SECOND, 0.5)),
    "other": stack((THIRD, 0.7)),
}


class Bench:
    """A plain fp32 model with an engine; `wish` for all of its stacks."""

    def __init__(self, wish):
        self.model = Model().requires_grad_(False)
        self.model.load_state_dict(dense_state())
        self.model.to(DEVICE)
        self.access, self.engine, self.wish = PlainAccess(self.model), Engine(), wish
        self.bits = {name: p.data.clone() for name, p in self.model.named_parameters()}
        self.pictures = {}

    def change(self, name):
        self.engine.change(self.access, STACKS[name], self.wish)

    def strengths(self, name):
        set_strengths(self.engine, {origin: lora.strength for origin, lora in enumerate(STACKS[name])})

    def picture(self):
        with torch.no_grad():
            return self.model(TOKENS).clone()

    def settle(self, name):
        self.change(name)
        self.pictures.setdefault(name, self.picture())
        return self.shows(name)

    def shows(self, name):
        """The undisturbed picture. On a card to the rounding of fp32: what found no room there was merged on the CPU, which adds
        up in another order, and stays until it changes. Without LoRAs nothing is calculated."""
        picture, wanted = self.picture(), self.pictures[name]
        if same_bits(picture, wanted) or DEVICE.type == "cpu" or name == "none":
            return same_bits(picture, wanted)
        return contribution_error(picture, wanted, self.pictures["none"]) <= fp32_limit(wanted, self.pictures["none"])


CHANGES = {
    "apply": ("none", "two", Bench.change),
    "strength": ("two", "weaker", Bench.change),
    "strength between steps": ("two", "weaker", Bench.strengths),
    "other stack": ("two", "other", Bench.change),
    "remove": ("two", "none", Bench.change),
}
PLANS = {
    "once": (False, lambda k: ("gpu", "ram")[k % 2]),
    "for good": (True, lambda k: ("ram", "gpu")[k % 2]),
    "another error": (False, lambda k: "other"),
}


def what_is_wrong(bench, old, new, raised, kind):
    picture, wanted = bench.picture(), bench.pictures[new]
    if raised is None:
        off = (
            0.0
            if same_bits(picture, wanted) or new == "none"
            else contribution_error(picture, wanted, bench.pictures["none"])
        )
        if off > fp32_limit(wanted, bench.pictures["none"]) or (new == "none" and not same_bits(picture, wanted)):
            yield f"a change that succeeded gives a wrong picture, off by {off:.1e}"
        return
    if kind == "other" and not isinstance(raised, PlantedError):
        yield f"an error of another kind came out as {raised!r}"
    if not is_planted(raised):
        yield f"another error: {raised!r}"
    if bench.engine.is_unfinished:
        # An undo has failed too: nothing builds on that before it is done.
        bench.engine.finish_undoing()
    if not bench.shows(old):
        yield f"a change that failed left another picture ({raised!r})"


@pytest.mark.parametrize(
    ("change", "wish"),
    [(change, Wish.AUTO) for change in CHANGES]
    + [(change, Wish.PREFER_MERGE) for change in CHANGES if change != "strength"],
)
def test_memory_that_ends_in_a_change(change, wish, monkeypatch, record_property):
    # As weights above 1 MB are: merged when they are put in place, one after the other.
    monkeypatch.setattr(merge_attachment, "KEPT_BYTES", 16)
    bench, wrong, runs = Bench(wish), [], {}
    if wish is Wish.PREFER_MERGE:
        # As on a GPU with neither spare VRAM nor spare RAM.
        monkeypatch.setattr(backup, "lies_in_ram", lambda parameter: False)
        monkeypatch.setattr("lib_lora_guard.patching.spool.disk_spare_bytes", lambda folder: 1 << 30)
        monkeypatch.setattr(bench.access, "backup_budget", lambda: BackupBudget(0, 0, 1 << 30))
    old, new, act = CHANGES[change]
    for name in ("none", new, old):
        bench.settle(name)
    with Faults() as counted:
        act(bench, new)
    bench.settle("none")
    for plan, (for_good, error_of) in PLANS.items():
        runs[plan] = every(counted.count, step=4 if plan == "another error" else 1)
        for k in runs[plan]:
            bench.change(old)
            before, raised = dict(bench.engine.attached), None
            with Faults(k, error_of(k), for_good) as faults:
                try:
                    act(bench, new)
                except Exception as error:
                    raised = error
            assert faults.planted
            found = list(what_is_wrong(bench, old, new, raised, error_of(k)))
            if raised is not None and dict(bench.engine.attached) != before:
                found.append("a change that failed left other attachments")
            if not bench.settle(new):
                found.append("the next change gives another picture")
            bench.change("none")
            now = dict(bench.model.named_parameters())
            found += [
                f"{key} did not come back" for key, bits in bench.bits.items() if not same_bits(now[key].data, bits)
            ]
            wrong += [f"{plan}, k={k} {error_of(k)}: {what}" for what in found]
    record_property("runs", {plan: len(ks) for plan, ks in runs.items()})
    assert not wrong, "\n".join(wrong)


def test_a_failed_undo_is_done_before_the_next_change(monkeypatch):
    monkeypatch.setattr(merge_attachment, "KEPT_BYTES", 16)
    bench, unfinished = Bench(Wish.PREFER_MERGE), 0
    for name in ("none", "two", "other"):
        bench.settle(name)
    with Faults() as counted:
        bench.change("two")
    for k in every(counted.count):
        bench.settle("other")
        with Faults(k, for_good=True), contextlib.suppress(Exception):
            bench.change("two")
        if bench.engine.is_unfinished:
            unfinished += 1
            with Faults(1, for_good=True), pytest.raises(RestoreError, match="a weight could not be restored"):
                bench.change("two")
            assert bench.engine.is_unfinished
        assert bench.settle("two")
    assert unfinished, "no undo failed: nothing was tested"
