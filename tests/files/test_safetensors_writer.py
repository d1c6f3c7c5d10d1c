import errno
import functools
import io
import os
import shutil
import weakref
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from support import warm

from lib_lora_guard.errors import FileFormatError
from lib_lora_guard.files import Entry, open_header, read_tensors, safetensors_writer, write_safetensors
from lib_lora_guard.files.safetensors_file import FORMATS
from lib_lora_guard.files.safetensors_writer import format_of

RAW = torch.arange(48, dtype=torch.uint8) * 5 + 3
DTYPES = {form: getattr(torch, name) for form, (_, name) in FORMATS.items() if name and hasattr(torch, name)}
UNREADABLE = FileFormatError("expected a file that could be read")


def entries_of(tensors):
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def same(left, right):
    """Bit for bit, whatever the dtype."""
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else torch.empty(0) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


@functools.cache
def is_known_to_the_library(dtype):
    """Old versions lack complex numbers and some of the fp8 types."""
    try:
        load(save({"a": RAW.view(dtype)}))
    except (KeyError, ValueError, SafetensorError):
        return False
    return True


def check(path, tensors):
    """By the library and by our own reader."""
    header = open_header(path)
    ours = read_tensors(header)
    assert ours.keys() == tensors.keys()
    assert all(same(ours[name], tensors[name]) for name in tensors)
    if all(is_known_to_the_library(t.dtype) for t in tensors.values()):
        theirs = load_file(path)
        assert all(same(theirs[name], tensors[name]) for name in tensors)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert all(e.start % (t.element_size() or 1) == 0 for e, t in ((header.tensors[n], tensors[n]) for n in tensors))


@pytest.mark.parametrize("form", sorted(DTYPES))
def test_every_dtype(form, tmp_path):
    whole = (RAW % 2 if form == "BOOL" else RAW).view(DTYPES[form])
    tensors = {"flat": whole, "matrix": whole.reshape(2, -1), "none": whole[:0], "wide none": whole[:0].reshape(0, 4)}
    if form != "F4":  # two values share a byte
        tensors["lone"] = whole[1]
    write_safetensors(tmp_path / "a.safetensors", entries_of(tensors))
    check(tmp_path / "a.safetensors", tensors)
    assert format_of(DTYPES[form]) == form
    assert {e.format for e in open_header(tmp_path / "a.safetensors").tensors.values()} == {form}


def test_the_library_has_read_the_dtypes_that_models_come_in():
    assert all(map(is_known_to_the_library, (*MIXED, torch.float8_e5m2, torch.float64)))


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^a: safetensors has no name for torch.complex128$"):
        write_safetensors(tmp_path / "a.safetensors", entries_of({"a": torch.zeros(2, dtype=torch.complex128)}))
    assert list(tmp_path.iterdir()) == []


MIXED = [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.int64]


@settings(deadline=None, max_examples=40)  # a file is synced to the disk for each
@given(st.lists(st.tuples(st.sampled_from(MIXED), st.lists(st.integers(0, 5), max_size=4)), max_size=6))
def test_any_mixture_lies_where_its_dtype_may_lie(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("mixed") / "a.safetensors"
    tensors = {f"t{n}": torch.arange(0, 625)[: int(torch.Size(s).numel())].reshape(s).to(d) for n, (d, s) in enumerate(kinds)}  # fmt: skip
    write_safetensors(path, entries_of(tensors), {"a": "b"})
    check(path, tensors)


def test_metadata_is_kept_as_it_is(tmp_path):
    metadata = {"名字": '模型 " \\ \n\t\x00', "empty": "", "emoji": "🦊"}
    write_safetensors(tmp_path / "a.safetensors", entries_of({"键": torch.ones(3)}), metadata)
    assert open_header(tmp_path / "a.safetensors").metadata == metadata
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert list(file.keys()) == ["键"]


def test_a_file_without_tensors_is_written(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", [])
    assert load_file(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize("slice_bytes", [1, 7, 100, 1 << 20])
def test_tensors_that_do_not_lie_in_one_piece(slice_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "SLICE_BYTES", slice_bytes)
    base = torch.arange(120.0).reshape(4, 5, 6)
    tensors = {
        "turned": base.permute(2, 0, 1),
        "every second": base[:, ::2],
        "from the middle": base[1:, 2:],
        "repeated": torch.arange(3.0).expand(7, 3),
        "plain": base.bfloat16(),
        "conjugate": torch.complex(base, -base).conj(),
        "negative": torch.complex(base, -base).conj().imag,
    }
    write_safetensors(tmp_path / "a.safetensors", entries_of(tensors))
    check(tmp_path / "a.safetensors", {name: t.resolve_conj().resolve_neg() for name, t in tensors.items()})


def test_tensors_are_loaded_one_at_a_time_and_progress_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "SLICE_BYTES", 64)
    loaded, told = [], []

    def load():
        assert all(earlier() is None for earlier in loaded)
        tensor = torch.zeros(50)
        loaded.append(weakref.ref(tensor))
        return tensor

    entries = [Entry(f"t{n}", torch.float32, (50,), load) for n in range(4)]
    write_safetensors(tmp_path / "a.safetensors", entries, progress=lambda done, total: told.append((done, total)))
    assert len(loaded) == 4
    assert told == [(200 * n + part, 800) for n in range(4) for part in (64, 128, 192, 200)]


def test_peak_memory_is_one_tensor(tmp_path):
    """In a process of its own: 12 tensors of 16 MB, one of them turned, 192 MB in all."""
    code = """
import ctypes, sys, psutil, torch
from pathlib import Path
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    # M_MMAP_THRESHOLD. Else the allocator keeps what tensors before have given back, now two of them and now six.
    ctypes.CDLL(None).mallopt(-3, 1 << 20)
from lib_lora_guard.files import Entry, write_safetensors
def load(n):
    t = torch.full((2048, 2048), float(n))
    return t.t() if n == 3 else t
def entries(count):
    return [Entry(str(n), torch.float32, (2048, 2048), lambda n=n: load(n)) for n in range(count)]
write_safetensors(Path(sys.argv[1]), entries(1))
start, peak, process = psutil.Process().memory_info().rss, 0, psutil.Process()
def progress(done, total):
    global peak
    peak = max(peak, process.memory_info().rss)
write_safetensors(Path(sys.argv[1]), entries(12), progress=progress)
print((peak - start) / 2**20)
"""
    found = warm.run(code, tmp_path / "a.safetensors")
    assert found.returncode == 0, found.stderr
    # Measured 33 MB, with 40 tensors too: a tensor and its copy.
    assert float(found.stdout) < 64
    assert torch.equal(load_file(tmp_path / "a.safetensors")["3"], torch.full((2048, 2048), 3.0))


def failing(error):
    def load():
        raise error

    return [Entry("good", torch.float32, (4,), lambda: torch.ones(4)), Entry("bad", torch.float16, (4,), load)]


@pytest.mark.parametrize("error", [UNREADABLE, KeyboardInterrupt(), MemoryError("full")])
def test_a_failure_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_safetensors(path, failing(error))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("loaded", "found"),
    [(torch.ones(5), r"torch.float32 \[5\]"), (torch.ones(4).half(), r"torch.float16 \[4\]"), (torch.ones(1, 4), r"torch.float32 \[1, 4\]")],
)  # fmt: skip
def test_a_tensor_that_differs_from_its_announcement_is_refused(loaded, found, tmp_path):
    entry = Entry("a", torch.float32, (4,), lambda: loaded)
    with pytest.raises(ValueError, match=rf"^a: expected torch.float32 \[4\] as announced, found {found}$"):
        write_safetensors(tmp_path / "a.safetensors", [entry])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [("a", "a"), ("__metadata__",)])
def test_names_that_a_header_cannot_have(names, tmp_path):
    entries = [Entry(name, torch.float32, (1,), lambda: torch.ones(1)) for name in names]
    with pytest.raises(ValueError, match="expected each name once, and none called __metadata__"):
        write_safetensors(tmp_path / "a.safetensors", entries)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1 << 40, 1 << 40, 3 << 30))
    entry = Entry("a", torch.float32, (1 << 30,), lambda: pytest.fail("nothing is to be loaded"))
    with pytest.raises(OSError, match=r"^a\.safetensors: needs 4\.00 GB on the disk, 3\.00 GB are free; make room"):
        write_safetensors(tmp_path / "a.safetensors", [entry])
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="missing: no such folder; make it first"):
        write_safetensors(tmp_path / "missing" / "a.safetensors", [])
    with pytest.raises(OSError, match="is a folder; give the name of a file in it"):
        write_safetensors(tmp_path, [])


def test_a_file_that_is_in_use_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def replace(self, target):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(type(path), "replace", replace)
    with pytest.raises(OSError, match=r"^a\.safetensors: cannot be replaced \(Access is denied\); close the program"):
        write_safetensors(path, entries_of({"a": torch.ones(1)}))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_replaces_a_longer_file(tmp_path):
    path = tmp_path / ("long name " * 20 + ".safetensors")
    for tensors in ({"a": torch.ones(1000)}, {"b": torch.zeros(3)}):
        write_safetensors(path, entries_of(tensors))
        check(path, tensors)
    assert list(tmp_path.iterdir()) == [path]


def appearing(path, content=b"of another program"):
    """A tensor during whose loading a file appears at `path`."""

    def load():
        path.write_bytes(content)
        return torch.ones(4)

    return [Entry("a", torch.float32, (4,), load)]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_appears_meanwhile_stays(tmp_path, monkeypatch, has_links):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "a.safetensors"
    with pytest.raises(OSError, match=r"^a\.safetensors: another program has made a file of this name meanwhile"):
        write_safetensors(path, appearing(path), replaces=False)
    assert path.read_bytes() == b"of another program"
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    write_safetensors(path, entries_of({"a": torch.ones(3)}), replaces=False)
    check(path, {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == [path]
    write_safetensors(path, appearing(path))
    check(path, {"a": torch.ones(4)})


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (
            errno.ENOSPC,
            r"^a\.safetensors: needs 8\.00 MB on the disk, 5\.00 MB are free; make room, or choose another disk$",
        ),
        (errno.EFBIG, r"^a\.safetensors: needs 8\.00 MB, more than this disk takes in one file \(FAT32: 4 GB\)"),
        (errno.EIO, r"^a\.safetensors: cannot be written \(Input/output error\); check the disk$"),
    ],
)
@pytest.mark.parametrize("when", ["writing", "syncing"])
def test_a_disk_that_ends_while_it_is_written_is_named_with_what_was_needed(tmp_path, monkeypatch, number, said, when):
    usage, free = namedtuple("Usage", "total used free"), [9 << 20, 5 << 20]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1 << 30, 0, free.pop(0)))

    class Full(io.FileIO):
        def write(self, data):
            if len(data) < 1 << 20:
                return super().write(data)
            raise OSError(number, os.strerror(number))

    def failing(descriptor):
        raise OSError(number, os.strerror(number))

    if when == "writing":
        monkeypatch.setattr(type(tmp_path), "open", lambda self, mode, buffering: Full(self, mode[:1]))
    else:
        monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=said):
        write_safetensors(tmp_path / "a.safetensors", entries_of({"a": torch.ones(2 << 20)}))
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_tensor_itself_is_no_full_disk(tmp_path):
    with pytest.raises(OSError, match="of the model"):
        write_safetensors(tmp_path / "a.safetensors", failing(OSError(errno.ENOSPC, "of the model")))
