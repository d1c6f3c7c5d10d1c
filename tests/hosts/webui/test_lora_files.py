"""LoRA files that are kept in RAM: which stay, and how many bytes are given back. (What they do to models: tests/contract.)"""

import os
import threading
from dataclasses import replace

import pytest
import torch
from contract.lora_files import MODULES, load
from support.make import write_kohya

from lib_lora_guard.adapters import files as lora_reading
from lib_lora_guard.errors import LoraFileError
from lib_lora_guard.files import reading
from lib_lora_guard.hosts.webui import lora_files
from lib_lora_guard.hosts.webui.lora_files import LazyState, LoraFiles
from lib_lora_guard.runtime.file_sheet import sheet_of


def read(files, path):
    return files._read(str(path), LazyState(str(path), dict))


def test_dropping_what_is_unused_keeps_the_present_stack_and_counts_the_rest(tmp_path):
    sizes = {}
    for name in "abc":
        write_kohya(tmp_path / f"{name}.safetensors", MODULES)
        sizes[name] = (tmp_path / f"{name}.safetensors").stat().st_size
    files = LoraFiles()
    kept = read(files, tmp_path / "a.safetensors")
    read(files, tmp_path / "b.safetensors")
    files._last_stack, files._in_stack = files._in_stack, set()
    read(files, tmp_path / "a.safetensors")
    read(files, tmp_path / "c.safetensors")
    assert files.bytes == sum(sizes.values())
    assert files.drop_unused() == sizes["b"]
    assert files.bytes == sizes["a"] + sizes["c"]
    assert read(files, tmp_path / "a.safetensors") is kept, "of the present stack"
    assert files.drop_unused() == 0


def test_a_file_larger_than_memory_is_refused_once_unused_files_are_gone(tmp_path, monkeypatch):
    for name in "ab":
        write_kohya(tmp_path / f"{name}.safetensors", MODULES)
    files, rooms = LoraFiles(), [10, 20]
    read(files, tmp_path / "a.safetensors")
    files._in_stack = set()
    monkeypatch.setattr(lora_reading, "UNCOUNTED_BYTES", 0)
    monkeypatch.setattr(lora_files, "room_now_bytes", lambda needed: rooms.pop(0))
    with pytest.raises(
        LoraFileError, match=r"^b\.safetensors: its tensors take \d+ MB of RAM and 0 MB are left; close"
    ):
        read(files, tmp_path / "b.safetensors")
    assert (files.bytes, rooms) == (0, [])
    rooms[:] = [1 << 30]
    read(files, tmp_path / "a.safetensors")
    files._in_stack = set()
    rooms[:] = [10, 1 << 30]
    read(files, tmp_path / "b.safetensors")
    assert files.bytes == (tmp_path / "b.safetensors").stat().st_size, "there is room once the other is gone"


def test_a_file_is_read_again_where_another_of_its_size_and_time_lies_in_its_place(tmp_path):
    for name in "ab":
        write_kohya(tmp_path / f"{name}.safetensors", MODULES)
        os.utime(tmp_path / f"{name}.safetensors", (1e9, 1e9))
    files = LoraFiles()
    first = read(files, tmp_path / "a.safetensors")
    assert read(files, tmp_path / "a.safetensors") is first
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    assert read(files, tmp_path / "a.safetensors") is not first


def test_the_sheets_are_of_the_present_stack_and_made_once(tmp_path, monkeypatch):
    for name in "ab":
        write_kohya(tmp_path / f"{name}.safetensors", MODULES, rank=4)
    files, made = LoraFiles(), []
    monkeypatch.setattr(lora_files, "sheet_of", lambda file: made.append(file) or sheet_of(file))
    read(files, tmp_path / "a.safetensors")
    (sheet,) = files.sheets().values()
    assert (sheet.ranks, sheet.kinds, sheet.share_left_out) == ((4,), ("LoRA",), None)
    assert sheet.mb == sum(adapter.bytes for adapter in made[0].adapters.values()) / 1024**2
    read(files, tmp_path / "b.safetensors")
    assert set(files.sheets()) == {"a.safetensors", "b.safetensors"}
    assert len(made) == 2
    files._last_stack, files._in_stack = files._in_stack, set()
    assert files.sheets() == {}


def test_what_was_computed_while_the_last_values_came_is_computed_again(tmp_path, monkeypatch):
    """As where a file has the halves of a layer the other way round: these are copies, made before all values are there."""
    write_kohya(tmp_path / "a.safetensors", MODULES)
    for module in (lora_reading, reading):
        monkeypatch.setattr(module, "LARGE_FILE_BYTES", 1)
    gate, read_piece, match = threading.Event(), reading.ComingInOnePiece._read_piece, lora_files._match
    monkeypatch.setattr(reading.ComingInOnePiece, "_read_piece", lambda *args: gate.wait(10) and read_piece(*args))

    def slow_match(file, target):
        fit = match(file, target)
        for terms in fit.terms.values():
            terms[:] = [replace(term, adapter=term.adapter.map(torch.clone)) for term in terms]
        gate.set()
        file.wait()
        return fit

    monkeypatch.setattr(lora_files, "_match", slow_match)
    model = torch.nn.Module()
    layers = {"qkv": torch.nn.Linear(32, 96), "proj": torch.nn.Linear(32, 32)}
    model.blocks = torch.nn.ModuleList([torch.nn.ModuleDict(layers)])
    files = LoraFiles()
    file = files._read(str(tmp_path / "a.safetensors"), LazyState(str(tmp_path / "a.safetensors"), dict))
    assert not file.coming.is_done
    found = files._match(file, model).terms
    wanted = {f"blocks.0.{name.rpartition('_')[2]}.weight": one for (name, _), one in file.adapters.items()}
    assert found.keys() == wanted.keys()
    for key, (term,) in found.items():
        assert all(map(torch.equal, term.adapter.tensors(), wanted[key].tensors()))


@pytest.fixture
def two_files(tmp_path):
    for name in "ab":
        write_kohya(tmp_path / f"{name}.safetensors", MODULES)
    return [tmp_path / f"{name}.safetensors" for name in "ab"]


class NotingPatcher:
    """A patcher like Forge's."""

    def __init__(self, model, lora_patches=()):
        self.model, self.lora_patches = model, dict(lora_patches)

    def clone(self):
        return NotingPatcher(self.model, self.lora_patches)

    def add_patches(self, *, filename, patches, strength_patch, online_mode):
        self.lora_patches[filename, strength_patch] = patches


def model_of_two_layers(columns=32):
    model = torch.nn.Module()
    layers = {"qkv": torch.nn.Linear(columns, 96), "proj": torch.nn.Linear(columns, 32)}
    model.blocks = torch.nn.ModuleList([torch.nn.ModuleDict(layers)])
    return model


def test_a_stack_looks_at_the_model_once_and_the_next_one_anew(two_files):
    files, looks = LoraFiles(unpatched_shapes=lambda model: looks.append(model) or {}), []
    model = model_of_two_layers()

    def stack():
        patcher = NotingPatcher(model)
        with files.announced_stack({}, is_empty=False):
            for path in two_files:
                patcher, _ = load(files, patcher, path)
        return patcher

    assert len(stack().lora_patches) == 2
    assert looks == [model]
    model.blocks[0] = model_of_two_layers(columns=40).blocks[0]
    assert stack().lora_patches == {}, "the model has other sizes by now"
    assert looks == [model, model]
    assert set(files.left_out) == {"a.safetensors", "b.safetensors"}
    load(files, NotingPatcher(model), two_files[0])
    load(files, NotingPatcher(model), two_files[0])
    assert len(looks) == 4, "outside a stack nothing is taken for the same"


def test_patches_are_written_once_for_a_file_and_a_model_and_are_the_hosts_to_change(two_files):
    files, model, path = LoraFiles(), model_of_two_layers(), two_files[0]

    def patches(model):
        (found,) = load(files, NotingPatcher(model), path)[0].lora_patches.values()
        return found

    first = patches(model)
    again = patches(model)
    assert first.keys() == again.keys() == {"blocks.0.qkv.weight", "blocks.0.proj.weight"}
    assert all(first[key] is again[key] for key in first)
    first.clear()
    assert patches(model) == again
    assert not any(one is again[key] for key, one in patches(model_of_two_layers()).items()), "another model's"
    os.utime(path, (1e9, 1e9))
    read_anew = patches(model)
    assert read_anew.keys() == again.keys()
    assert not any(read_anew[key] is again[key] for key in again), "another file"
