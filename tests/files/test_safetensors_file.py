import json
import os
import struct
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from support.machine_speed import CpuTime
from support.raw_files import entry, safetensors_bytes

from lib_lora_guard.errors import FileFormatError
from lib_lora_guard.files import FileHeader, TensorEntry, open_header, read_tensors, reading
from lib_lora_guard.files.header import MAX_HEADER_BYTES, shown
from lib_lora_guard.files.safetensors_file import FORMATS

RAW = torch.arange(48, dtype=torch.uint8) * 5 + 3
DTYPES = {form: getattr(torch, name) for form, (_, name) in FORMATS.items() if name and hasattr(torch, name)}


def raw_of(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def same(left, right):
    return (
        left.dtype == right.dtype and left.shape == right.shape and (not left.numel() or raw_of(left) == raw_of(right))
    )


@pytest.mark.parametrize("form", sorted(DTYPES))
def test_every_dtype_reads_as_the_library_reads_it(form, tmp_path):
    dtype, path = DTYPES[form], tmp_path / "a.safetensors"
    whole = (RAW % 2 if form == "BOOL" else RAW).view(dtype)
    tensors = {
        "flat": whole,
        "matrix": whole.reshape(2, -1).clone(),
        "zero": whole[:0],
        "wide zero": whole[:0].reshape(0, 3),
    }
    if form != "F4":  # two values share a byte
        tensors["scalar"] = whole[1].clone()
    try:
        save_file(tensors, path)
    except (KeyError, ValueError) as error:
        pytest.skip(f"this safetensors cannot write {form}: {error!r}")
    theirs, header = load_file(path), open_header(path)
    ours = read_tensors(header)
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no iterator
    assert {name: e.shape for name, e in header.tensors.items()} == shapes
    assert {e.format for e in header.tensors.values()} == {form}
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in theirs)


def test_header_says_where_each_tensor_lies(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {"b": entry("F16", (3, 2), (4, 16)), "a": entry("I32", (), (0, 4))}
    path.write_bytes(safetensors_bytes(header, bytes(range(16))))
    start = 8 + len(json.dumps(header))
    found = open_header(str(path))
    assert list(found.tensors.values()) == [
        TensorEntry("b", "F16", (3, 2), start + 4, 12),
        TensorEntry("a", "I32", (), start, 4),
    ]
    assert (found.path, found.container, found.metadata, found.bytes) == (path, "safetensors", {}, start + 16)
    tensors = read_tensors(found)
    assert list(tensors) == ["b", "a"]
    assert tensors["a"].item() == 0x03020100
    assert raw_of(tensors["b"]) == bytes(range(4, 16))


def test_odd_names_and_metadata(tmp_path):
    path = tmp_path / "ä b.safetensors"
    names = ["", " ", "a/b\\c", "日本語😀", 'quote"{}', "line\nfeed\0", "x" * 5000, "__metadata", "false"]
    metadata = {"ss_tag_frequency": json.dumps({"a{": {"b}": 1}}), "é": "", "": "\n\\u0041", "😀": "x" * 100_000}
    save_file({name: torch.full((2,), float(n)) for n, name in enumerate(names)}, path, metadata=metadata)
    header = open_header(path)
    assert header.metadata == metadata
    assert set(header.tensors) == set(names)
    tensors = read_tensors(header, reversed(names))
    assert list(tensors) == names[::-1]
    assert [tensors[name].tolist() for name in names] == [[n, n] for n in range(len(names))]


def test_blanks_and_unknown_fields_are_read_as_the_library_does(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        safetensors_bytes(
            '{ "a" :\t{"shape":[1],"x":[0.5,null],"dtype":"F32","data_offsets":[0,4]} } \r\n', b"\0\0\x80\x3f"
        )
    )
    assert read_tensors(open_header(path))["a"].tolist() == load_file(path)["a"].tolist() == [1.0]


def test_safetensors_without_tensors_and_with_sizes_of_zero_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({}))
    assert open_header(path).tensors == {}
    path.write_bytes(safetensors_bytes({"a": entry("F16", (0, 2**40, 3), (0, 0))}))
    assert read_tensors(open_header(path))["a"].shape == (0, 2**40, 3)


def test_a_name_the_file_lacks(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(FileFormatError, match=r"^a\.safetensors: b: no such tensor in this file; check"):
        read_tensors(open_header(path), ["a", "b"])


def test_tensors_are_ours(tmp_path):
    """Ordinary, writable, aligned tensors that outlive the file; also where the host is in inference mode or on a device."""
    path = tmp_path / "a.safetensors"
    save_file(
        {"a": torch.ones(3), "b": torch.ones(5, dtype=torch.float64), "c": torch.ones(1, dtype=torch.uint8)}, path
    )
    with torch.inference_mode(), torch.device("meta"):
        tensors = read_tensors(open_header(path))
    path.unlink()
    for tensor in tensors.values():
        assert not tensor.is_inference()
        assert tensor.device.type == "cpu"
        assert tensor.data_ptr() % 16 == 0
        assert tensor.add_(1).tolist() == [2] * tensor.numel()
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == 3


@pytest.mark.parametrize("change", ["shorter", "longer", "same size"])
def test_a_file_changed_after_its_header_was_read(tmp_path, change):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    header = open_header(path)
    with path.open("r+b") as file:
        if change == "shorter":
            file.truncate(header.bytes - 1)
        elif change == "longer":
            file.seek(0, 2)
            file.write(b"x")
    os.utime(path, ns=(header.state.modified_ns + 10**9,) * 2)
    expected = {
        "shorter": rf"^a\.safetensors: expected {header.bytes} bytes as when its header was read, found {header.bytes - 1};",
        "longer": rf"^a\.safetensors: expected {header.bytes} bytes as when its header was read, found {header.bytes + 1};",
        "same size": r"^a\.safetensors: was written to since its header was read; wait",
    }[change]
    with pytest.raises(FileFormatError, match=expected):
        read_tensors(header)


def test_a_file_cut_short_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100), "b": torch.ones(100)}, path)
    header = open_header(path)
    fill = reading._fill

    def cut_before_the_second(view, header, entry, file):
        if entry.name == "b":
            os.truncate(path, header.bytes - 4)
        fill(view, header, entry, file)

    monkeypatch.setattr(reading, "_fill", cut_before_the_second)
    with pytest.raises(
        FileFormatError, match=r"^a\.safetensors: b: expected 400 bytes, found 396; the file was cut short"
    ):
        read_tensors(header)


@pytest.fixture
def many_readers(monkeypatch):
    """Every file counts as large; each tensor is a piece."""
    monkeypatch.setattr(reading, "LARGE_FILE_BYTES", 1)
    monkeypatch.setattr(reading, "READ_AT_ONCE_BYTES", 1)


def readers_end():
    """True when the threads are gone; they have a few instructions left when all is read."""
    for _ in range(500):
        if not any(thread.name.startswith("lora-guard-reader") for thread in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.usefixtures("many_readers")
def test_a_large_file_is_read_by_several_threads_and_is_the_same(tmp_path):
    path = tmp_path / "a.safetensors"
    content = {f"{n}": torch.full((n, 3), float(n)) for n in (5, 4, 0, 3, 2, 1)} | {"b": torch.arange(7)}
    save_file(content, path)
    for names in (None, list(content)[::-1]):
        found = read_tensors(open_header(path), names)
        assert list(found) == (names or list(open_header(path).tensors))
        assert all(same(found[name], content[name]) for name in content)
        assert not any(tensor.is_inference() for tensor in found.values())
    assert readers_end()


@pytest.mark.usefixtures("many_readers")
def test_an_interrupt_while_readers_are_started_leaves_the_rest_of_the_file(tmp_path, monkeypatch):
    """Ctrl+C comes while the first thread is started, which starts the others; it begins its work after that."""
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "a.safetensors")
    begun, read = [], []

    class Thread:
        def __init__(self, target, name):
            self.target = target

        def start(self):
            begun.append(self.target)
            if len(begun) == 1:
                raise KeyboardInterrupt
            raise RuntimeError("no thread")

    monkeypatch.setattr(reading.threading, "Thread", Thread)
    monkeypatch.setattr(reading, "_fill", lambda view, header, entry, file: read.append(entry.name))
    with pytest.raises(KeyboardInterrupt):
        read_tensors(open_header(tmp_path / "a.safetensors"))
    begun[0]()
    assert read == []


@pytest.mark.usefixtures("many_readers")
def test_where_the_system_has_no_thread_left_the_caller_reads(tmp_path, monkeypatch):
    content = {"a": torch.ones(3), "b": torch.zeros(3)}
    save_file(content, tmp_path / "a.safetensors")
    monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no thread")))
    found = read_tensors(open_header(tmp_path / "a.safetensors"))
    assert all(same(found[name], content[name]) for name in content)


@pytest.mark.usefixtures("many_readers")
@pytest.mark.parametrize("error", [RuntimeError("no thread"), MemoryError("no more")], ids=["thread", "memory"])
@pytest.mark.parametrize("there", [1, 2, 3])
def test_where_the_system_has_few_threads_left_these_read_all(tmp_path, monkeypatch, there, error):
    content = {f"{n}": torch.full((3,), float(n)) for n in range(20)}
    save_file(content, tmp_path / "a.safetensors")
    start, started = threading.Thread.start, []
    monkeypatch.setattr(reading, "READERS", 4)

    def few(thread):
        if len(started) == there:
            raise error
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    found = read_tensors(open_header(tmp_path / "a.safetensors"))
    assert all(same(found[name], content[name]) for name in content)
    assert len(started) == there
    assert readers_end()


@pytest.mark.usefixtures("many_readers")
def test_the_caller_waits_for_the_start_of_one_reader_alone(tmp_path, monkeypatch):
    """Each start waits until the thread runs, and for the interpreter, which the threads before it have."""
    save_file({f"{n}": torch.ones(3) for n in range(20)}, tmp_path / "a.safetensors")
    start, callers = threading.Thread.start, []
    monkeypatch.setattr(reading, "READERS", 4)
    monkeypatch.setattr(threading.Thread, "start", lambda one: (callers.append(threading.current_thread()), start(one)))
    read_tensors(open_header(tmp_path / "a.safetensors"))
    assert len(callers) == reading.READERS
    assert [one is threading.main_thread() for one in callers] == [True] + [False] * (reading.READERS - 1)
    assert readers_end()


@pytest.mark.usefixtures("many_readers")
def test_what_one_reader_runs_into_ends_the_others(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({f"{n}": torch.ones(10) for n in range(200)}, path)
    header, fill, calls = open_header(path), reading._fill, []

    def torn_at_the_twentieth(view, header, entry, file):
        calls.append(entry)
        if len(calls) >= 20:
            raise OSError(5, "the disk is gone")
        fill(view, header, entry, file)

    monkeypatch.setattr(reading, "_fill", torn_at_the_twentieth)
    with pytest.raises(FileFormatError, match="the disk is gone"):
        read_tensors(header)
    assert len(calls) <= 20 + reading.READERS
    assert readers_end()


def test_a_file_that_memory_has_no_room_for_is_named(tmp_path, monkeypatch):
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    header = open_header(tmp_path / "a.safetensors")
    monkeypatch.setattr(torch, "empty", lambda *size, **options: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(FileFormatError, match=r"a\.safetensors: a: reading it needs"):
        read_tensors(header)


def test_a_header_that_lies_about_the_end_of_the_file(tmp_path):
    """Headers are plain data: one made by hand still cannot read past the file."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"0123456789")
    header = FileHeader(path, "safetensors", {"a": TensorEntry("a", "U8", (8,), 6, 8)}, {}, 10)
    with pytest.raises(FileFormatError, match="a: expected 8 bytes, found 4; the file was cut short"):
        read_tensors(header)


def test_a_type_this_torch_lacks_is_shown_and_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry("F6_E2M3", (4,), (0, 3))}, b"123"))
    header = open_header(path)
    assert header.tensors["a"].format == "F6_E2M3"
    with pytest.raises(
        FileFormatError,
        match=r"a\.safetensors: a: stored as F6_E2M3, which torch .* does not have; get the file in F16 or BF16",
    ):
        read_tensors(header)


def test_reading_takes_the_bytes_of_the_tensors_and_little_more(tmp_path):
    """Python's own memory beside the tensors; torch's is the tensors themselves, each made once."""
    path = tmp_path / "a.safetensors"
    save_file({f"layer.{n}": torch.zeros(64, 1024) for n in range(40)}, path)
    tracemalloc.start()
    read_tensors(open_header(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_resident_memory_while_reading(tmp_path):
    path = tmp_path / "a.safetensors"
    size = 48 * 2**20
    save_file({f"{n}": torch.ones(size // 8, dtype=torch.float32) for n in range(2)}, path)
    header = open_header(path)
    read_tensors(header, ["0"])  # what the first read loads for good

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    tensors = read_tensors(header)
    assert sum(t.nbytes for t in tensors.values()) == size
    assert resident() - before < size + 4 * 2**20


def sparse_file(path, head, size):
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    # st_blocks counts 512 bytes; Windows has none and its files are not sparse unless told to be.
    if getattr(path.stat(), "st_blocks", size) * 512 > 2**20:
        path.unlink()
        pytest.skip("this file system has no sparse files")


@pytest.mark.skipif(sys.platform == "win32", reason="a longer file is filled with zeros there")
def test_24_gb_answer_in_a_second(tmp_path):
    each = 24 * 10**9 // 780 // 6144 * 6144
    header = {
        f"double_blocks.{n}.weight": entry("BF16", (each // 6144, 3072), (n * each, (n + 1) * each)) for n in range(780)
    }
    head, path = safetensors_bytes(header), tmp_path / "flux.safetensors"
    sparse_file(path, head, len(head) + 780 * each)
    with CpuTime(1):
        found = open_header(path)
    assert len(found.tensors) == 780
    assert found.bytes == path.stat().st_size == len(head) + 780 * each
    last = found.tensors["double_blocks.779.weight"]
    assert (last.start + last.bytes, last.shape) == (found.bytes, (each // 6144, 3072))


def test_many_tensors_in_a_second(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {
        f"lora_unet_double_blocks_{n}_img_attn_proj.lora_down.weight": entry("U8", (1,), (n, n + 1))
        for n in range(10_000)
    }
    path.write_bytes(safetensors_bytes(header, bytes(10_000)))
    with CpuTime(1):
        assert len(open_header(path).tensors) == 10_000


def test_the_longest_header_is_the_librarys(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1):
        path.write_bytes(struct.pack("<Q", length))
        with pytest.raises(SafetensorError) as caught, safe_open(path, "pt"):
            pass
        assert ("toolarge" in str(caught.value).lower().replace(" ", "")) == (length > MAX_HEADER_BYTES)


def test_shown_text_is_short_and_harmless():
    assert shown("a\x1b[31m\n\u202eb\ud800") == "a?[31m??b?"
    assert shown("日本語 é") == "日本語 é"
    assert shown("a" * 120) == "a" * 120
    assert shown("a" * 500 + "b" * 500) == "a" * 58 + "..." + "b" * 59
