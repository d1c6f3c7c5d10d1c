"""A file that changes while it is read is read again, and only then."""

import os
import time

import pytest
import torch
from safetensors.torch import save_file

from lib_lora_guard import LoraGuard
from lib_lora_guard.adapters import files as lora_files
from lib_lora_guard.adapters.files import read_lora_file
from lib_lora_guard.errors import FileFormatError, LoraFileError
from lib_lora_guard.files import header as headers
from lib_lora_guard.files import open_header, read_tensors, read_unchanged


def write(path, value, rank=2):
    save_file(
        {"lin.lora_up.weight": torch.full((8, rank), value), "lin.lora_down.weight": torch.full((rank, 8), value)}, path
    )


def old(path, seconds=10.0):
    """Sets the time of the last write back: to the same time for each file."""
    os.utime(path, (1e9 - seconds, 1e9 - seconds))


def values_of(file):
    return {
        float(value) for adapter in file.adapters.values() for tensor in adapter.tensors() for value in tensor.flatten()
    }


@pytest.fixture
def between(monkeypatch):
    """Calls each function of a list after a header was read, before the values are."""
    todo, opened, count = [], lora_files.open_lora, []

    def then(path):
        header = opened(path)
        count.append(path)
        if todo:
            todo.pop(0)()
        return header

    monkeypatch.setattr(lora_files, "open_lora", then)
    return todo, count


def test_a_file_that_does_not_change_is_read_once(tmp_path, between):
    write(tmp_path / "a.safetensors", 1.0)
    read_lora_file(tmp_path / "a.safetensors")
    assert len(between[1]) == 1


def test_another_file_of_the_same_size_and_time_is_seen(tmp_path, between):
    """Its inode and the time of its last change are others; the header alone would name its values by the old names."""
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(path, 1.0)
    write(other, 2.0)
    assert path.stat().st_size == other.stat().st_size
    old(path)
    old(other)
    between[0].append(lambda: other.replace(path))
    assert values_of(read_lora_file(path)) == {2.0}
    assert len(between[1]) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no time of the last change")
def test_an_overwritten_file_whose_time_is_set_back_is_seen(tmp_path, between):
    path = tmp_path / "a.safetensors"
    write(path, 1.0)
    old(path)
    time.sleep(0.03)

    def overwrite():
        raw = path.read_bytes()
        with path.open("r+b") as file:
            file.seek(len(raw) - 64)
            file.write(torch.full((16,), 2.0).numpy().tobytes())
        old(path)

    between[0].append(overwrite)
    assert values_of(read_lora_file(path)) == {1.0, 2.0}, "what lies there now, read whole"
    assert len(between[1]) == 2


def test_a_file_that_grows_meanwhile_is_read_again(tmp_path, between):
    path = tmp_path / "a.safetensors"
    write(path, 1.0)
    between[0].append(lambda: write(path, 3.0, rank=8))
    file = read_lora_file(path)
    assert values_of(file) == {3.0}
    assert file.adapters["lin", "weight"].rank == 8


def test_a_file_that_changes_each_time_is_refused_after_a_few_tries(tmp_path, between):
    path = tmp_path / "a.safetensors"
    write(path, 1.0)
    between[0].extend((lambda n=n: write(path, 2.0, rank=3 + n)) for n in range(20))
    with pytest.raises(
        LoraFileError, match=r"^a\.safetensors: it was written to each of the 4 times it was read; wait"
    ):
        read_lora_file(path)
    assert len(between[1]) == 4


def test_a_half_written_file_is_read_when_it_is_whole(tmp_path, monkeypatch):
    path, whole = tmp_path / "a.safetensors", tmp_path / "whole.safetensors"
    write(whole, 1.0)
    path.write_bytes(whole.read_bytes()[:100])
    container_of = lora_files.container_of

    def later(asked):
        found = container_of(asked)
        path.write_bytes(whole.read_bytes())
        monkeypatch.setattr(lora_files, "container_of", container_of)
        raise FileFormatError(f"half a file, {found}")

    monkeypatch.setattr(lora_files, "container_of", later)
    assert values_of(read_lora_file(path)) == {1.0}


def test_a_damaged_file_that_does_not_change_is_refused_at_once(tmp_path):
    path, calls = tmp_path / "a.safetensors", []
    path.write_bytes(b"\x08" + bytes(7) + b"{nothing")

    def read():
        calls.append(0)
        return open_header(path)

    with pytest.raises(FileFormatError, match="expected"):
        read_unchanged(path, read)
    assert len(calls) == 1


def test_a_file_written_a_moment_ago_is_read_after_the_clocks_step(tmp_path, monkeypatch):
    """Two writes within a step leave the same time: the second would not be seen."""
    path, slept = tmp_path / "a.safetensors", []
    write(path, 1.0)
    monkeypatch.setattr(headers.time, "time_ns", lambda: path.stat().st_mtime_ns + 2_000_000)
    monkeypatch.setattr(headers.time, "sleep", slept.append)
    read_lora_file(path)
    assert slept == [pytest.approx(0.014)]
    slept.clear()
    for age in (headers.CLOCK_STEP_NS, -1_000_000):  # long ago, and by a clock that is ahead of ours
        monkeypatch.setattr(headers.time, "time_ns", lambda age=age: path.stat().st_ctime_ns + age)
        read_lora_file(path)
    assert slept == []


def test_values_are_not_read_by_the_header_of_another_file(tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(path, 1.0)
    write(other, 2.0)
    old(path)
    old(other)
    header = open_header(path)
    other.replace(path)
    with pytest.raises(FileFormatError, match="was written to since its header was read"):
        read_tensors(header)


def test_the_guard_sees_a_file_that_was_replaced_with_its_size_and_time_kept(tmp_path):
    model = torch.nn.Sequential()
    model.lin = torch.nn.Linear(8, 8, bias=False)
    model.lin.weight.data.zero_()
    model.requires_grad_(False)
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(path, 1.0)
    write(other, 2.0)
    old(path)
    old(other)
    guard = LoraGuard(model)
    x = torch.ones(1, 8)
    guard.apply([(path, 1.0)])
    assert torch.equal(model.lin(x), torch.full((1, 8), 16.0))
    other.replace(path)
    guard.apply([(path, 1.0)])
    assert torch.equal(model.lin(x), torch.full((1, 8), 64.0))
