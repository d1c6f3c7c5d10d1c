"""The merges of one change ask the card together, and a change still ends whole or not at all, wherever it fails.

CPU tensors that count as lying on a card; all merges of the model are one batch of questions, or four.
"""

import weakref

import pytest
import torch
from faults.planting import Faults, is_planted
from patching.file_scene import SIZE, Scene, lay_on_card
from support.make import rand
from support.measure import same_bits

from lib_lora_guard.adapters import DiffAdapter, LoraAdapter, Term
from lib_lora_guard.errors import RestoreError
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching import file_reader, file_sums, merge_attachment, merge_factors, merging_together
from lib_lora_guard.patching.attachment import UnusableTermsError
from lib_lora_guard.patching.backup import Where
from lib_lora_guard.patching.file_backup import FileBackup, WeightFile
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.merge_attachment import MergeAttachment, MergeState
from lib_lora_guard.patching.merge_factors import FactorsAhead
from lib_lora_guard.patching.merging_together import SWITCH, MergingTogether
from lib_lora_guard.patching.transaction import Transaction
from lib_lora_guard.planning.mode import Wish
from lib_lora_guard.units import MB

CPU = torch.device("cpu")
SIZES_BYTES = [3 * SIZE * SIZE * 2, SIZE * SIZE * 2, 9 * SIZE * SIZE * 2] * 2
"""Of the six weights."""
SOME_BYTES = 12_000
BATCHES = {"all at once": (1 << 30, [6]), "some at once": (SOME_BYTES, [2, 1, 2, 1])}
"""What may be held, and how many weights are asked for at once then."""


@pytest.fixture(autouse=True)
def on_card(monkeypatch):
    lay_on_card(monkeypatch)
    # Fewer operations, at each of which memory ends or an interrupt comes below.
    monkeypatch.setattr(file_sums, "ROW_WORDS", 512)
    monkeypatch.setattr(file_reader, "PIECE_BYTES", 4096)
    monkeypatch.setattr(file_reader, "RING_BYTES", 3 * 4096)
    monkeypatch.setattr(file_reader, "COPY_BYTES", 2 * 4096)
    # Factors go there as to a card, into memory of their own.
    monkeypatch.setattr(merge_factors, "is_card", lambda device: True)


@pytest.fixture(params=BATCHES)
def scene(request, tmp_path, monkeypatch):
    """The model with a LoRA, and its values with that as `merged`."""
    scene = Scene(tmp_path)
    most, scene.batches = BATCHES[request.param]
    monkeypatch.setattr(merging_together, "MOST_HELD_BYTES", most)
    scene.change()
    assert scene.places() == {Where.FILE}
    scene.merged = scene.values()
    return scene


def has(scene, values):
    return all(same_bits(value, values[name]) for name, value in scene.values().items())


def after(scene, strength):
    """The values after a change of a model that asks for each weight by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        before = scene.values()
        scene.change(strength)
        found = scene.values()
        scene.change(0.7)
        assert has(scene, before)
    return found


def holds_nothing(scene):
    return all(one._held is None for one in scene.engine.attached.values())


def is_settled(scene, old):
    """True if the attachments of before are on the model, and hold nothing."""
    now = scene.engine.attached
    states = {one.state for one in now.values()}
    return now == old and states == {MergeState.MERGED} and holds_nothing(scene) and not scene.engine.is_unfinished


def counted(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **more: (calls.append(args), original(*args, **more))[1])
    return calls


def test_a_change_asks_for_many_weights_at_once_and_gives_the_same_bits(scene, monkeypatch):
    wanted = after(scene, -0.4)
    alone, finite = counted(monkeypatch, WeightFile, "read"), counted(monkeypatch, merge_attachment, "is_finite")
    wrong = counted(monkeypatch, merging_together, "_wrong")
    scene.change(-0.4)
    assert has(scene, wanted)
    assert (alone, finite) == ([], [])
    assert [len(restored) for (restored,) in wrong if restored] == scene.batches
    assert holds_nothing(scene)
    scene.remove()
    assert scene.is_original()
    assert alone == []


def test_no_more_is_held_than_agreed(scene, monkeypatch):
    most, restored = [], MergingTogether.restored

    def noting(self, merge, *more):
        restored(self, merge, *more)
        most.append(sum(one._held.nbytes for one in scene.engine.attached.values() if one._held is not None))
        assert most[-1] == self._held_bytes

    monkeypatch.setattr(MergingTogether, "restored", noting)
    scene.change(0.2)
    assert max(most) == (sum(SIZES_BYTES) if len(scene.batches) == 1 else max(SIZES_BYTES))
    monkeypatch.setattr(merging_together, "LARGEST_HELD_BYTES", max(SIZES_BYTES) - 1)
    del most[:]
    scene.change(0.3)
    assert len(most) == 4, "the large weights are restored alone"
    scene.remove()
    assert scene.is_original()


@pytest.mark.parametrize(
    ("free_mb", "spare_mb"), [(0, 0), (400, 100), (2048, 512), (24_000, 512)], ids=["full", "some", "2 GB", "24 GB"]
)
def test_a_change_uses_a_quarter_of_the_free_vram_and_no_more_than_512_mb(free_mb, spare_mb):
    assert merging_together.spare_bytes(free_mb * MB) == spare_mb * MB


def test_what_is_free_is_what_the_driver_of_the_card_says(monkeypatch):
    def refuses(device):
        raise RuntimeError("CUDA error")

    card = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 900) if device == card else None)
    assert merging_together._free_bytes(card) == 300
    assert merging_together._free_bytes(CPU) == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuses)
    assert merging_together._free_bytes(card) == 0


@pytest.mark.parametrize(("share_bytes", "count"), [(max(SIZES_BYTES), 6), (max(SIZES_BYTES) - 1, 4)])
def test_one_weight_is_held_in_a_quarter_of_what_all_may_take(scene, monkeypatch, share_bytes, count):
    held = counted(monkeypatch, MergingTogether, "restored")
    monkeypatch.setattr(merging_together, "LARGEST_HELD_BYTES", 1)
    monkeypatch.setattr(merging_together, "_free_bytes", lambda device: 16 * share_bytes)
    scene.change(0.5)
    assert len(held) == count
    assert holds_nothing(scene)


def test_where_vram_is_free_large_weights_are_held_too_and_slices_stay_as_they_are(scene, monkeypatch):
    """Of a product in slices of another size the last bits may be others: the same change gives the same bits whatever is free."""
    held, most, slices, merge, restored = [], [], set(), merge_attachment.merge, MergingTogether.restored

    def sliced(*args, **how):
        slices.add(how["slice_bytes"])
        return merge(*args, **how)

    def noting(self, one, *more):
        held.append(one)
        restored(self, one, *more)
        most.append(self._held_bytes)

    expected = after(scene, 0.5)
    monkeypatch.setattr(merging_together, "LARGEST_HELD_BYTES", 1)
    monkeypatch.setattr(merge_attachment, "merge", sliced)
    monkeypatch.setattr(MergingTogether, "restored", noting)
    scene.change(0.4)
    assert (held, slices) == ([], {64 * MB})
    monkeypatch.setattr(merging_together, "_free_bytes", lambda device: 2048 * MB)
    slices.clear()
    scene.change(0.5)
    assert (len(held), slices) == (len(SIZES_BYTES), {64 * MB})
    assert max(most) == sum(SIZES_BYTES), "all at once"
    assert has(scene, expected)
    assert holds_nothing(scene)


def test_a_wrong_checksum_in_a_batch_leaves_every_weight_as_it_was(scene):
    """The file has other bytes for one weight. It keeps its LoRA, as do the others, which were restored and merged already."""
    old = dict(scene.engine.attached)
    for lost in (scene.keys[0], scene.keys[len(scene.keys) // 2], scene.keys[-1]):
        scene.damage(lost, byte=5)
        for change in (lambda: scene.change(0.2), scene.remove):
            with pytest.raises(RestoreError, match="reload the checkpoint"):
                change()
            assert has(scene, scene.merged)
            assert is_settled(scene, old)
        scene.damage(lost, byte=5)
    scene.remove()
    assert scene.is_original()


@pytest.mark.parametrize("removes", [False, True])
def test_a_read_that_gives_wrong_bytes_once_is_done_again_alone(scene, monkeypatch, removes):
    wanted = scene.originals if removes else after(scene, 0.2)
    original, spoilt = FileBackup.unchecked, scene.keys[2]

    def spoiling(self, device):
        parameter, sums = original(self, device)
        if self.key == spoilt:
            # Not finite: that what was merged from it is not either says nothing of the weight.
            parameter.data.view(-1)[3] = float("inf")
            sums = sums + (torch.arange(len(sums)) == 1)
        return parameter, sums

    monkeypatch.setattr(FileBackup, "unchecked", spoiling)
    alone = counted(monkeypatch, WeightFile, "read")
    scene.remove() if removes else scene.change(0.2)
    assert {key for _, key, *_ in alone} == {spoilt}
    assert has(scene, wanted)
    assert holds_nothing(scene)
    scene.remove()
    assert scene.is_original()


@pytest.mark.parametrize("place", [0, 3, -1])
@pytest.mark.parametrize("leave_out", [False, True])
def test_an_overflow_in_the_middle_refuses_that_lora_alone(tmp_path, monkeypatch, place, leave_out):
    monkeypatch.setattr(merging_together, "MOST_HELD_BYTES", SOME_BYTES)
    scene = Scene(tmp_path, dtype=torch.float16)
    scene.change()
    merged, old = scene.values(), dict(scene.engine.attached)
    # Whatever is on that weight is refused with it.
    key = scene.keys.pop(place)
    usable = scene.stack(0.2)
    diff = Term(DiffAdapter(torch.full(tuple(scene.originals[key].shape), 6e4)), 2.0, origin=1)
    stack = [*usable, LoraRequest("large", 2.0, {key: [diff]})]
    if leave_out:
        report = scene.engine.change(scene.access, stack, Wish.PREFER_MERGE)
        assert [one.refused is not None for one in report.loras] == [False, True]
        assert "fp16" in report.loras[1].refused
        found = scene.values()
        scene.remove()
        monkeypatch.setenv(SWITCH, "0")
        scene.engine.change(scene.access, usable, Wish.PREFER_MERGE)
        assert has(scene, found)
    else:
        with pytest.raises(UnusableTermsError, match="fp16"):
            scene.engine.change(scene.access, stack, Wish.PREFER_MERGE, leave_out=False)
        assert is_settled(scene, old)
        assert has(scene, merged)
    assert holds_nothing(scene)
    scene.remove()
    assert scene.is_original()


def interrupted(*given):
    # Torch's own would have no frame that holds them.
    del given
    raise KeyboardInterrupt


@pytest.mark.parametrize("asked", ["overflow", "merging.torch._foreach_norm", "merging_together._wrong"])
def test_an_undo_has_the_room_of_what_was_merged(tmp_path, monkeypatch, asked):
    """A traceback holds what the functions on its way hold. With 22 GB of merged values in it the originals would have no room."""
    scene = Scene(tmp_path, dtype=torch.float16)
    stack, key = scene.stack(0.2), scene.keys[-1]
    if asked == "overflow":
        diff = Term(DiffAdapter(torch.full(tuple(scene.originals[key].shape), 6e4)), 2.0, origin=1)
        stack = [*stack, LoraRequest("large", 2.0, {key: [diff]})]
    else:
        monkeypatch.setattr(f"lib_lora_guard.patching.{asked}", interrupted)
    values, alive = [], []
    merged, put = MergingTogether.merged, MergeAttachment._put

    def noting(self, merge, unseen):
        values.append(weakref.ref(unseen))
        merged(self, merge, unseen)

    def counting(self, value, device, done):
        put(self, value, device, done)
        if done is MergeState.RESTORED:
            alive.append(sum(value() is not None for value in values))

    monkeypatch.setattr(MergingTogether, "merged", noting)
    monkeypatch.setattr(MergeAttachment, "_put", counting)
    with pytest.raises((UnusableTermsError, KeyboardInterrupt)):
        scene.engine.change(scene.access, stack, Wish.PREFER_MERGE, leave_out=False)
    assert (len(values), alive) == (6, [0] * 6)
    assert scene.is_original()


def test_an_original_that_is_not_finite_is_no_overflow(tmp_path):
    scene = Scene(tmp_path)
    name = scene.keys[1]
    with torch.no_grad():
        scene.model.get_parameter(name).view(-1)[3] = float("inf")
    scene.originals[name] = scene.model.get_parameter(name).data.clone()
    scene.damage(name, byte=6, value=scene.originals[name].view(-1)[3:4].view(torch.uint8).numpy().tobytes())
    for strength in (0.7, 0.2):
        scene.change(strength)
        assert scene.places() == {Where.FILE}
        assert not torch.isfinite(scene.values()[name]).all()
    scene.remove()
    assert scene.is_original()


POINTS = [
    (FileBackup, "unchecked"),
    (MergingTogether, "restored"),
    (MergingTogether, "merged"),
    (MergingTogether, "may_hold"),
    (MergingTogether, "settle"),
    (MergingTogether, "finish"),
    (MergeAttachment, "let_go"),
    (MergeAttachment, "_put"),
    (MergeAttachment, "_take_back"),
    (FactorsAhead, "of"),
]


@pytest.mark.parametrize("is_damaged", [False, True], ids=["", "damaged"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), POINTS, ids=lambda value: getattr(value, "__name__", value))
def test_an_interrupt_anywhere_leaves_the_stack_of_before(scene, monkeypatch, owner, name, late, is_damaged):
    """Also where the file has other bytes for one weight, which is known after some of the others were done."""
    old, original, at = dict(scene.engine.attached), getattr(owner, name), [0, 0]
    if is_damaged:
        scene.damage(scene.keys[3], byte=7)
    for act in (lambda: scene.change(0.2), scene.remove):
        for number in range(1, 2 * len(scene.keys) + 2):
            at[:] = 0, number

            def planted(*args, **more):
                at[0] += 1
                if late:
                    answer = original(*args, **more)
                if at[0] == at[1]:
                    raise KeyboardInterrupt
                return answer if late else original(*args, **more)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, planted)
                try:
                    act()
                    came = False
                except KeyboardInterrupt:
                    came = True
                except RestoreError:
                    assert is_damaged
                    came = at[0] >= at[1]
            if is_damaged and not came:
                break
            if not came:
                scene.change(0.7)
                old = dict(scene.engine.attached)
                break
            assert has(scene, scene.merged), (name, number)
            assert is_settled(scene, old), (name, number)
    if is_damaged:
        scene.damage(scene.keys[3], byte=7)
    scene.remove()
    assert scene.is_original()


@pytest.mark.parametrize("is_damaged", [False, True], ids=["", "damaged"])
def test_what_no_undo_has_reached_is_never_left_unchecked(scene, monkeypatch, is_damaged):
    """An interrupt at the end of a batch, and one in each attempt to undo it; then everything is taken off."""

    def interrupted(*args):
        raise KeyboardInterrupt

    lost = scene.keys[1]
    if is_damaged:
        scene.damage(lost, byte=7)
    with monkeypatch.context() as patch:
        patch.setattr(MergingTogether, "settle", interrupted)
        patch.setattr(Transaction, "undo", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scene.change(0.2)
    attachments_of_both = [one for pair in scene.engine._state.unfinished.pairs for one in pair]
    assert any(one._held is not None for one in attachments_of_both)
    assert scene.engine.detach_all() is not is_damaged
    now = scene.values()
    assert same_bits(now.pop(lost), (scene.merged if is_damaged else scene.originals)[lost])
    assert all(same_bits(value, scene.originals[name]) for name, value in now.items())
    assert not any(one._held is not None for one in attachments_of_both)


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("removes", [False, True])
def test_memory_that_ends_in_a_change_leaves_one_stack_or_the_other(scene, for_good, removes):
    wanted = scene.originals if removes else after(scene, 0.2)

    def act():
        scene.remove() if removes else scene.change(0.2)

    with Faults() as faults:
        act()
    scene.change(0.7)
    assert faults.count > 5 * len(scene.keys)
    for first in range(1, faults.count + 1):
        raised = None
        with Faults(first, for_good=for_good):
            try:
                act()
            except Exception as error:
                raised = error
        if raised is None:
            assert has(scene, wanted), first
        else:
            assert is_planted(raised), (first, raised)
            if not for_good:
                assert has(scene, scene.merged), first
        # What could not be undone for want of memory is undone first.
        scene.change(0.7)
        assert has(scene, scene.merged), first
        assert holds_nothing(scene)
    scene.remove()
    assert scene.is_original()


def test_a_card_without_room_for_a_held_value_gets_that_room(scene, monkeypatch):
    """The read finds none while anything is held; alone it does."""
    original, refused = FileBackup.unchecked, []

    def full(self, device):
        if any(one._held is not None for one in scene.engine.attached.values()):
            refused.append(self.key)
            raise OutOfMemory[0]("CUDA out of memory. Tried to allocate 2.00 MiB")
        return original(self, device)

    wanted = after(scene, 0.2)
    monkeypatch.setattr(FileBackup, "unchecked", full)
    scene.change(0.2)
    assert len(refused) >= 2
    assert has(scene, wanted)
    scene.remove()
    assert scene.is_original()


def stacks():
    def lora(n, out=8, rank=2, inner=4):
        adapter = LoraAdapter(rand(out, rank, seed=n).half(), rand(rank, inner, seed=n + 50).half(), alpha=1.0)
        return Term(adapter, 0.5, origin=n)

    whole = Term(DiffAdapter(rand(8, 4, seed=9)), 1.0)
    shared = lora(4)
    return [(lora(0),), (lora(1), lora(2)), (whole,), (lora(3), whole), (shared,), (shared, lora(5))]


def test_factors_go_ahead_in_pieces_with_their_bits(monkeypatch):
    # A LoRA of these sizes has 48 bytes, and takes 512.
    monkeypatch.setattr(merge_factors, "PIECE_BYTES", 1100)
    sent = counted(monkeypatch, merge_factors.Ring, "send")
    asked = stacks()
    ahead = FactorsAhead(asked, CPU)
    for terms in asked:
        there = ahead.of(terms)
        assert len(there) == len(terms)
        for one, own in zip(there, terms, strict=True):
            assert (one.strength, one.origin) == (own.strength, own.origin)
            for a, b in zip(one.adapter.tensors(), own.adapter.tensors(), strict=True):
                assert same_bits(a, b)
                goes_alone = isinstance(own.adapter, DiffAdapter)
                assert (a.data_ptr() == b.data_ptr()) == goes_alone
    assert [sum(one.nbytes for one in tensors) for _, tensors in sent] == [48, 96, 96, 96]
    # Another order, one twice, and one that was not announced.
    assert ahead.of(asked[4])[0].adapter is not asked[4][0].adapter
    assert ahead.of(asked[0])[0].adapter is not asked[0][0].adapter
    other = stacks()[0]
    assert ahead.of(other) is other


def test_factors_that_find_no_room_go_by_themselves(monkeypatch):
    def full(self, tensors):
        raise OutOfMemory[0]("CUDA out of memory. Tried to allocate 2.00 MiB")

    asked = stacks()
    ahead = FactorsAhead(asked, CPU)
    monkeypatch.setattr(merge_factors.Ring, "send", full)
    assert all(ahead.of(terms) is terms for terms in asked)


def test_the_factors_of_a_model_on_the_cpu_stay_where_they_are(monkeypatch):
    monkeypatch.undo()
    assert not merge_factors.is_card(CPU)
    assert merge_factors.is_card(torch.device("cuda:0"))
    asked = stacks()
    assert all(FactorsAhead(asked, CPU).of(terms) is terms for terms in asked)
