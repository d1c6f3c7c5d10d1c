"""`LoraGuard` beside other threads, other guards, files that change and parameters that the user replaces."""

import copy
import gc
import io
import logging
import os
import threading
import weakref

import pytest
import torch
from support.make import Net, rand, write_kohya
from support.measure import same_bits

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import BusyError, LoraFileError
from lib_lora_guard.hosts.plain import guard as plain
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.hook_attachments import BypassAttachment
from lib_lora_guard.patching.merge_attachment import MergeAttachment

X = rand(2, 16, 32, seed=5)
NAMES = {f"blocks.{b}.{name}.weight": shape for b in (0, 1) for name, shape in (("qkv", (96, 32)), ("proj", (32, 32)))}
KEY = "blocks.0.proj.weight"


def write(path, seed, prefix="lora_unet_", dot="_"):
    modules = {key.removesuffix(".weight").replace(".", dot): shape for key, shape in NAMES.items()}
    write_kohya(path, {f"{prefix}{name}": shape for name, shape in modules.items()}, seed=seed)


@pytest.fixture
def model():
    return Net(32)


@pytest.fixture
def style(tmp_path):
    write(tmp_path / "style.safetensors", 1)
    return tmp_path / "style.safetensors"


@pytest.fixture
def pose(tmp_path):
    write(tmp_path / "pose.safetensors", 2)
    return tmp_path / "pose.safetensors"


def run(model):
    with torch.no_grad():
        return model(X).clone()


def bits_of(model):
    return {name: p.data.clone() for name, p in model.named_parameters()}


def assert_bits(model, bits):
    assert [n for n, p in model.named_parameters() if not same_bits(p.data, bits[n])] == []


# Files.


def test_a_file_that_is_deleted_while_it_is_applied_changes_nothing_of_the_result(model, style, monkeypatch):
    """The disk is not asked for it again: once the change is made, nothing can fail."""
    read = plain.read_lora_file
    monkeypatch.setattr(plain, "read_lora_file", lambda path, *more: (read(path, *more), path.unlink())[0])
    guard = LoraGuard(model)
    report = guard.apply([(style, 1.0)])
    assert [lora.used for lora in report.loras] == [len(NAMES)]
    assert guard.report is report
    monkeypatch.undo()
    with pytest.raises(LoraFileError, match=r"style\.safetensors"):
        guard.apply([(style, 0.5)])
    assert guard.report is report


def test_a_file_that_is_replaced_while_it_is_applied_is_read_again_by_the_next_change(model, style, pose, monkeypatch):
    read = plain.read_lora_file
    monkeypatch.setattr(plain, "read_lora_file", lambda path, *more: (read(path, *more), pose.replace(path))[0])
    guard = LoraGuard(model)
    guard.apply([(style, 1.0)])
    old = run(model)
    monkeypatch.undo()
    guard.apply([(style, 1.0)])
    fresh = Net(32)
    LoraGuard(fresh).apply([(style, 1.0)])
    assert torch.equal(run(model), run(fresh))
    assert not torch.equal(run(model), old)


def test_another_file_of_equal_size_and_time_is_another_file(model, style, pose):
    guard, times = LoraGuard(model), style.stat()
    assert style.stat().st_size == pose.stat().st_size
    guard.apply([(style, 1.0)])
    old = run(model)
    os.utime(pose, ns=(times.st_atime_ns, times.st_mtime_ns))
    pose.replace(style)
    guard.apply([(style, 1.0)])
    assert not torch.equal(run(model), old)


# Threads.


def test_a_second_thread_waits_for_the_first(model, style, pose, monkeypatch):
    inside, go_on, done, writers = threading.Event(), threading.Event(), [], set()
    original = PlainAccess.set_parameter

    def slowly(self, site, value):
        writers.add(threading.get_ident())
        if not go_on.is_set():
            inside.set()
            go_on.wait(20)
        original(self, site, value)

    monkeypatch.setattr(PlainAccess, "set_parameter", slowly)
    base = bits_of(model)

    def apply(path):
        LoraGuard(model).apply([(path, 1.0)], mode="merge")
        done.append(path)

    first = threading.Thread(target=apply, args=(style,))
    second = threading.Thread(target=apply, args=(pose,))
    first.start()
    assert inside.wait(20)
    try:
        second.start()
        second.join(0.1)
        assert done == []
        assert second.is_alive()
        assert len(writers) == 1
    finally:
        go_on.set()
        for thread in (first, second):
            thread.join(20)
    assert done == [style, pose]
    assert LoraGuard(model).report.loras[0].label == "pose.safetensors"
    LoraGuard(model).remove()
    assert_bits(model, base)


def test_a_change_from_a_hook_in_a_forward_pass_needs_no_second_thread(model, style):
    guard, base = LoraGuard(model), run(model)
    handle = model.register_forward_pre_hook(lambda *_: guard.apply([(style, 1.0)]) and None)
    patched = run(model)
    handle.remove()
    assert torch.equal(run(model), patched)
    guard.remove()
    assert torch.equal(run(model), base)


def test_a_change_in_the_middle_of_a_change_of_the_same_thread_is_refused_in_a_line(model, style, pose, monkeypatch):
    """As a signal handler or a finaliser may ask for it. It must neither wait for ever nor be done."""
    guard, base = LoraGuard(model), run(model)
    guard.apply([(style, 1.0)], mode="merge")
    before = run(model)
    original, asked = PlainAccess.set_parameter, []

    def asking(self, site, value):
        original(self, site, value)
        if len(asked) < 50:
            # Without an end it would never come back, were it not refused.
            asked.append(site)
            guard.remove()

    monkeypatch.setattr(PlainAccess, "set_parameter", asking)
    with pytest.raises(BusyError, match=r"being changed in this very thread.*has returned$"):
        guard.apply([(pose, 1.0)], mode="merge")
    monkeypatch.undo()
    assert torch.equal(run(model), before)
    guard.remove()
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_an_undo_goes_on_through_any_number_of_interrupts(model, style, pose, mode, monkeypatch):
    """The impatient user's Ctrl+C comes again and again while the first one is undone."""
    guard, base = LoraGuard(model), bits_of(model)
    guard.apply([(style, 1.0)], mode=mode)
    before, left = run(model), [6]
    kind = {"bypass": BypassAttachment, "merge": MergeAttachment}[mode]
    replace = kind.replace

    def interrupted(self, other):
        replace(self, other)
        left[0] -= 1
        if left[0] >= 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(kind, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        guard.apply([(pose, 1.0)], mode=mode)
    assert left[0] < 0
    assert torch.equal(run(model), before)
    monkeypatch.undo()
    guard.remove()
    assert_bits(model, base)


# Guards on a model and on a part of it.


@pytest.fixture
def whole(tmp_path):
    whole = torch.nn.ModuleDict({"unet": Net(32)})
    write(tmp_path / "whole.safetensors", 3, "unet.", ".")
    return whole, tmp_path / "whole.safetensors"


@pytest.mark.parametrize("mode", ["bypass", "on_the_fly", "merge"])
@pytest.mark.parametrize("inner_first", [False, True])
def test_two_guards_on_one_weight_are_refused_in_a_line(whole, style, mode, inner_first):
    (model, file), base = whole, bits_of(whole[0])
    outer, inner = LoraGuard(model), LoraGuard(model["unet"])
    first, second = [(outer, file), (inner, style)][:: -1 if inner_first else 1]
    first[0].apply([(first[1], 1.0)], mode=mode)
    before = run(model["unet"])
    other = "Net" if inner_first else "ModuleDict"
    with pytest.raises(
        BusyError, match=rf"weight: a LoRA of another guard \({other}\) is on this weight of \w+, and on 4 in"
    ):
        second[0].apply([(second[1], 1.0)], mode=mode)
    assert torch.equal(run(model["unet"]), before)
    assert second[0].report is None
    second[0].remove()
    assert torch.equal(run(model["unet"]), before)
    first[0].remove()
    assert_bits(model, base)
    second[0].apply([(second[1], 1.0)], mode=mode)
    second[0].remove()
    assert_bits(model, base)


def test_guards_on_two_parts_of_a_model_do_not_see_each_other(style):
    pair = torch.nn.ModuleList([Net(32), Net(32)])
    first, second = LoraGuard(pair[0]), LoraGuard(pair[1])
    first.apply([(style, 1.0)])
    second.apply([(style, 1.0)])
    assert torch.equal(run(pair[0]), run(pair[1]))


# Parameters that the user replaces, loads or converts while a LoRA is merged into them.


def replace(model):
    mine = torch.nn.Parameter(torch.ones(32, 32), requires_grad=False)
    model.blocks[0].proj.weight = mine
    return mine


def load(model):
    model.load_state_dict({KEY: torch.ones(32, 32)}, strict=False)
    return model.blocks[0].proj.weight


def assign(model):
    model.load_state_dict({KEY: torch.ones(32, 32)}, strict=False, assign=True)
    return model.blocks[0].proj.weight


def put_data(model):
    model.blocks[0].proj.weight.data = torch.ones(32, 32)
    return model.blocks[0].proj.weight


@pytest.mark.parametrize("change", [replace, load, assign, put_data])
def test_a_parameter_that_the_user_replaces_or_loads_stays_and_is_said(model, style, pose, change, caplog):
    base, guard = bits_of(model), LoraGuard(model)
    guard.apply([(style, 1.0)], mode="merge")
    mine = change(model)
    guard.remove()
    assert model.blocks[0].proj.weight is mine
    base[KEY] = torch.ones(32, 32)
    assert_bits(model, base)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"1 parameters were replaced or loaded while a LoRA was merged into them (the first is {KEY})" in caplog.text
    # The next LoRA is computed from it.
    guard.apply([(pose, 0.5)], mode="merge")
    fresh = Net(32)
    fresh.blocks[0].proj.weight.data = torch.ones(32, 32)
    LoraGuard(fresh).apply([(pose, 0.5)], mode="merge")
    assert_bits(model, bits_of(fresh))


def test_a_change_after_it_starts_from_the_users_value(model, style, pose):
    guard = LoraGuard(model)
    guard.apply([(style, 1.0)], mode="merge")
    replace(model)
    guard.apply([(pose, 0.5)], mode="merge")
    guard.remove()
    assert torch.equal(model.blocks[0].proj.weight, torch.ones(32, 32))


def test_a_checkpoint_that_is_loaded_over_a_merged_lora_stays_without_a_word(model, style, caplog):
    """It is what would be put back: nothing is lost."""
    base, guard = {n: v.clone() for n, v in model.state_dict().items()}, LoraGuard(model)
    guard.apply([(style, 1.0)], mode="merge")
    model.load_state_dict(base)
    guard.apply([(style, 1.0)], mode="merge")
    assert not same_bits(model.blocks[0].proj.weight.data, base[KEY]), "the LoRA is not there again"
    guard.remove()
    assert_bits(model, base)
    assert not caplog.records


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float64, "fp64")]
)
def test_a_model_that_is_converted_while_a_lora_is_merged_has_its_originals_converted(
    model, style, pose, dtype, name, caplog
):
    base, guard = bits_of(model), LoraGuard(model)
    guard.apply([(style, 1.0)], mode="merge")
    model.to(dtype)
    guard.apply([(pose, 1.0)], mode="merge")
    assert {p.dtype for p in model.parameters()} == {dtype}
    guard.remove()
    assert_bits(model, {name: value.to(dtype) for name, value in base.items()})
    (record,) = caplog.records
    assert f"4 parameters were converted to {name} while" in record.getMessage()


def test_a_merged_model_that_is_moved_is_no_change_of_the_users(model, style, caplog):
    base, guard = bits_of(model), LoraGuard(model)
    guard.apply([(style, 1.0)], mode="merge")
    for layer in model.modules():
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None:
                # As a host moves: the same values in another object at another place.
                layer._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
    guard.remove()
    assert_bits(model, base)
    assert not caplog.records


# What lives how long.


@pytest.mark.parametrize("mode", ["bypass", "on_the_fly", "merge"])
def test_a_model_that_is_dropped_with_its_loras_on_is_freed(style, mode):
    model = Net(32)
    model.blocks[0].proj.__dict__["owner"] = model
    guard, gone = LoraGuard(model), weakref.ref(model)
    guard.apply([(style, 1.0)], mode=mode)
    del model, guard
    gc.collect()
    assert gone() is None


def test_a_copy_and_a_pickle_of_a_model_have_no_engine(model, style):
    guard = LoraGuard(model)
    guard.apply([(style, 1.0)])
    guard.remove()
    whole = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    assert b"lora_guard.patching" not in stored.getvalue()
    assert b"lib_lora_guard" not in stored.getvalue()
    for other in (whole, torch.load(io.BytesIO(stored.getvalue()), weights_only=False)):
        LoraGuard(other).apply([(style, 1.0)])
        assert LoraGuard(other).report is not None
        assert not any(layer._forward_hooks for layer in model.modules())


def test_the_report_is_that_of_the_stack_on_the_model(model, style, pose):
    guard, other = LoraGuard(model), LoraGuard(model)
    assert guard.report is None
    applied = guard.apply([(style, 0.5)])
    assert other.report is applied
    with pytest.raises(LoraFileError):
        guard.apply([(style, 0.5), (pose.with_name("missing.safetensors"), 1.0)])
    assert guard.report is applied
    guard.remove()
    assert other.report.loras == []
