"""Merged weights come back bit for bit from the checkpoint file, and never with other bits, whatever happens to it.

CPU tensors that count as lying on a card go through the ring; pieces are 256 bytes.
"""

import collections
import os
import weakref

import pytest
import torch
from patching.file_scene import SIZE, Scene, lay_on_card
from safetensors.torch import load_file, save_file
from support.measure import same_bits

from lib_lora_guard.errors import RestoreError
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching import file_backup, file_reader, file_sums
from lib_lora_guard.patching.backup import Where
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.file_backup import WeightFile
from lib_lora_guard.patching.file_reader import FileReader, Piece
from lib_lora_guard.planning.mode import Mode, Wish

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_card(monkeypatch):
    lay_on_card(monkeypatch)


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_change_gives_what_ram_backups_give_and_removal_restores_every_bit(tmp_path, prefix, dtype, caplog):
    caplog.set_level("INFO")
    (tmp_path / "usual").mkdir()
    scene, usual = Scene(tmp_path, prefix, dtype), Scene(tmp_path / "usual", prefix, dtype)
    usual.engine = Engine()
    for strength in (0.7, -0.3, 0.7):
        scene.change(strength)
        usual.change(strength)
        assert (scene.places(), usual.places()) == ({Where.FILE}, {Where.RAM})
        assert all(same_bits(value, usual.values()[name]) for name, value in scene.values().items())
        assert not scene.is_original()
    scene.remove()
    assert scene.is_original()
    assert f"originals of {len(scene.keys)} merged weights" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_card_reads_the_pinned_ring(tmp_path, monkeypatch):
    scene = Scene(tmp_path, device="cuda")
    monkeypatch.setattr(file_backup, "lies_in_ram", lambda tensor: tensor.device.type == "cpu")
    for strength in (0.7, -0.3):
        scene.change(strength)
        assert scene.places() == {Where.FILE}
    reader = next(iter(scene.engine.attached.values())).backup.file._reader
    assert reader._ring.is_pinned
    assert scene.engine.suspend_merges()
    assert all(same_bits(p.data.cpu(), scene.originals[name].cpu()) for name, p in scene.model.named_parameters())
    for parameter in scene.model.parameters():
        parameter.data = parameter.data.cuda()
    scene.change()
    scene.remove()
    assert scene.is_original()


def test_the_file_is_open_only_while_a_weight_is_merged_and_is_compared_once(scene, monkeypatch):
    reads = []
    original = FileReader.read
    monkeypatch.setattr(FileReader, "read", lambda *a: (reads.append(a[1]), original(*a))[1])
    scene.change()
    file = scene.engine.attached[scene.keys[0]].backup.file
    assert (file.is_open, len(reads) > len(scene.keys)) == (True, True)
    scene.remove()
    assert not file.is_open
    del reads[:]
    scene.change()
    assert reads == [], "the checksums of the first comparison are enough"
    assert scene.places() == {Where.FILE}
    assert scene.engine._backups.bytes(Where.FILE) == sum(scene.originals[key].nbytes for key in scene.keys)
    scene.remove()
    assert scene.is_original()
    # The user changes a weight: the file no longer has it.
    own = scene.keys[2]
    parameter = scene.access.site(own).parameter
    parameter.data.view(-1)[7] += 1
    scene.originals[own] = parameter.data.clone()
    scene.change()
    assert scene.engine.attached[own].backup.place.where is Where.RAM
    scene.remove()
    assert scene.is_original()


def test_suspended_merges_come_back_from_the_file(scene, monkeypatch):
    """The model leaves the card: its originals are read into RAM."""
    scene.change()
    merged = scene.values()
    with monkeypatch.context() as patch:
        patch.setattr(file_backup, "lies_in_ram", lambda tensor: True)
        scene.damage(scene.keys[-1], byte=1)
        with pytest.raises(RestoreError, match="reload the checkpoint"):
            scene.engine.suspend_merges()
        scene.damage(scene.keys[-1], byte=1)
        scene.change()
        assert scene.engine.suspend_merges()
    assert scene.is_original()
    scene.change()
    assert all(same_bits(value, merged[name]) for name, value in scene.values().items())
    scene.remove()
    assert scene.is_original()


def test_what_is_not_proven_gets_an_ordinary_backup(scene):
    """One weight differs in one bit from the file, another has its name and shape in another dtype."""
    differs, key_in_file = scene.keys[0], "model." + scene.keys[1]
    scene.damage(differs, byte=2 * SIZE * SIZE - 1)
    tensors = {**load_file(scene.path), key_in_file: scene.tensors[key_in_file].half()}
    save_file(tensors, scene.path)
    scene.change()
    places = {key: one.backup.place.where for key, one in scene.engine.attached.items()}
    assert {key for key, where in places.items() if where is not Where.FILE} == set(scene.keys[:2])
    scene.remove()
    assert scene.is_original()


def test_a_merge_that_is_wished_where_it_is_free_leaves_the_others_to_auto(scene):
    differs = scene.keys[0]
    scene.damage(differs)
    for strength in (0.7, 0.2):
        scene.engine.change(scene.access, scene.stack(strength), Wish.MERGE_FROM_FILE)
        modes = {key: one.mode for key, one in scene.engine.attached.items()}
        assert modes == {key: Mode.BYPASS if key == differs else Mode.MERGE for key in scene.keys}
    scene.remove()
    assert scene.is_original()


def gone(scene, monkeypatch):
    scene.path.unlink()


def garbage(scene, monkeypatch):
    scene.path.write_bytes(b"\x07" * 100)


def pickled(scene, monkeypatch):
    scene.path = scene.path.rename(scene.path.with_suffix(".ckpt"))


def of_another_model(scene, monkeypatch):
    save_file({name: value + 1 for name, value in scene.tensors.items()}, scene.path)


def slow(scene, monkeypatch):
    monkeypatch.setattr(file_backup, "JUDGED_BYTES", 0)
    monkeypatch.setattr(file_backup, "LEAST_BYTES_PER_SECOND", 10**15)


def unreadable(scene, monkeypatch):
    def planted(*args, **more):
        raise OSError("planted")

    monkeypatch.setattr(file_reader, "read_piece", planted)


def without_room(scene, monkeypatch):
    def planted(size_bytes, device):
        raise RuntimeError("planted")

    monkeypatch.setattr(file_reader, "RingMemory", planted)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (gone, ""),
        (garbage, ""),
        (pickled, ""),
        (of_another_model, "have other bytes than the model"),
        (slow, "are needed; a local SSD is faster"),
        (unreadable, "planted"),
        (without_room, "planted"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_cannot_be_used_leaves_the_ordinary_backups(scene, monkeypatch, caplog, plant, said):
    caplog.set_level("INFO")
    monkeypatch.setattr(file_backup, "MOST_DIFFERENT", 2)
    plant(scene, monkeypatch)
    scene.change()
    assert scene.places() == {Where.RAM}
    assert said in caplog.text
    scene.remove()
    assert scene.is_original()


@pytest.mark.parametrize("where", ["changed", "cut"])
def test_a_file_that_changes_under_a_merge_is_never_taken_for_the_original(scene, where):
    """The weight keeps its LoRA, every change says to reload the checkpoint, and the others come back."""
    scene.change()
    merged, lost = scene.values(), scene.keys[1]
    if where == "changed":
        scene.damage(lost, byte=777)
    else:
        start = file_backup.open_header(scene.path).tensors["model." + lost].start
        os.truncate(scene.path, start + 5)
    for _ in range(2):
        with pytest.raises(RestoreError, match=r"no longer has the bytes .* reload the checkpoint"):
            scene.change(0.2)
        assert all(same_bits(value, merged[name]) for name, value in scene.values().items())
    assert not scene.engine.detach_all()
    now = scene.values()
    assert same_bits(now[lost], merged[lost])
    if where == "changed":
        others = [key for key in scene.keys if key != lost]
        assert all(same_bits(now[key], scene.originals[key]) for key in others)


def test_a_deleted_or_replaced_file_still_has_the_originals(scene):
    """Where the system deletes an open file; Windows refuses."""
    scene.change()
    scene.path.unlink()
    scene.path.write_bytes(b"another")
    scene.change(0.2)
    scene.remove()
    assert scene.is_original()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 7, 14])
def test_an_error_in_the_middle_is_undone_and_the_next_change_works(scene, monkeypatch, error, at):
    """A read that fails once is asked for again; an interrupt between two pieces leaves the stack that was there."""
    scene.change()
    merged, original, calls = scene.values(), file_reader.read_piece, []
    place = FileReader._read_ahead if error is KeyboardInterrupt else original

    def planted(*args, **more):
        calls.append(args)
        if len(calls) == at:
            raise error("planted")
        return place(*args, **more)

    with monkeypatch.context() as patch:
        if error is KeyboardInterrupt:
            patch.setattr(FileReader, "_read_ahead", planted)
            with pytest.raises(KeyboardInterrupt):
                scene.change(0.2)
            assert all(same_bits(value, merged[name]) for name, value in scene.values().items())
        else:
            patch.setattr(file_reader, "read_piece", planted)
            scene.change(0.2)
            assert len(calls) > at
    scene.change(-1.0)
    assert scene.places() == {Where.FILE}
    reader = next(iter(scene.engine.attached.values())).backup.file._reader
    assert reader._ring.taken_bytes == sum(piece.bytes for piece, _, _ in reader._under_way), (
        "a part of the ring was lost"
    )
    scene.remove()
    assert scene.is_original()


def test_reading_ahead_gives_the_right_bytes_whatever_is_asked_for_next(tmp_path):
    path, content = tmp_path / "file", bytes(range(256)) * 8
    path.write_bytes(content)
    reader = FileReader(path, None)
    reader.reserve(CPU)
    parts = [[Piece(0, 200)], [Piece(200, 64)], [Piece(500, 1)], [Piece(1000, 1000)]]
    together = [[Piece(700, 30), Piece(3, 7), Piece(1000, 300), Piece(90, 200)], [Piece(0, 1), Piece(9, 1)]]
    for asked in (parts, parts[1:], [parts[0], parts[2]], parts[::-1], together, [together[1], *parts], together[::-1]):
        reader.expect(together if asked[0] in together else parts)
        for group in asked:
            into = torch.zeros(sum(part.bytes for part in group), dtype=torch.uint8)
            reader.read(group, into)
            assert bytes(into.tolist()) == b"".join(content[part.start : part.start + part.bytes] for part in group)
    with pytest.raises(OSError, match="ends 10 bytes early"):
        reader.read([Piece(2040, 18)], torch.zeros(18, dtype=torch.uint8))
    reader.close()
    reader.close()


def test_small_parts_go_to_the_card_together_and_large_ones_in_pieces(monkeypatch):
    monkeypatch.setattr(file_reader, "PIECE_BYTES", 100)
    a, b, c = Piece(500, 30), Piece(0, 60), Piece(90, 220)
    assert file_reader.loads([a, b, c]) == [
        (a, b),
        (Piece(90, 100),),
        (Piece(190, 100),),
        (Piece(290, 20),),
    ]
    few = tuple(Piece(start, 40) for start in (7, 900, 400))
    assert file_reader.loads(few) == [few[:2], few[2:]]
    assert file_reader.loads([]) == []


@pytest.fixture
def large_blocks(monkeypatch):
    """So large that weights of one size are compared at once."""
    monkeypatch.setattr(file_backup, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(file_sums, "BLOCK_BYTES", 1 << 20)


def test_weights_of_one_size_are_compared_at_once(tmp_path, monkeypatch, large_blocks):
    """Three weights of a size that differ in one bit, at different places: each is told from its neighbours."""
    groups, original = [], WeightFile._compare
    monkeypatch.setattr(
        WeightFile, "_compare", lambda self, group: (groups.append(len(group)), original(self, group))[1]
    )
    scene = Scene(tmp_path, depth=5)
    sizes = collections.Counter(scene.originals[key].nbytes for key in scene.keys)
    assert max(sizes.values()) >= 4
    alike = [key for key in scene.keys if scene.originals[key].nbytes == max(sizes, key=sizes.get)]
    scene.damage(alike[1], byte=0)
    scene.damage(alike[-1], byte=scene.originals[alike[-1]].nbytes - 1)
    scene.change()
    places = {one.site.key: one.backup.place.where for one in scene.engine.attached.values()}
    assert {key for key, where in places.items() if where is not Where.FILE} == {alike[1], alike[-1]}
    assert sum(groups) == len(scene.keys)
    assert len(groups) < len(scene.keys)
    # Alone, each has the checksums that it has in its group.
    file = scene.engine.attached[alike[0]].backup.file
    for key in set(scene.keys) - {alike[1], alike[-1]}:
        region = scene.engine.attached[key].backup.region
        flat = file_backup.bytes_of(torch.nn.Parameter(scene.originals[key].contiguous(), requires_grad=False))
        assert torch.equal(region.sums, file._checksums_there(flat))
    scene.remove()
    assert scene.is_original()


def test_weights_of_one_kind_that_differ_do_not_make_the_file_another_one(tmp_path, monkeypatch, large_blocks):
    """Something has changed all weights of one size: the smallest, of which many would be compared first."""
    monkeypatch.setattr(file_backup, "MOST_DIFFERENT", 2)
    scene = Scene(tmp_path, depth=5)
    smallest = min(scene.originals[key].nbytes for key in scene.keys)
    changed = {key for key in scene.keys if scene.originals[key].nbytes == smallest}
    assert len(changed) == 5
    for key in changed:
        scene.damage(key)
    scene.change()
    places = {key: one.backup.place.where for key, one in scene.engine.attached.items()}
    assert {key for key, where in places.items() if where is not Where.FILE} == changed
    scene.remove()
    assert scene.is_original()


def test_where_memory_ends_weights_are_compared_one_by_one(tmp_path, monkeypatch, large_blocks):
    """There is room for the sums of each weight, and for none of those of several large ones: no copy is made of any."""
    scene, original, asked = Scene(tmp_path, depth=5), file_backup.checksums, []
    most = max(scene.originals[key].nbytes for key in scene.keys)

    def planted(flat, factors):
        asked.append(flat.numel())
        if flat.numel() > most:
            raise OutOfMemory[0]("CUDA out of memory. Tried to allocate 64.00 MiB")
        return original(flat, factors)

    monkeypatch.setattr(file_backup, "checksums", planted)
    for _ in range(2):  # the second one knows the file's checksums
        scene.change()
        assert max(asked) > most
        assert scene.places() == {Where.FILE}
        scene.remove()
        assert scene.is_original()
        asked.clear()


def test_what_was_read_of_a_group_is_freed_before_its_sums_take_memory(tmp_path, monkeypatch, large_blocks):
    """So a group takes no more of the card than a weight of its size."""
    read, alive = [], []
    original_read, original_sums = FileReader.read, file_backup.checksums

    def noted(self, parts, into):
        read[:] = [weakref.ref(into)] if len(parts) > 1 else []
        original_read(self, parts, into)

    def planted(flat, factors):
        alive.extend(one() is not None for one in read)
        return original_sums(flat, factors)

    monkeypatch.setattr(FileReader, "read", noted)
    monkeypatch.setattr(file_backup, "checksums", planted)
    Scene(tmp_path, depth=5).change()
    assert alive
    assert not any(alive)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([64, 128, 64, 64], [[0, 2, 3], [1]]),
        ([128, 64, 128, 64, 768, 128], [[0, 2, 5], [1, 3], [4]]),  # in the order of the file, as far as it can be
        ([384] * 3, [[0, 1], [2]]),  # 768 of the 1000 bytes of a block
        ([63, 63], [[0], [1]]),  # a rest behind the last word
        ([8 * 33, 8 * 33], [[0], [1]]),  # a rest behind the last row
        ([0, 0], [[0], [1]]),
        ([4096, 4096], [[0], [1]]),  # larger than a block
    ],
)
def test_tensors_are_summed_together_where_no_row_crosses_from_one_to_the_next(sizes, groups, monkeypatch):
    monkeypatch.setattr(file_sums, "ROW_WORDS", 32)
    monkeypatch.setattr(file_sums, "SHORTEST_SHARE", 8)
    assert file_sums.alike(sizes, 1000) == groups
    assert file_sums.alike(sizes, 0) == [[place] for place in range(len(sizes))]


@pytest.mark.parametrize("size", [96, 24, 40, 1000, 4097])
def test_checksums_of_the_pieces_are_those_of_the_whole(size, monkeypatch):
    """The card sums a weight at once, the threads that read it into RAM a piece each."""
    monkeypatch.setattr(file_sums, "SHORTEST_SHARE", 2)
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    factors = file_sums.factors_on(CPU)[: file_sums.row_words(size)]
    parts = [raw[piece.start : piece.start + piece.bytes] for piece in file_reader.pieces(Piece(0, size))]
    apart = torch.cat([file_sums.checksums(part, factors) for part in parts])
    assert torch.equal(apart, file_sums._of_block(raw, factors))


def test_checksums_see_every_word_and_every_exchange():
    raw = torch.randint(0, 256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    factors = file_sums.factors_on(CPU)

    def sums(flat):
        return file_sums.checksums(flat, factors).tolist()

    right = sums(raw)
    assert len(right) == 32
    assert sums(torch.cat([raw, raw])[1000:]) == right
    seen = {tuple(right)}
    for byte in range(0, 1000, 7):
        other = raw.clone()
        other[byte] ^= 0x80
        # The same bit of the word after it too: simple sums lose both.
        twice = other.clone()
        twice[(byte + 8) % 1000] ^= 0x80
        exchanged = raw.clone()
        exchanged[byte // 8 * 8 : byte // 8 * 8 + 8] = raw[:8]
        exchanged[:8] = raw[byte // 8 * 8 : byte // 8 * 8 + 8]
        seen |= {tuple(sums(one)) for one in (other, twice, *([exchanged] if byte > 7 else []))}
    # Some of these bytes lie in the same word, which trades places once.
    assert len(seen) == 1 + 143 + 143 + 124
