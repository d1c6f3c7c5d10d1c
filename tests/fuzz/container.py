"""safetensors files byte by byte, whole and damaged."""

import json
import struct
from dataclasses import dataclass

INTACT = ""


@dataclass
class Entry:
    name: str
    dtype: str
    shape: list
    data: bytes


def _laid_out(entries):
    at, header = 0, []
    for entry in entries:
        header.append(
            [entry.name, {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + len(entry.data)]}]
        )
        at += len(entry.data)
    return header, b"".join(entry.data for entry in entries)


def _text(pairs):
    """JSON that may have a key twice."""
    return "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}"


def file_bytes(entries, metadata, damage=INTACT, rng=None):
    """A whole file, or one with `damage` (a key of DAMAGE)."""
    header, data = _laid_out(entries)
    if metadata:
        header.insert(0, ["__metadata__", metadata])
    if damage == INTACT:
        raw = _text(header).encode()
        return struct.pack("<Q", len(raw)) + raw + data
    made = DAMAGE[damage](header, data, rng)
    if isinstance(made, bytes):
        return made
    header, data = made
    raw = (header if isinstance(header, str) else _text(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def _plain(header, data):
    raw = _text(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _tensors(header):
    return [pair for pair in header if pair[0] != "__metadata__"]


def _one(header, rng):
    return rng.choice(_tensors(header))[1]


def _cut(header, data, rng):
    whole = _plain(header, data)
    return whole[: rng.randrange(len(whole))]


def _more(header, data, rng):
    return header, data + rng.randbytes(rng.choice((1, 8, 5000)))


def _offsets(header, data, rng):
    one = _one(header, rng)
    start, end = one["data_offsets"]
    one["data_offsets"] = rng.choice(
        (
            [start + 4, end + 4], [start - 4, end - 4], [end, start], [start, start], [0, len(data)], [-1, end], [start, 2**63],
            [start, 2**64], [start, end, end], [start], "0", [0.0, end], [None, end], {}, [start, end - 1], [True, end], [start, 1e400],
        )
    )  # fmt: skip
    return header, data


def _shape(header, data, rng):
    one = _one(header, rng)
    shape = one["shape"]
    one["shape"] = rng.choice(
        (
            [*shape, 1], [*shape, 0], [], [0], shape[::-1], [2**62], [2**63], [10**30], [-1, *shape[1:]], [2.0, 3], ["4", 4], None, "4",
            {}, [[4], 4], [1] * 9, [1] * 64, [1] * 500, [65536] * 4, [2**31, 2**31], [True, 4], [1e400],
        )
    )  # fmt: skip
    return header, data


def _dtype(header, data, rng):
    _one(header, rng)["dtype"] = rng.choice(
        ("F33", "", "f32", 5, None, [], "F8", "BF16 ", "F128", "I4", "\u0000", "x" * 5000, *DTYPES)
    )
    return header, data


DTYPES = ("F64", "F16", "BF16", "U8", "C64", "F4", "F6_E2M3", "F8_E8M0", "BOOL", "U64")


def _flip_header(header, data, rng):
    whole = bytearray(_plain(header, data))
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(8 + len(_text(header)))
        whole[place] ^= 1 << rng.randrange(8) if rng.random() < 0.7 else rng.randrange(1, 256)
    return bytes(whole)


def _flip_data(header, data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 16)) if data else 0):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return header, bytes(data)


def _length(header, data, rng):
    whole = _plain(header, data)
    length = len(_text(header).encode())
    said = rng.choice(
        (0, 1, 2, length - 1, length + 1, length + 8, len(whole), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
    )
    return struct.pack("<Q", said) + whole[8:]


def _twice(header, data, rng):
    tensors = _tensors(header)
    if rng.random() < 0.5:
        return [*header, rng.choice(tensors)], data
    text = _text(header)
    inner = rng.choice(('"dtype":', '"shape":', '"data_offsets":'))
    return text.replace(inner, f"{inner}[0],{inner}", 1), data


def _names(header, data, rng):
    one = rng.choice(_tensors(header))
    tail = one[0][-30:]
    one[0] = rng.choice(
        (
            "", ".", "..", "." * 2000 + tail, "a" * 100_000 + "." + tail, "\u0000" + tail, "\x1b[31m" + tail, "\n" + tail, "\u202e" + tail,
            "\ud800" + tail, "💥" * 50 + tail, tail.upper(), " " + tail, tail + " ", "lora_unet_" * 3000 + tail, "__metadata__x", ".weight",
            "diffusion_model." * 2000 + tail, "_" * 30_000 + tail, tail + "." * 500, "blocks." + "9" * 5000 + ".qkv." + tail, "blocks.-1." + tail,
            "blocks.1e9." + tail, "blocks.٣." + tail, "blocks.0.qkv.lora_A..weight", "lora_A.weight", ".lora_A.weight", "x.lora_A." + "n" * 9000 + ".weight",
        )
    )  # fmt: skip
    return header, data


def _many(header, data, rng):
    count = rng.choice((500, 3000, 12_000))
    end = len(data)
    tail = rng.choice(
        (
            "lora_up.weight",
            "alpha",
            "weight",
            "lora_A.weight",
            "hada_w1_a",
            "x",
            "oft_blocks",
            "on_input",
            "diff_b",
            "lora_magnitude_vector",
            "norm.weight",
        )
    )
    prefix = rng.choice(("m", "blocks.", "lora_unet_blocks_", "blocks.0.proj", "a." * 30))
    more = [
        [f"{prefix}{n}.{tail}", {"dtype": "F32", "shape": [1], "data_offsets": [end + 4 * n, end + 4 * n + 4]}]
        for n in range(count)
    ]
    return [*header, *more], data + bytes(4 * count)


def _json(header, data, rng):
    text = _text(header)
    return rng.choice(
        (
            "", "[]", "null", "{", text[:-1], text + "x", text + "}", "[" * 50_000, '{"a":' * 20_000, text.replace(":", "=", 1),
            "\ufeff" + text, text.replace('"', "'"), " " * 10_000 + text, text + " " * 10_000, "{}", '{"__metadata__":{}}', "NaN", text.replace("{", "{/**/", 1),
            text.replace("[", "[NaN,", 1), text.replace("[", "[" + "1" * 6000 + ",", 1), text[:-1] + ',"x":{}}', text[:-1] + ',"x":5}', text[:-1] + ",}",
            '{"x":{"dtype":"F32","shape":[' + "1," * 30_000 + '1],"data_offsets":[0,4]}}', '{"\\ud800":5}',
        )
    ), data  # fmt: skip


def _metadata(header, data, rng):
    header = _tensors(header)
    value = rng.choice(
        (
            5,
            [],
            None,
            {"a": 5},
            {"a": None},
            {"a": {"b": "c"}},
            {"": ""},
            {"k" * 10_000: "v"},
            {"k": "v" * 500_000},
            {f"k{n}": "v" for n in range(5000)},
            {"format": "pt\u0000\x1b[2J"},
        )
    )
    return [["__metadata__", value], *header], data


def _not_utf8(header, data, rng):
    whole = bytearray(_plain(header, data))
    whole[8 + rng.randrange(len(_text(header)))] = rng.choice((0xFF, 0x80, 0xC0))
    return bytes(whole)


def _other_file(header, data, rng):
    return rng.choice(
        (
            b"",
            b"\0" * 8,
            b"\0" * 4096,
            b"PK\x03\x04" + data[:500],
            b"GGUF" + struct.pack("<IQQ", 3, 5, 5),
            b"GGUF\3\0\0\0" + b"\xff" * 64,
            b"\x80\x02ctorch",
            b"<!DOCTYPE html><html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:x\n",
            rng.randbytes(2000),
            b"{}",
        )
    )


DAMAGE = {
    "cut": _cut,
    "more": _more,
    "offsets": _offsets,
    "shape": _shape,
    "dtype": _dtype,
    "header_bits": _flip_header,
    "data_bits": _flip_data,
    "length": _length,
    "twice": _twice,
    "names": _names,
    "many": _many,
    "json": _json,
    "metadata": _metadata,
    "utf8": _not_utf8,
    "other_file": _other_file,
}
"""Each gives the header (pairs or text) and the data of a damaged file, or the file itself."""
