"""Attachments alone. A merge on a full device: a change that failed half way is put right, one that changed nothing stays.

The meta device stands for the card; what is checked is which object lies where.
"""

import pytest
import torch
from patching.terms import term
from support.live_memory import LiveMemory
from support.make import Net, host_value

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.errors import RestoreError
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching import backup, merge_attachment
from lib_lora_guard.patching.backup import HeldBackup, Place, Where
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.merge_attachment import MergeAttachment, MergeState
from lib_lora_guard.patching.plan import PlannedWeight
from lib_lora_guard.planning.mode import Choice, Mode, Wish
from lib_lora_guard.units import MB

CPU, CARD = torch.device("cpu"), torch.device("meta")


KEY = "blocks.0.proj.weight"


class Case:
    """One weight on the card with its original in RAM; `full` refuses what is moved there."""

    def __init__(self, monkeypatch):
        self.model, self.full = Net(16, depth=1), False
        self.access = PlainAccess(self.model)
        original = self.here()
        terms = (parse_term([1.0, host_value("lora", tuple(original.shape), 1), 1.0, None, None], {}, 0),)
        kept = HeldBackup(KEY, original, Place(Where.RAM, "no spare VRAM"))
        planned = PlannedWeight(self.access.site(KEY), terms, Choice(Mode.MERGE, "wished"))
        self.merge = MergeAttachment(self.access, planned, CARD, kept)
        self.merge._merge_unseen = lambda source: (torch.nn.Parameter(torch.ones_like(source, device=CPU), False), None)
        self.access.set_parameter(self.merge.site, torch.nn.Parameter(original.to(CARD), requires_grad=False))
        moved = backup.moved

        def refusing(parameter, device):
            is_full = self.full is True or (self.full == "while merged" and self.here().device == CARD)
            if is_full and device == CARD and parameter.device != CARD:
                raise OutOfMemory[0]("CUDA out of memory. Tried to allocate 2.00 MiB")
            return moved(parameter, device)

        for module in (merge_attachment, backup):
            monkeypatch.setattr(module, "moved", refusing)

    def here(self):
        return self.model.get_parameter(KEY)


@pytest.fixture
def small(monkeypatch):
    """Its merged value is made before anything is changed."""
    return Case(monkeypatch)


@pytest.fixture
def large(monkeypatch):
    """Its merged value is made when it is put in place, in RAM here for want of room."""
    monkeypatch.setattr(merge_attachment, "KEPT_BYTES", 16)
    return Case(monkeypatch)


def test_a_small_merge_that_finds_no_room_changes_nothing(small):
    before, small.full = small.here(), True
    with pytest.raises(OutOfMemory):
        small.merge.attach()
    assert small.here() is before
    small.merge.detach()
    assert small.here() is before, "the original was put where it lies already"
    assert small.merge.state is MergeState.NEW


def test_a_small_original_that_finds_no_room_leaves_the_weight_merged(small):
    small.merge.attach()
    merged, small.full = small.here(), True
    with pytest.raises(OutOfMemory):
        small.merge.detach()
    assert small.here() is merged
    assert small.merge.state is MergeState.MERGED
    small.merge.attach()
    assert small.here() is merged, "the rollback of a restore that has changed nothing needs no memory"
    small.full = False
    small.merge.detach()
    assert small.here() is not merged
    assert small.here().device == CARD


def test_a_large_merge_makes_room_for_its_original(large):
    """The card has no place for a second copy, and the merged weight's own place is enough."""
    large.merge.attach()
    merged = large.here()
    large.full = "while merged"
    large.merge.detach()
    assert large.here() is not merged
    assert large.here().device == CARD
    assert large.merge.state is MergeState.RESTORED


def test_a_large_original_whose_room_was_taken_waits_in_ram_and_comes_back(large):
    large.merge.attach()
    large.full = True
    with pytest.raises(OutOfMemory):
        large.merge.detach()
    assert large.here() is large.merge.backup.parameter(CPU)
    assert large.merge.state is MergeState.STRAYED
    large.full = False
    large.merge.detach()
    assert large.here().device == CARD
    assert large.merge.state is MergeState.RESTORED


@pytest.mark.parametrize("again", ["attach", "detach"])
def test_a_large_merge_that_waits_in_ram_goes_back_to_its_device(large, again):
    large.full = True
    with pytest.raises(OutOfMemory):
        large.merge.attach()
    assert large.here().device == CPU
    assert large.merge.state is MergeState.STRAYED
    large.full = False
    getattr(large.merge, again)()
    assert large.here().device == CARD
    assert large.merge.state is (MergeState.MERGED if again == "attach" else MergeState.RESTORED)
    large.merge.detach()
    assert large.here().device == CARD


def test_a_restore_that_failed_while_the_parameter_was_set_is_done_again(small, monkeypatch):
    small.merge.attach()

    def broken(site, parameter):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(small.access, "set_parameter", broken)
        with pytest.raises(RuntimeError, match="planted"):
            small.merge.detach()
    merged = small.here()
    assert small.merge.state is MergeState.UNKNOWN
    small.merge.detach()
    assert small.here() is not merged
    assert small.merge.state is MergeState.RESTORED


def test_a_suspended_merge_can_be_attached_again(small):
    small.merge.attach()
    small.merge.suspend()
    assert small.here() is small.merge.backup.parameter(CPU)
    small.merge.attach()
    assert small.here() is small.merge._ready


def test_a_backup_that_is_lost_leaves_the_weight_merged(large):
    large.merge.attach()
    merged = large.here()
    large.merge.backup.release()
    with pytest.raises(RestoreError):
        large.merge.detach()
    assert large.here() is merged
    assert large.merge.state is MergeState.MERGED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_into_a_model_needs_the_memory_of_the_new_weight_and_a_few_slices(dtype, monkeypatch):
    """The original lies in RAM and is its own backup. Whether the result is finite is asked in slices too."""
    monkeypatch.setattr(merge_attachment, "SLICE_BYTES", MB)
    layer = torch.nn.Linear(512, 8192, bias=False).to(dtype).requires_grad_(False)
    model = torch.nn.ModuleDict({"layer": layer})
    access = PlainAccess(model)
    lora = term("lora", (8192, 512))
    original = layer.weight
    with LiveMemory(original, *lora.adapter.tensors()) as memory:
        Engine().change(access, [LoraRequest("a", 1.0, {"layer.weight": [lora]})], Wish.MERGE)
    assert layer.weight is not original
    above = memory.peak_bytes - original.nbytes
    assert above <= 4.5 * MB, f"{above / MB:.1f} MB beside the new weight of {original.nbytes / MB:.1f} MB"


def test_an_original_in_a_file_comes_by_ram_when_a_merge_is_put_back_on_a_full_card(large):
    large.merge.backup = HeldBackup(KEY, large.merge.backup.parameter(CPU), Place(Where.FILE, "the same bytes"))
    large.merge.attach()
    # A restore was interrupted, and the rollback may find anything in the weight's place.
    large.merge.state, large.full = MergeState.UNKNOWN, "while merged"
    large.merge.attach()
    assert large.here().device == CARD
    assert large.merge.state is MergeState.MERGED
