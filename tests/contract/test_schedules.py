"""Strengths that change over the steps of an image: what reaches the layers in each step, and what is left afterwards.

Forge's prompt side is not in the double, so a small one plays it: `Forge` activates tags, samples in steps, and calls back.
"""

import functools
import logging
import sys
import types

import pytest
import torch
from support.make import host_value
from support.measure import assert_same, contribution_error, fp32_limit, same_bits

from contract.stacks import dora, lora_on_everything, other_kinds, reference, run, slices_of_qkv
from lib_lora_guard.errors import HostError
from lib_lora_guard.hosts.forge import step_strengths
from lib_lora_guard.hosts.forge.lora_loader_state import RETRY
from lib_lora_guard.hosts.forge.step_strengths import ForgeStepStrengths
from lib_lora_guard.hosts.webui import schedules as forge_schedules
from lib_lora_guard.hosts.webui.schedules import ScheduleHost, Schedules
from lib_lora_guard.patching.bypass import Bypass
from lib_lora_guard.patching.low_rank import JoinedLowRank
from lib_lora_guard.patching.merge_attachment import MergeAttachment
from lib_lora_guard.patching.on_the_fly import WeightTerms
from lib_lora_guard.patching.strengths import set_strengths
from lib_lora_guard.planning.schedule import parse
from lib_lora_guard.runtime.hooks import HookSet

STEPS = 6
RAMP = "0@0,1@1"


class Params:
    """`modules.extra_networks.ExtraNetworkParams`, as far as it is read."""

    def __init__(self, items):
        self.items = items
        parts = [item.split("=", 2) for item in items]
        self.positional = [part[0] for part in parts if len(part) == 1]
        self.named = {part[0]: part[1] for part in parts if len(part) == 2}


class Forge:
    """The way of a picture through Forge: tags, patchers, steps."""

    def __init__(self, host, patcher, files):
        self.host, self.clean, self.files = host, patcher, files
        self.unet, self.text_strengths, self.reported, self.outputs = patcher, {}, [], []
        self.on_denoiser, self.app_started = [], []
        forge = self

        class ExtraNetworkLora:
            def activate(self, p, params_list):
                forge.load_networks(params_list)

        class Sampler:
            def launch_sampling(self, steps, func):
                return func()

        self.network, self.sampler = ExtraNetworkLora(), Sampler()
        networks = types.SimpleNamespace(loaded_networks=[])
        self.parts = ScheduleHost(
            types.SimpleNamespace(ExtraNetworkLora=ExtraNetworkLora, networks=networks),
            types.SimpleNamespace(extra_network_registry={"lora": self.network}, extra_network_aliases={}),
            types.SimpleNamespace(Sampler=Sampler),
            types.SimpleNamespace(on_cfg_denoiser=self.on_denoiser.append, on_app_started=self.app_started.append),
        )
        self.schedules = Schedules(ForgeStepStrengths(host.guard.stacks))
        forge_schedules.install(self.schedules, host.guard.hooks, self.parts)

    def load_networks(self, params_list):
        loaded, wanted = self.parts.lora_network.networks.loaded_networks, []
        loaded.clear()
        self.text_strengths = {}
        for params in params_list:
            name = params.positional[0]
            text = float(params.positional[1]) if len(params.positional) > 1 else 1.0
            text = float(params.named.get("te", text))
            model = float(params.positional[2]) if len(params.positional) > 2 else text
            model = float(params.named.get("unet", model))
            on_disk = types.SimpleNamespace(filename=f"/loras/{name}.safetensors")
            loaded.append(types.SimpleNamespace(mentioned_name=name, network_on_disk=on_disk))
            self.text_strengths[name] = text
            wanted.append((on_disk.filename, self.files[name], model))
        stack = [(filename, strength) for filename, _, strength in wanted]
        if stack == getattr(self, "stack", None):
            return  # Forge compares its hash of files and strengths
        self.stack, self.unet = stack, self.clean.clone()
        for filename, patches, strength in wanted:
            self.unet.add_patches(filename=filename, patches=patches, strength_patch=strength)

    def activate(self, *tags, p=None):
        p = types.SimpleNamespace(is_hr_pass=False) if p is None else p
        self.network.activate(p, [Params(tag.split(":")) for tag in tags])

    def sample(self, steps=STEPS, calls_per_step=1, unet=None, before=None):
        """The output of each step. `before(step)` may raise, or do what other extensions do."""
        unet = unet if unet is not None else self.unet
        self.host.load(unet)
        model = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet))
        denoiser = types.SimpleNamespace(inner_model=types.SimpleNamespace(inner_model=model))
        outputs = []

        def sampling():
            for done in range(steps):
                for _ in range(calls_per_step):
                    if before is not None:
                        before(done)
                    params = types.SimpleNamespace(
                        denoiser=denoiser, sampling_step=max(0, done - 1), total_sampling_steps=steps
                    )
                    for callback in self.on_denoiser:
                        callback(params)
                    outputs.append(run(unet))

        self.sampler.launch_sampling(steps, sampling)
        return outputs

    def picture(self, *tags, **how):
        self.activate(*tags)
        return self.sample(**how)


@pytest.fixture
def forge(guarded):
    def make(storage="bf16", **files):
        patcher, dense = guarded.build(storage)
        files = files or {"style": lora_on_everything}
        return Forge(guarded, patcher, {name: patches(dense) for name, patches in files.items()}), patcher, dense

    return make


def at(text, done, steps=STEPS):
    return parse(text).at(max(0, done - 1), steps)


def check_steps(forge, patcher, dense, outputs, *stacks):
    """Output `n` is that of a model with the fp64-merged stack `n`, `[(name, strength)]`."""
    base = run(forge.host.load(patcher))
    for output, stack in zip(outputs, stacks, strict=True):
        loras = [(name, forge.files[name], strength) for name, strength in stack]
        wanted = reference(patcher, dense, loras)
        if any(strength for _, strength in stack):
            assert_same(output, wanted, base)
        else:
            assert same_bits(output, base)
    return base


def is_at_start(forge, patcher):
    """The model computes what its patcher asks for, and the loader says so."""
    loader = forge.unet.lora_loader
    assert loader.loaded_hash == str(list(forge.unet.lora_patches))
    mine = run(forge.unet)
    forge.unet.lora_loader.refresh(forge.unet.lora_patches, force_refresh=True)
    return same_bits(mine, run(forge.unet))


@pytest.mark.parametrize("storage", ["bf16", "fp8", "Q8_0"])
@pytest.mark.parametrize("case", [lora_on_everything, dora, other_kinds, slices_of_qkv])
def test_each_step_has_the_strength_of_its_place(forge, storage, case):
    host, patcher, dense = forge(storage, style=case)
    outputs = host.picture("style:0@0,1@0.5,0.2@1")
    assert is_at_start(host, patcher)
    strengths = [at("0@0,1@0.5,0.2@1", n) for n in range(STEPS)]
    assert strengths == pytest.approx([0, 0, 0.5, 1, 0.6, 0.2])
    base = run(host.host.load(patcher))
    for output, strength in zip(outputs, strengths, strict=True):
        if strength == 0:
            # An adapter at strength 0 adds nothing; the rest of a merge (a norm in the weight's own precision) is exact.
            wanted = base
            assert (output - wanted).norm() <= 1e-6 * wanted.norm()
        else:
            assert_same(output, reference(patcher, dense, [("x", host.files["style"], strength)]), base)


def test_a_schedule_that_is_ignored_would_be_seen(forge, monkeypatch):
    host, patcher, dense = forge()
    monkeypatch.setattr(ForgeStepStrengths, "set", lambda *_: None)
    outputs = host.picture(f"style:{RAMP}")
    base = run(host.host.load(patcher))
    wanted = reference(patcher, dense, [("x", host.files["style"], 1.0)])
    assert contribution_error(outputs[-1], wanted, base) > 100 * fp32_limit(wanted, base)


def test_in_place_is_what_a_whole_change_gives_to_the_bit(forge):
    host, _, _ = forge("fp8", style=lora_on_everything, second=dora, third=other_kinds)
    tags = (f"style:{RAMP}", "second:0.5", "third:1@0,-1@1")
    outputs = host.picture(*tags)
    for n, output in enumerate(outputs):
        whole = host.clean.clone()
        for name, strength in (("style", at(RAMP, n)), ("second", 0.5), ("third", at("1@0,-1@1", n))):
            whole.add_patches(filename=name, patches=host.files[name], strength_patch=strength)
        assert same_bits(output, run(host.host.load(whole))), n


@pytest.mark.parametrize("order", [("style", "second"), ("second", "style")])
def test_a_dora_after_a_lora_whose_strength_changes_has_the_norms_of_that_strength(forge, order):
    host, patcher, dense = forge("bf16", style=lora_on_everything, second=dora)
    first, second = order
    outputs = host.picture(f"{first}:{RAMP}", f"{second}:0.5@0,1@1")
    stacks = [[(first, at(RAMP, n)), (second, at("0.5@0,1@1", n))] for n in range(STEPS)]
    check_steps(host, patcher, dense, outputs, *stacks)


def test_equal_strengths_are_the_plain_number_to_the_bit(forge):
    host, _, _ = forge()
    scheduled = host.picture("style:0.7@0,0.7@0.4,0.7@1")
    plain = host.picture("style:0.7")
    assert all(same_bits(a, b) for a, b in zip(scheduled, plain, strict=True))


def test_the_next_image_starts_where_its_prompt_says(forge):
    host, patcher, _ = forge("bf16", style=lora_on_everything, second=dora)
    first = host.picture(f"style:{RAMP}", "second:1")
    assert is_at_start(host, patcher)
    again = host.picture(f"style:{RAMP}", "second:1")
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True)), "batch count: the same picture again"
    # The same files and first strengths: for Forge nothing has changed, and nothing is loaded.
    steady = host.picture("style:0", "second:1")
    assert all(same_bits(output, first[0]) for output in steady)
    base = run(host.host.load(patcher))
    assert all(same_bits(output, base) for output in host.picture())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_ends_a_pass_the_strengths_are_those_of_the_patcher(forge, error):
    host, patcher, _ = forge()

    def fail(step):
        if step == 4:
            assert host.unet.lora_loader.loaded_hash != str(list(host.unet.lora_patches)), "it tells the truth"
            raise error("stop")

    with pytest.raises(error, match="stop"):
        host.picture(f"style:{RAMP}", before=fail)
    assert is_at_start(host, patcher)
    assert not host.schedules.strengths.are_changed


def test_two_calls_in_a_step_change_the_strengths_once(forge, monkeypatch):
    host, _, _ = forge()
    calls = []
    original = step_strengths.set_strengths
    monkeypatch.setattr(step_strengths, "set_strengths", lambda *a: calls.append(a[1]) or original(*a))
    outputs = host.picture(f"style:{RAMP}", calls_per_step=2)
    assert all(same_bits(a, b) for a, b in zip(outputs[::2], outputs[1::2], strict=True))
    assert calls == [{0: 0.25}, {0: 0.5}, {0: 0.75}, {0: 1.0}, {0: 0.0}], "and once more at the end"
    calls.clear()
    host.picture("style:1")
    assert calls == []


def test_fewer_steps_and_steps_by_number(forge):
    host, patcher, dense = forge()
    check_steps(host, patcher, dense, host.picture(f"style:{RAMP}", steps=3), *[[("style", s)] for s in (0, 0, 1)])
    check_steps(host, patcher, dense, host.picture(f"style:{RAMP}", steps=1), [("style", 0)])
    outputs = host.picture("style:1@1,0.5@3", steps=5)
    check_steps(host, patcher, dense, outputs, *[[("style", s)] for s in (1, 1, 1, 0.75, 0.5)])


def test_the_hires_pass_has_strengths_of_its_own(forge):
    host, patcher, dense = forge()
    tag = f"style:{RAMP}:hr=0.5:hrte=0.25"
    p = types.SimpleNamespace(is_hr_pass=False)
    host.activate(tag, p=p)
    assert host.text_strengths == {"style": 0}
    first = host.sample()
    p.is_hr_pass = True
    host.activate(tag, p=p)
    assert host.text_strengths == {"style": 0.25}
    second = host.sample(steps=4)
    check_steps(host, patcher, dense, first, *[[("style", at(RAMP, n))] for n in range(STEPS)])
    check_steps(host, patcher, dense, second, *[[("style", 0.5)]] * 4)


def test_the_hires_prompt_is_encoded_with_the_strengths_of_the_hires_pass(forge):
    host, _, _ = forge()
    tags = [Params(["style", RAMP, "hrte=0.25"])]
    p = types.SimpleNamespace(is_hr_pass=False, hr_extra_network_data={"lora": tags})
    host.network.activate(p, tags)  # Forge does this before the first pass, to encode
    assert host.text_strengths == {"style": 0.25}
    host.network.activate(p, [Params(["style", RAMP, "hrte=0.25"])])
    assert host.text_strengths == {"style": 0}


def test_text_encoder_and_model_and_named_arguments(forge):
    host, patcher, dense = forge()
    outputs = host.picture("style:0.5:1@0,0@1:lbw=ALL")
    assert host.text_strengths == {"style": 0.5}
    check_steps(host, patcher, dense, outputs, *[[("style", at("1@0,0@1", n))] for n in range(STEPS)])
    host.activate("style:te=0.4@0,1@1:unet=0.3")
    assert host.text_strengths == {"style": 0.4}
    assert [identifier[1] for identifier in host.unet.lora_patches] == [0.3]


def test_tags_that_forge_can_read_are_handed_on_untouched(forge):
    host, _, _ = forge()
    tags = [Params(["style", "0.5"]), Params(["style"]), Params(["style", "te=1", "unet=2", "dyn=3"])]
    seen = []
    original = functools.partial(lambda network, p, params_list: seen.extend(params_list))
    host.schedules.activate(original, host.network, types.SimpleNamespace(), list(tags))
    assert all(a is b for a, b in zip(seen, tags, strict=True))


def test_a_broken_schedule_is_named_and_left_out_and_the_others_are_applied(forge, caplog):
    host, patcher, dense = forge("bf16", style=lora_on_everything, second=dora)
    with caplog.at_level(logging.INFO, "lib_lora_guard"):
        outputs = host.picture("style:0@0,one@1", f"second:{RAMP}")
    assert (
        "style NOT applied: its strength '0@0,one@1' is neither a number nor a schedule such as 0@0,1@0.5,0@1; "
        "correct it in the prompt"
    ) in caplog.text
    said = "strengths follow the prompt over 6 steps: second 0@0, 1@1. The prompt is encoded once"
    # By identity: pytest may hear a logger that does not hand on twice.
    assert len({id(record) for record in caplog.records if said in record.getMessage()}) == 1
    check_steps(host, patcher, dense, outputs, *[[("second", at(RAMP, n))] for n in range(STEPS)])


def test_another_extension_that_reads_the_tags_is_left_alone(forge):
    host, patcher, dense = forge()

    class Other(type(host.network)):
        def activate(self, p, params_list):
            return super().activate(p, [Params([params.positional[0], "1"]) for params in params_list])

    host.network = Other()
    outputs = host.picture(f"style:{RAMP}")
    check_steps(host, patcher, dense, outputs, *[[("style", 1)]] * STEPS)


def test_clones_of_the_unet_and_other_patchers_on_the_same_model(forge):
    host, patcher, dense = forge()
    host.activate(f"style:{RAMP}")
    freeu = host.unet.clone()
    outputs = host.sample(unet=freeu)
    check_steps(host, patcher, dense, outputs, *[[("style", at(RAMP, n))] for n in range(STEPS)])

    def reload(step):
        host.host.load(host.unet.clone())  # an extension that loads a clone in the middle of a pass

    check_steps(host, patcher, dense, host.sample(before=reload), *[[("style", at(RAMP, n))] for n in range(STEPS)])


def test_a_stack_with_a_refused_lora_and_keys_of_other_extensions(forge):
    host, patcher, dense = forge(
        "bf16", bad=lambda _: {"blocks.1.proj.weight": host_value("lora", (32, 48), 5)}, style=lora_on_everything
    )
    outputs = host.picture("bad:1@0,0@1", f"style:{RAMP}")
    check_steps(host, patcher, dense, outputs, *[[("style", at(RAMP, n))] for n in range(STEPS)])
    host.activate(f"style:{RAMP}")
    (identifier,) = host.unet.lora_patches
    host.unet.lora_patches = {f"{identifier} 12:30": host.unet.lora_patches[identifier]}
    base = run(host.host.load(patcher))
    assert all(same_bits(output, base) for output in host.sample()), "somebody else's key keeps its strengths"


def test_two_tags_of_one_file_that_meet_in_one_strength(forge):
    host, patcher, dense = forge()
    outputs = host.picture("style:0@0,1@1", "style:1@0,0@1", steps=4)
    check_steps(host, patcher, dense, outputs, *[[("style", a), ("style", 1 - a)] for a in (0, 0, 0.5, 1)])


@pytest.mark.parametrize("fault", ["in place", "left to the host"])
def test_where_strengths_cannot_be_set_in_place_the_whole_stack_is_applied_anew(forge, monkeypatch, caplog, fault):
    host, patcher, dense = forge("bf16", style=lora_on_everything, second=dora)
    if fault == "in place":
        monkeypatch.setattr(step_strengths, "set_strengths", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr(host.host.guard.stacks, "was_left_to_host", lambda _: True)
    with caplog.at_level(logging.WARNING, "lib_lora_guard"):
        outputs = host.picture(f"style:{RAMP}", "style:1@0,0@1", "second:0.5", steps=4)
    stacks = [[("style", a), ("style", 1 - a), ("second", 0.5)] for a in (0, 0, 0.5, 1)]
    check_steps(host, patcher, dense, outputs, *stacks)
    assert ("could not be changed in place" in caplog.text) is (fault == "in place")
    monkeypatch.undo()
    host.picture("style:0", "style:1", "second:0.5")
    assert is_at_start(host, patcher)


def test_a_stack_that_could_not_be_applied_is_tried_again_as_it_is(forge):
    host, patcher, _ = forge()
    host.activate(f"style:{RAMP}")

    def spoil(step):
        host.unet.lora_loader.loaded_hash = RETRY

    host.sample(before=spoil)
    assert is_at_start(host, patcher)


@pytest.mark.parametrize(
    ("owner", "name", "second"),
    [
        (Bypass, "exchange", dora),
        (JoinedLowRank, "exchange", slices_of_qkv),
        (WeightTerms, "exchange", other_kinds),
        (MergeAttachment, "replace", other_kinds),
    ],
)
def test_a_fault_in_the_middle_of_a_change_leaves_the_old_strengths(forge, monkeypatch, owner, name, second):
    host, _, _ = forge("fp8", style=lora_on_everything, second=second)
    host.activate("second:0.7", "style:0.5")
    host.host.load(host.unet)
    before, engine = run(host.unet), host.host.guard.stacks.state(host.unet.lora_loader).engine
    strengths = [(term.origin, term.strength) for a in engine.attached.values() for term in a.terms]
    original, calls = getattr(owner, name), []

    def fails_once(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("planted")
        return original(self, *args)

    monkeypatch.setattr(owner, name, fails_once)
    with torch.no_grad(), pytest.raises(MemoryError, match="planted"):
        set_strengths(engine, {0: 1.0, 1: 0.1})
    assert same_bits(run(host.unet), before)
    assert strengths == [(term.origin, term.strength) for a in engine.attached.values() for term in a.terms]


def test_the_other_name_of_the_tag_and_a_reloaded_ui(forge):
    host, patcher, dense = forge()
    aliases = host.parts.extra_networks.extra_network_aliases
    assert aliases == {"loractl": host.network}, "switched on late it has to be there at once"
    # Forge makes its list anew when the UI is reloaded, after the scripts have run.
    aliases.clear()
    for callback in host.app_started:
        callback(None, None)
    assert aliases == {"loractl": host.network}
    hooks = len(host.host.guard.hooks.hooks)
    host.on_denoiser.clear()
    forge_schedules.install(host.schedules, host.host.guard.hooks, host.parts)
    assert (len(host.host.guard.hooks.hooks), len(host.on_denoiser)) == (hooks, 1)
    check_steps(host, patcher, dense, host.picture(f"style:{RAMP}"), *[[("style", at(RAMP, n))] for n in range(STEPS)])


def test_after_the_guard_is_gone_nothing_of_it_is_left(forge):
    host, _, _ = forge()
    hooks = HookSet()
    hooks.hooks, host.host.guard.hooks.hooks = (
        [h for h in host.host.guard.hooks.hooks if h.name in ("activate", "launch_sampling")],
        [h for h in host.host.guard.hooks.hooks if h.name not in ("activate", "launch_sampling")],
    )
    host.activate(f"style:{RAMP}")
    host.schedules.forget()
    hooks.restore()
    assert not hasattr(type(host.network).activate, "lora_guard_hook")
    outputs = host.sample()
    assert all(same_bits(output, outputs[0]) for output in outputs)


def test_a_host_without_one_of_the_parts_is_refused(monkeypatch):
    names = ("extra_networks_lora", "modules.extra_networks", "modules.sd_samplers_common", "modules.script_callbacks")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(HostError, match="extra_networks_lora is not loaded, so strengths cannot change"):
        forge_schedules.probe()
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(HostError, match=r"^extra_networks_lora\.ExtraNetworkLora is missing$"):
        forge_schedules.probe()


def test_after_a_schedule_a_model_without_loras_is_itself_again(forge):
    host, patcher, _ = forge("bf16")
    host.picture(f"style:{RAMP}")
    host.host.load(patcher)
    assert all(not module._forward_hooks for module in patcher.model.modules())
    assert all(not parameter.requires_grad for parameter in patcher.model.parameters())
    assert not torch.is_inference(next(patcher.model.parameters()))
