"""safetensors and GGUF files written byte by byte, right ones and wrong ones."""

import json
import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = dict(zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIif?Qqd", strict=True))


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def safetensors_bytes(header, data=b"", length=None):
    """`header`: a dict, JSON text, or bytes; `length`: what the file says of its header's length."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind, content):
    """A metadata value without its type. Arrays: `(type of the items, [items])`."""
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        item, items = content
        return struct.pack("<IQ", item, len(items)) + b"".join(value(item, i) for i in items)
    return struct.pack("<" + _CODES[kind], content)


def pair(key, kind, content):
    return text(key) + struct.pack("<I", kind) + value(kind, content)


def info(name, sizes=(1,), number=0, offset=0, n_dims=None):
    """`sizes` as they lie in the file: innermost first."""
    count = len(sizes) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, number, offset)


def gguf_bytes(pairs=(), infos=(), data=b"", version=3, counts=None, alignment=32, magic=b"GGUF"):
    n_infos, n_pairs = counts or (len(infos), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_infos, n_pairs) + b"".join(pairs) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data
