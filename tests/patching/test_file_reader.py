"""A file is read ahead by threads, and the card gets at once what is there and lies together."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.patching import file_reader
from lib_lora_guard.patching.file_reader import FileReader, Piece
from lib_lora_guard.patching.ring_memory import RingMemory

CPU = torch.device("cpu")
CONTENT = bytes(range(251)) * 9


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(file_reader, "PIECE_BYTES", 40)
    monkeypatch.setattr(file_reader, "RING_BYTES", 200)
    monkeypatch.setattr(file_reader, "COPY_BYTES", 120)


@pytest.fixture
def reader(tmp_path, small):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    reader = FileReader(path, None)
    reader.reserve(CPU)
    yield reader
    reader.close()


def read(reader, parts):
    into = torch.zeros(sum(part.bytes for part in parts), dtype=torch.uint8)
    reader.read(parts, into)
    return bytes(into.tolist())


def content(parts):
    return b"".join(CONTENT[part.start : part.start + part.bytes] for part in parts)


def until_all_are_there(reader):
    end = time.monotonic() + 10
    while not all(task.is_done for _, _, task in reader._under_way):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_what_is_there_goes_to_the_card_in_one_copy(reader, monkeypatch):
    copies, give = [], RingMemory.give
    monkeypatch.setattr(RingMemory, "give", lambda *given: (copies.append(given[1].memory.numel()), give(*given)))
    parts = [Piece(7, 200)]
    reader.expect([parts])
    until_all_are_there(reader)
    # Three pieces of 40 bytes are all that one copy may have.
    assert read(reader, parts) == content(parts)
    assert copies == [120, 80]


def test_what_is_not_there_yet_is_not_waited_for(reader, monkeypatch):
    copies, give = [], RingMemory.give
    monkeypatch.setattr(RingMemory, "give", lambda *given: (copies.append(given[1].memory.numel()), give(*given)))
    monkeypatch.setattr(file_reader.Task, "is_done", property(lambda task: False))
    assert read(reader, [Piece(7, 200)]) == content([Piece(7, 200)])
    assert copies == [40] * 5


def test_what_lies_at_the_other_end_of_the_ring_is_a_copy_of_its_own(reader):
    # 160 of 200 bytes, then 40 at the end and the rest at the beginning.
    for parts in ([Piece(0, 160)], [Piece(300, 120)], [Piece(500, 200)]):
        reader.expect([parts])
        until_all_are_there(reader)
        assert read(reader, parts) == content(parts)


def test_an_error_behind_what_is_there_ends_the_read_and_the_next_one_works(reader, monkeypatch):
    bad, read_piece = Piece(47, 40), file_reader.read_piece

    def failing(file, piece, into):
        if piece == bad:
            raise OSError("the disk is gone")
        read_piece(file, piece, into)

    monkeypatch.setattr(file_reader, "read_piece", failing)
    parts = [Piece(7, 200)]
    reader.expect([parts])
    until_all_are_there(reader)
    with pytest.raises(OSError, match="the disk is gone"):
        read(reader, parts)
    monkeypatch.setattr(file_reader, "read_piece", read_piece)
    assert read(reader, parts) == content(parts)
    assert reader._ring.taken_bytes == 0


pieces = st.builds(Piece, st.integers(0, 2000), st.integers(1, 250))


@settings(max_examples=80, deadline=None)
@given(groups=st.lists(st.lists(pieces, min_size=1, max_size=4), min_size=1, max_size=5), data=st.data())
def test_any_parts_in_any_order_have_the_bytes_of_the_file(tmp_path_factory, groups, data):
    patch = pytest.MonkeyPatch()
    with patch.context() as small:
        for name in ("PIECE_BYTES", "RING_BYTES", "COPY_BYTES"):
            least = {"PIECE_BYTES": 10, "RING_BYTES": 120, "COPY_BYTES": 1}[name]
            small.setattr(file_reader, name, data.draw(st.integers(least, least + 200)))
        small.setattr(file_reader, "RING_BYTES", max(file_reader.RING_BYTES, file_reader.PIECE_BYTES))
        path = tmp_path_factory.mktemp("reader") / "file"
        path.write_bytes(CONTENT)
        reader = FileReader(path, None)
        try:
            reader.reserve(CPU)
            reader.expect(groups)
            asked = groups if data.draw(st.booleans()) else data.draw(st.permutations(groups))
            for group in asked:
                assert read(reader, group) == content(group)
        finally:
            reader.close()
