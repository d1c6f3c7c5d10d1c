import math
import os
import struct
import sys
import tracemalloc

import pytest
import torch
from support.machine_speed import CpuTime
from support.raw_files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    gguf_bytes,
    info,
    pair,
)  # fmt: skip

from lib_lora_guard.errors import FileFormatError
from lib_lora_guard.files import TensorEntry, open_header, read_tensors
from lib_lora_guard.files.gguf_types import GGUF_TYPES, PLAIN

NUMBER = {form.name: number for number, form in GGUF_TYPES.items()}


def write(path, *args, **options):
    path.write_bytes(gguf_bytes(*args, **options))
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_header_and_tensors(tmp_path, version):
    data = bytes(range(256))
    infos = [info("blk.0.attn.weight", (32, 2, 3), NUMBER["Q8_0"], 0), info("ä", (3, 2), NUMBER["F16"], 224)]
    path = write(tmp_path / "a.gguf", [pair("general.architecture", STRING, "flux")], infos, data, version=version)
    header = open_header(path)
    start = path.stat().st_size - 256
    assert (header.path, header.container, header.bytes) == (path, "gguf", start + 256)
    assert header.metadata == {"general.architecture": "flux"}
    assert list(header.tensors.values()) == [
        TensorEntry("blk.0.attn.weight", "Q8_0", (3, 2, 32), start, 6 * 34),
        TensorEntry("ä", "F16", (2, 3), start + 224, 12),
    ]
    tensors = read_tensors(header)
    assert tensors["blk.0.attn.weight"].dtype == torch.uint8
    assert tensors["blk.0.attn.weight"].tolist() == [list(range(r * 34, r * 34 + 34)) for r in range(6)]
    assert (tensors["ä"].dtype, tensors["ä"].shape) == (torch.float16, (2, 3))
    assert tensors["ä"].view(torch.uint8).flatten().tolist() == list(range(224, 236))


@pytest.mark.parametrize("number", sorted(GGUF_TYPES))
def test_every_type(number, tmp_path):
    form = GGUF_TYPES[number]
    size = 2 * 3 * form.block_bytes
    raw = bytes(n * 7 % 256 for n in range(size))
    path = write(
        tmp_path / "a.gguf", (), [info("a", (3 * form.block, 2), number), info("row", (form.block,), number)], raw
    )
    with pytest.raises(FileFormatError, match="overlap"):  # both at offset 0
        open_header(path)
    path = write(tmp_path / "a.gguf", (), [info("a", (3 * form.block, 2), number)], raw)
    header = open_header(path)
    assert (header.tensors["a"].format, header.tensors["a"].shape) == (form.name, (2, 3 * form.block))
    tensor = read_tensors(header)["a"]
    assert bytes(tensor.view(torch.uint8).flatten().tolist()) == raw
    if form.name in PLAIN:
        assert (tensor.shape, tensor.element_size()) == ((2, 3), form.block_bytes)
    else:
        assert (tensor.dtype, tensor.shape) == (torch.uint8, (2, 3 * form.block_bytes))


def test_a_row_of_blocks_is_still_a_matrix(tmp_path):
    path = write(tmp_path / "a.gguf", (), [info("a", (64,), NUMBER["Q4_0"])], bytes(36))
    assert read_tensors(open_header(path))["a"].shape == (1, 36)


def test_metadata_as_text(tmp_path):
    kinds = [
        ("u8", U8, 255, "255"), ("i8", I8, -1, "-1"), ("u16", U16, 65535, "65535"), ("i16", I16, -2, "-2"),
        ("u32", U32, 2**32 - 1, "4294967295"), ("i32", I32, -3, "-3"), ("u64", U64, 2**64 - 1, "18446744073709551615"),
        ("i64", I64, -(2**63), "-9223372036854775808"), ("f64", F64, 0.1, "0.1"), ("yes", BOOL, True, "true"),
        ("no", BOOL, False, "false"), ("text", STRING, "a\nb 😀", "a\nb 😀"), ("latin-1", STRING, b"\xe9", "\ufffd"),
        ("adapter.lora.alpha", F32, 16.0, "16"), ("nan", F32, math.nan, "nan"), ("f32", F32, 0.1, "0.100000001"),
        ("comfy.gguf.orig_shape.a", ARRAY, (I32, [320, 4, 3, 3]), "[320, 4, 3, 3]"), ("none", ARRAY, (U8, []), "[]"),
        ("tags", ARRAY, (STRING, ["a", "b"]), "[a, b]"), ("tokens", ARRAY, (STRING, ["x"] * 17), "[17 values]"),
        ("scores", ARRAY, (F32, [0.5] * 1000), "[1000 values]"),
        ("deep", ARRAY, (ARRAY, [(ARRAY, [(STRING, ["q"])]), (U8, [1])]), "[2 values]"),
    ]  # fmt: skip
    infos = [info("a", (1,), NUMBER["I8"])]
    path = write(tmp_path / "a.gguf", [pair(k, kind, v) for k, kind, v, _ in kinds], infos, b"\x05")
    header = open_header(path)
    assert header.metadata == {key: expected for key, _, _, expected in kinds}
    assert read_tensors(header)["a"].tolist() == [5]


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096, 65536])
def test_alignment(tmp_path, alignment):
    infos = [info("a", (2,), NUMBER["I8"], alignment), info("b", (1,), NUMBER["I8"], 0)]
    data = b"\x09".ljust(alignment, b"\0") + b"\x01\x02"
    path = write(tmp_path / "a.gguf", [pair("general.alignment", U32, alignment)], infos, data, alignment=alignment)
    tensors = read_tensors(open_header(path))
    assert {name: t.tolist() for name, t in tensors.items()} == {"a": [1, 2], "b": [9]}


def test_a_gguf_file_without_tensors_is_read(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    header = open_header(path)
    assert (header.tensors, header.metadata, read_tensors(header)) == ({}, {}, {})


def test_a_file_changed_after_its_header_was_read(tmp_path):
    path = write(tmp_path / "a.gguf", (), [info("a", (8,), NUMBER["I8"])], bytes(8))
    header = open_header(path)
    os.truncate(path, header.bytes - 1)
    with pytest.raises(
        FileFormatError, match=rf"^a\.gguf: expected {header.bytes} bytes as when its header was read, found"
    ):
        read_tensors(header)


def test_a_large_tokenizer_is_stepped_over(tmp_path):
    """As many texts as the largest text encoder in use has (Gemma: 262144 tokens), with scores and types."""
    tokens = struct.pack("<IQ", STRING, 262_144) + b"".join(
        struct.pack("<Q", n % 9) + b"x" * (n % 9) for n in range(262_144)
    )
    array = struct.pack("<IQ", F32, 262_144) + bytes(4 * 262_144)
    head = [
        pair(f"tokenizer.{n}", U8, 0)[:-5] + struct.pack("<I", ARRAY) + part for n, part in enumerate((tokens, array))
    ]
    path = write(tmp_path / "a.gguf", head, [info("a", (8,), NUMBER["I8"])], bytes(8))
    with CpuTime(1):  # 0.2 s where this was written
        header = open_header(path)
    assert header.metadata == {"tokenizer.0": "[262144 values]", "tokenizer.1": "[262144 values]"}
    tracemalloc.start()
    open_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.skipif(sys.platform == "win32", reason="a longer file is filled with zeros there")
def test_24_gb_answer_in_a_second(tmp_path):
    columns, rows = 3072, 24 * 10**9 // 780 // (3072 // 256 * 210)
    each = rows * (3072 // 256) * 210
    step = -(-each // 32) * 32
    infos = [info(f"double_blocks.{n}.weight", (columns, rows), NUMBER["Q6_K"], n * step) for n in range(780)]
    path = write(tmp_path / "a.gguf", [pair("general.architecture", STRING, "flux")], infos)
    size = path.stat().st_size + 779 * step + each
    os.truncate(path, size)
    if getattr(path.stat(), "st_blocks", size) * 512 > 2**20:
        path.unlink()
        pytest.skip("this file system has no sparse files")
    with CpuTime(1):
        header = open_header(path)
    last = header.tensors["double_blocks.779.weight"]
    assert (len(header.tensors), header.bytes, last.start + last.bytes) == (780, size, size)
    assert last.shape == (rows, columns)
