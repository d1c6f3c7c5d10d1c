"""Any sequence of stacks, strengths, modes, removals and failures, on any storage: what holds after every single step.

The model of the test knows the stack that was asked for and nothing of the engine; the weights that stack should give are
computed in float64 by support.reference (and by the rotations written out in any_stack.py) from the decoded base weights.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from patching.any_stack import (
    IN_FLOAT64,
    MISFIT,
    NARROW,
    REFERENCES,
    SHAPES,
    STORAGES,
    STORAGES_OF_WIDE_ROWS,
    VARIANTS,
    X,
    build,
    patch_of,
)
from safetensors.torch import save_file
from support.measure import same_bits
from support.reference import merge_reference
from support.short_way import take_short_way_of_plain_layers

from lib_lora_guard.errors import LoraMismatchError, ModeError, RestoreError
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.patching import (
    backup,
    file_backup,
    file_reader,
    hook_attachments,
    merge_attachment,
    merging,
    norms,
    transaction,
)
from lib_lora_guard.patching.attachment import Attachment
from lib_lora_guard.patching.backup import BackupStore
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.file_backup import FileBackup, WeightFile
from lib_lora_guard.patching.file_reader import FileReader
from lib_lora_guard.patching.hook_attachments import BypassAttachment, OnTheFlyAttachment
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.marked_class import class_of
from lib_lora_guard.patching.merge_attachment import MergeAttachment
from lib_lora_guard.patching.operators import NUMBER, WEIGHT_PATCH
from lib_lora_guard.patching.spool import Spool
from lib_lora_guard.planning.mode import Mode, Wish

patches = st.one_of(
    [st.tuples(st.just(key), st.sampled_from(sorted(found)), st.integers(0, 3)) for key, found in VARIANTS.items()]
)
loras = st.lists(patches, min_size=1, max_size=6, unique_by=lambda patch: patch[0])
strengths = st.sampled_from([1.0, 0.7, 0.05, -0.5, 0.0])
stacks = st.lists(st.tuples(st.integers(0, 4), strengths), max_size=3, unique_by=lambda lora: lora[0])
"""Which LoRAs of the pool, in which order and strength; number 4 fits no model."""
wishes = st.sampled_from([Wish.AUTO, Wish.AUTO, Wish.BYPASS, Wish.ON_THE_FLY, Wish.MERGE])


class PlantedError(Exception):
    """Derived from nothing that the product catches by name."""


POINTS = [
    (merge_attachment, "merge"),
    (hook_attachments, "ratios_of"),
    (merge_attachment, "apply_terms"),
    (norms, "apply_terms"),
    (merging, "apply_terms"),
    (merging, "_scratch"),
    (BackupStore, "keep"),
    (BypassAttachment, "__init__"),
    (OnTheFlyAttachment, "__init__"),
    (MergeAttachment, "__init__"),
    (BypassAttachment, "attach"),
    (BypassAttachment, "detach"),
    (OnTheFlyAttachment, "attach"),
    (OnTheFlyAttachment, "detach"),
    (MergeAttachment, "attach"),
    (MergeAttachment, "detach"),
    (BypassAttachment, "replace"),
    (OnTheFlyAttachment, "replace"),
    (MergeAttachment, "replace"),
    (PlainAccess, "site"),
    (PlainAccess, "dense"),
    (PlainAccess, "rows"),
    (PlainAccess, "set_parameter"),
    (PlainAccess, "set_weight_terms"),
    (Spool, "write"),
    (Spool, "read"),
    (WeightFile, "prove"),
    (FileBackup, "parameter"),
    (FileReader, "read"),
]


ERRORS = [PlantedError, OutOfMemory[0], MemoryError, KeyboardInterrupt]


@contextlib.contextmanager
def failing(point, error, first, after, for_ever=False):
    """The call number `first` of `point` fails, before or after it has done its work; `for_ever`: all later ones too."""
    owner, name = point
    original, calls, over = getattr(owner, name), 0, False

    def planted(*args, **kwargs):
        nonlocal calls
        calls += 1
        # An undo that is tried again later still holds this function.
        if not over and (calls == first or (for_ever and calls > first)):
            if after:
                original(*args, **kwargs)
            raise error("planted")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, planted)
        try:
            yield
        finally:
            over = True


class Changes(RuleBasedStateMachine):
    @initialize(
        entry=st.sampled_from(sorted(STORAGES_OF_WIDE_ROWS)),
        qkv=st.sampled_from(sorted(STORAGES)),
        proj=st.sampled_from(sorted(STORAGES)),
        small_fp8=st.booleans(),
        merged_late=st.booleans(),
        backups=st.sampled_from(["ram", "disk", "file"]),
        pool=st.lists(loras, min_size=4, max_size=4),
        short_way=st.booleans(),
    )
    def begin(self, entry, qkv, proj, small_fp8, merged_late, backups, pool, short_way=False):
        torch.set_num_threads(1)  # for tensors this small a second thread is twenty times slower on a busy machine
        self.patch = pytest.MonkeyPatch()
        # pytest keeps log records with their tracebacks, and those keep what a failed change made; see the test below.
        self.patch.setattr(transaction.log, "disabled", True)
        if merged_late:
            # As weights above 1 MB are: merged when they are put in place, one after the other.
            self.patch.setattr(merge_attachment, "KEPT_BYTES", 16)
        self.storages = {"entry": entry, "block.qkv": qkv, "block.proj": proj}
        self.model = build({**self.storages, **({"shift": "fp8"} if small_fp8 else {})})
        self.engine, self.access = Engine(), PlainAccess(self.model)
        if short_way:
            take_short_way_of_plain_layers(self.patch)
        if backups != "ram":
            # As on a GPU with neither spare VRAM nor spare RAM.
            for module in (backup, file_backup):
                self.patch.setattr(module, "lies_in_ram", lambda parameter: False)
            self.patch.setattr("lib_lora_guard.patching.spool.disk_spare_bytes", lambda folder: 1 << 30)
            self.patch.setattr(self.access, "backup_budget", lambda: BackupBudget(0, 0, 1 << 30))
        if backups == "file":
            self.load_from_file()
        self.pool = [{key: patch_of(key, variant, seed) for key, variant, seed in lora} for lora in pool]
        self.pool.append({"block.proj.weight": MISFIT, "entry.weight": patch_of("entry.weight", "lora", 0)})
        self.originals = {name: p.data.clone() for name, p in self.model.named_parameters()}
        self.kinds = {name: (type(p), p.dtype) for name, p in self.model.named_parameters()}
        self.weights = {key: self.access.dense(self.access.site(key)).double() for key in SHAPES}
        self.base, self.applied, self.wish = self.output(), [], Wish.AUTO

    def load_from_file(self):
        """The parameters come from a checkpoint file, which is their backup, in pieces of 256 bytes."""
        for name, value in {"LEAST_BYTES": 0, "SMALLEST_BYTES": 0, "JUDGED_BYTES": 1 << 40}.items():
            self.patch.setattr(file_backup, name, value)
        self.patch.setattr(file_reader, "PIECE_BYTES", 256)
        self.folder = Path(tempfile.mkdtemp())
        path = self.folder / "model.safetensors"
        save_file({name: p.data.clone() for name, p in self.model.named_parameters()}, path)
        self.engine = Engine(weight_files=lambda: [path])

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.change([], Wish.AUTO)
        self.holds()
        self.patch.undo()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    # Steps.

    @rule(stack=stacks, wish=wishes, leave_out=st.booleans())
    def set(self, stack, wish, leave_out):
        self.change(stack, wish, leave_out)

    @rule(strength=strengths, which=st.integers(0, 2))
    def change_strength(self, strength, which):
        stack = list(self.applied)
        if which < len(stack):
            stack[which] = (stack[which][0], strength)
        self.change(stack, self.wish)

    @rule(wish=wishes)
    def change_mode(self, wish):
        self.change(self.applied, wish)

    @rule()
    def remove(self):
        self.change([], Wish.AUTO)

    @rule()
    def change_nothing(self):
        before = dict(self.engine.attached)
        self.change(self.applied, self.wish)
        assert same_objects(self.engine.attached, before), "a change that changes nothing made something anew"

    @rule(
        stack=stacks,
        wish=wishes,
        point=st.sampled_from(POINTS),
        error=st.sampled_from(ERRORS),
        first=st.integers(1, 6),
        after=st.booleans(),
    )
    def fail_once(self, stack, wish, point, error, first, after):
        # A merge that finds no memory anywhere says so in an error of its own.
        self.change(stack, wish, plan=failing(point, error, first, after), errors=(error, MemoryError))

    @rule(stack=stacks, wish=wishes, point=st.sampled_from(POINTS), first=st.integers(1, 6), after=st.booleans())
    def fail_for_a_while(self, stack, wish, point, first, after):
        """Whatever goes wrong goes wrong in undoing it too; when that is over, the next change puts things right."""
        plan = failing(point, OutOfMemory[0], first, after, for_ever=True)
        self.change(stack, wish, plan=plan, errors=(OutOfMemory[0], MemoryError))

    def change(self, stack, wish, leave_out=True, plan=None, errors=()):
        """One change of the engine, and of what this test believes to be applied."""
        before, bits = dict(self.engine.attached), self.bits()
        old = (self.applied, self.wish)
        wanted = [self.request(number, strength, n) for n, (number, strength) in enumerate(stack)]
        failed = None
        try:
            with plan or contextlib.nullcontext():
                report = self.engine.change(self.access, wanted, wish, leave_out)
        except (*errors, ModeError, LoraMismatchError, RestoreError) as error:
            failed = type(error)
        if failed is None:
            assert leave_out or not report.refused
            # The engine leaves out what does not fit; whether it is right in that is for `expected_refusal`.
            for (number, _), lora in zip(stack, report.loras, strict=True):
                assert (lora.refused is not None) == (number == 4)
                assert lora.used == (0 if number == 4 else len(self.pool[number]))
                assert sum(lora.modes.values()) == lora.used
            self.applied, self.wish = [lora for lora in stack if lora[0] != 4], wish
            self.check_reuse(before)
            return
        if failed is ModeError and not errors:
            assert self.cannot_be_merged(stack, wish)
        elif failed is LoraMismatchError and not errors:
            assert not leave_out
            assert any(number == 4 for number, _ in stack)
        assert same_objects(self.engine.attached, before), "a failed change left other attachments"
        self.applied, self.wish = old
        if self.engine.is_unfinished:
            assert plan is not None
            with contextlib.suppress(ModeError):
                self.engine.change(self.access, [self.request(n, s, i) for i, (n, s) in enumerate(old[0])], old[1])
        assert all(same_bits(now, then) for now, then in zip(self.bits(), bits, strict=True)), "other bits"

    def request(self, number, strength, origin):
        terms = {key: [patch.term(strength, origin)] for key, patch in self.pool[number].items()}
        return LoraRequest(f"lora{number}", strength, terms)

    def cannot_be_merged(self, stack, wish):
        """Merging is refused exactly where a matrix of few bits is asked for."""
        keys = {key for number, _ in stack if number != 4 for key in self.pool[number]}
        return wish is Wish.MERGE and any(
            self.storages.get(key.removesuffix(".weight")) in NARROW for key in keys if key.endswith(".weight")
        )

    def check_reuse(self, before):
        """What has the same terms in the same mode is the same attachment."""
        for key, old in before.items():
            new = self.engine.attached.get(key)
            if new is not None and content(new) == content(old):
                assert new is old, f"{key} was made anew although nothing of it changed"

    # What holds after every step.

    @invariant()
    def holds(self):
        if not hasattr(self, "engine"):
            return
        keys = {key for number, _ in self.applied for key in self.pool[number]}
        assert set(self.engine.attached) == keys
        self.check_modes()
        self.check_backups()
        self.check_output()
        if not self.applied:
            self.check_untouched()

    def check_modes(self):
        for key, attachment in self.engine.attached.items():
            small = len(SHAPES[key]) < 2
            narrow = not small and self.storages.get(key.removesuffix(".weight")) in NARROW
            layer = self.model.get_submodule(key.rpartition(".")[0])
            if small:
                assert attachment.mode is Mode.MERGE
                continue
            assert attachment.mode is not Mode.MERGE or not narrow
            if self.wish is Wish.MERGE:
                assert attachment.mode is Mode.MERGE
            if self.wish is Wish.ON_THE_FLY:
                assert attachment.mode is Mode.ON_THE_FLY
            assert bool(layer._forward_hooks) == (attachment.mode is Mode.BYPASS)
            patched = getattr(layer, "weight_terms", None) is not None or WEIGHT_PATCH in vars(layer)
            assert patched == (attachment.mode is Mode.ON_THE_FLY)

    def check_backups(self):
        merged = [a for a in self.engine.attached.values() if isinstance(a, MergeAttachment)]
        expected = sum(self.originals[a.site.key].nbytes for a in merged)
        assert self.engine._backups.bytes() == expected, "a backup was lost or is kept for nothing"
        kept = self.engine.originals()
        assert all(same_bits(kept[a.site.key].data, self.originals[a.site.key]) for a in merged)

    def check_output(self):
        reference, rounding = self.reference()
        output = self.output()
        contribution = (reference - self.base.double()).norm()
        error = (output.double() - reference).norm()
        # Design section 5 for fp32; the model's own forward in fp32 is as far from float64 as the base's own is.
        allowed = (1e-4 + rounding) * contribution + 3e-6 * reference.norm()
        assert error <= allowed, f"error {error:.2e}, contribution {contribution:.2e}, allowed {allowed:.2e}"

    def check_untouched(self):
        assert same_bits(self.output(), self.base)
        for name, parameter in self.model.named_parameters():
            assert (type(parameter), parameter.dtype) == self.kinds[name], f"{name} is stored in another way"
            assert same_bits(parameter.data, self.originals[name]), f"{name} has other bits"
        for name, layer in self.model.named_modules():
            assert not layer._forward_hooks, f"{name} still has a hook"
            assert not layer._forward_pre_hooks, f"{name} still has a hook before it"
            assert getattr(layer, "weight_terms", None) is None
            assert not {"forward", NUMBER, WEIGHT_PATCH} & set(vars(layer))
            assert class_of(layer) is type(layer)
        assert self.engine._backups.bytes() == 0

    def reference(self):
        """The output in float64 with the weights that the stack gives, and what merging into 16 bits may add to it.

        A merged weight is rounded to its storage. Where float64 and the product's fp32 lie on two sides of a rounding
        border they differ by one unit of it: of single weights, so that 2**-7 (bf16) shrinks to less than 1e-3 of all.
        """
        state, rounding = dict(self.weights), 0.0
        for number, strength in self.applied:
            for key, patch in self.pool[number].items():
                state[key] = merge_reference([patch.entry(strength)], state[key], REFERENCES)
        for key, attachment in self.engine.attached.items():
            stored = self.kinds[key][1]
            if attachment.mode is Mode.MERGE and stored in (torch.bfloat16, torch.float16):
                state[key] = state[key].float().to(stored).double()
                rounding = 1e-3
        return torch.func.functional_call(IN_FLOAT64, state, X.double()), rounding

    def bits(self):
        return [p.data.clone() for p in self.model.parameters()]

    def output(self):
        with torch.no_grad():
            return self.model(X).clone()


def content(attachment):
    """The mode and the terms: attachments that are equal in it do the same."""
    return attachment.mode, [term.identity() for term in attachment.terms]


def same_objects(now, then):
    return now.keys() == then.keys() and all(now[key] is then[key] for key in then)


class TestChanges(Changes.TestCase):
    settings = settings(
        max_examples=120,
        stateful_step_count=8,
        deadline=None,  # other programs share the machine
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@pytest.mark.parametrize(
    ("point", "for_ever"),
    [((MergeAttachment, "__init__"), False), ((PlainAccess, "set_parameter"), False), ((PlainAccess, "set_parameter"), True)],
    ids=["prepared", "undone", "undone later"],
)  # fmt: skip
def test_the_traceback_of_a_failed_change_keeps_no_backup_alive(point, for_ever, caplog):
    """Consoles, notebooks and log handlers keep the last exception, and with it every local of a failed change. The
    backups must be released by the engine all the same."""
    model, engine = build({}), Engine()
    access = PlainAccess(model)
    keys = ["block.norm.weight", "block.norm.bias", "block.conv.bias"]
    terms = {key: [patch_of(key, "diff", 0).term(1.0, 0)] for key in keys}
    kept = []
    with failing(point, PlantedError, 2, True, for_ever):
        try:
            engine.change(access, [LoraRequest("a", 1.0, terms)])
        except PlantedError as error:
            kept.append(error)
    assert kept
    engine.change(access, [])
    assert not engine.is_unfinished
    assert engine._backups.bytes() == 0


@pytest.fixture
def machine():
    pool = [
        [("entry.weight", "lora", 0), ("block.qkv.weight", "dora_rows", 1), ("block.norm.weight", "diff", 2)],
        [("block.proj.weight", "diff", 0), ("block.conv.weight", "glora_conv", 1), ("block.qkv.weight", "lora", 2)],
        [("entry.weight", "loha", 3)],
        [("entry.weight", "lokr", 3)],
    ]
    machine = Changes()
    machine.begin("fp8", "bf16", "fp32", False, False, "ram", pool)
    machine.set([(0, 0.7), (1, -0.5)], Wish.AUTO, True)
    machine.holds()
    assert len(machine.engine.attached) == 5
    assert {a.mode for a in machine.engine.attached.values()} == set(Mode)
    yield machine
    machine.patch.undo()


def test_the_checks_see_a_wrong_output(machine, monkeypatch):
    weight = machine.model.block.norm.weight
    weight.data += 1e-3
    with pytest.raises(AssertionError, match="contribution"):
        machine.holds()
    weight.data -= 1e-3
    machine.holds()
    request = machine.request
    monkeypatch.setattr(machine, "request", lambda number, strength, origin: request(number, 1.05 * strength, origin))
    machine.set([(0, 0.7), (1, -0.5)], Wish.AUTO, True)
    with pytest.raises(AssertionError, match="contribution"):
        machine.holds()


def test_the_checks_see_a_lost_hook_and_a_forgotten_one(machine):
    hooks = machine.model.entry._forward_hooks
    kept = dict(hooks)
    hooks.clear()
    with pytest.raises(AssertionError):
        machine.holds()
    hooks.update(kept)
    machine.remove()
    machine.holds()
    machine.model.entry.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError, match="still has a hook"):
        machine.holds()


def test_the_checks_see_another_bit_another_format_and_a_leaked_backup(machine):
    machine.remove()
    machine.holds()
    proj = machine.model.block.proj
    proj.weight.data[0, 0] = torch.nextafter(proj.weight.data[0, 0], torch.tensor(9.0))
    with pytest.raises(AssertionError):
        machine.holds()
    proj.weight.data.copy_(machine.originals["block.proj.weight"])
    machine.holds()
    kept = machine.engine._backups.keep("block.proj.weight", proj.weight)
    with pytest.raises(AssertionError, match="a backup was lost or is kept for nothing"):
        machine.holds()
    kept.release()
    machine.model.shift.data = machine.model.shift.data.bfloat16()
    with pytest.raises(AssertionError):
        machine.check_untouched()


def test_the_checks_see_an_attachment_that_is_made_anew_for_nothing(machine, monkeypatch):
    monkeypatch.setattr(Attachment, "carries_out", lambda self, planned: False)
    with pytest.raises(AssertionError, match="was made anew although nothing of it changed"):
        machine.change_nothing()
    monkeypatch.setattr(machine, "check_reuse", lambda before: None)
    with pytest.raises(AssertionError, match="made something anew"):
        machine.change_nothing()
