"""GGUF blocks written value by value, with the values they stand for: shares no code and no order of work with the product.

Every function takes a `random.Random` and gives `(bytes, values)`; values are exact in Python's floats.
"""

import struct

LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def half(rng):
    """An fp16 number and its two bytes; of like sizes, so that sums in float64 are exact."""
    stored = struct.pack("<e", rng.choice([-1, 1]) * rng.uniform(0.01, 0.5))
    return struct.unpack("<e", stored)[0], stored


def ints(rng, count, bits):
    return [rng.randrange(1 << bits) for _ in range(count)]


class Bytes(bytearray):
    def put(self, byte, shift, value):
        assert 0 <= value << shift < 256
        assert self[byte] & (value << shift) == 0
        self[byte] |= value << shift


def simple(bits, has_minimum):
    """Q4_0, Q4_1, Q5_0, Q5_1: d, m where there is one, four bytes of fifth bits where there are any, nibbles."""

    def make(rng):
        (d, d_bytes), (m, m_bytes) = half(rng), half(rng)
        q = ints(rng, 32, bits)
        fifth, nibbles = Bytes(4), Bytes(16)
        for i, v in enumerate(q):
            nibbles.put(i % 16, 4 * (i // 16), v & 15)
            if bits == 5:
                fifth.put(i // 8, i % 8, v >> 4)
        head = d_bytes + (m_bytes if has_minimum else b"")
        values = [d * v + m if has_minimum else d * (v - (1 << bits >> 1)) for v in q]
        return head + (bytes(fifth) if bits == 5 else b"") + bytes(nibbles), values

    return make


def q8_0(rng):
    d, d_bytes = half(rng)
    q = [rng.randint(-128, 127) for _ in range(32)]
    return d_bytes + struct.pack("<32b", *q), [d * v for v in q]


def iq4_nl(rng):
    d, d_bytes = half(rng)
    q, nibbles = ints(rng, 32, 4), Bytes(16)
    for i, v in enumerate(q):
        nibbles.put(i % 16, 4 * (i // 16), v)
    return d_bytes + bytes(nibbles), [d * LEVELS[v] for v in q]


def two_bits(packed, q):
    for i, v in enumerate(q):
        in_half = i % 128
        packed.put(32 * (i // 128) + in_half % 32, 2 * (in_half // 32), v)


def q2_k(rng):
    (d, d_bytes), (dmin, dmin_bytes) = half(rng), half(rng)
    q, scale, minimum = ints(rng, 256, 2), ints(rng, 16, 4), ints(rng, 16, 4)
    packed = Bytes(64)
    two_bits(packed, q)
    small = bytes(s | m << 4 for s, m in zip(scale, minimum, strict=True))
    values = [d * scale[i // 16] * v - dmin * minimum[i // 16] for i, v in enumerate(q)]
    return small + bytes(packed) + d_bytes + dmin_bytes, values


def q3_k(rng):
    d, d_bytes = half(rng)
    q, scale = ints(rng, 256, 3), ints(rng, 16, 6)
    third, packed, small = Bytes(32), Bytes(64), Bytes(12)
    two_bits(packed, [v & 3 for v in q])
    for i, v in enumerate(q):
        third.put(i % 32, i // 32, v >> 2)
    for g, s in enumerate(scale):
        small.put(g % 8, 4 * (g // 8), s & 15)
        small.put(8 + g % 4, 2 * (g // 4), s >> 4)
    values = [d * (scale[i // 16] - 32) * (v - 4) for i, v in enumerate(q)]
    return bytes(third) + bytes(packed) + bytes(small) + d_bytes, values


def q45_k(bits):
    """Q4_K and Q5_K."""

    def make(rng):
        (d, d_bytes), (dmin, dmin_bytes) = half(rng), half(rng)
        q, scale, minimum = ints(rng, 256, bits), ints(rng, 8, 6), ints(rng, 8, 6)
        small, fifth, nibbles = Bytes(12), Bytes(32), Bytes(128)
        for g in range(4):
            small.put(g, 0, scale[g])
            small.put(4 + g, 0, minimum[g])
            small.put(8 + g, 0, scale[4 + g] & 15)
            small.put(8 + g, 4, minimum[4 + g] & 15)
            small.put(g, 6, scale[4 + g] >> 4)
            small.put(4 + g, 6, minimum[4 + g] >> 4)
        for i, v in enumerate(q):
            group = i // 32
            nibbles.put(32 * (group // 2) + i % 32, 4 * (group % 2), v & 15)
            if bits == 5:
                fifth.put(i % 32, group, v >> 4)
        values = [d * scale[i // 32] * v - dmin * minimum[i // 32] for i, v in enumerate(q)]
        return d_bytes + dmin_bytes + bytes(small) + (bytes(fifth) if bits == 5 else b"") + bytes(nibbles), values

    return make


def q6_k(rng):
    d, d_bytes = half(rng)
    q, scale = ints(rng, 256, 6), [rng.randint(-128, 127) for _ in range(16)]
    low, high = Bytes(128), Bytes(64)
    for i, v in enumerate(q):
        block_half, in_half = divmod(i, 128)
        low.put(64 * block_half + in_half % 64, 4 * (in_half // 64), v & 15)
        high.put(32 * block_half + in_half % 32, 2 * (in_half // 32), v >> 4)
    values = [d * scale[i // 16] * (v - 32) for i, v in enumerate(q)]
    return bytes(low) + bytes(high) + struct.pack("<16b", *scale) + d_bytes, values


def iq4_xs(rng):
    d, d_bytes = half(rng)
    q, scale = ints(rng, 256, 4), ints(rng, 8, 6)
    low, nibbles, high = Bytes(4), Bytes(128), 0
    for g, s in enumerate(scale):
        low.put(g // 2, 4 * (g % 2), s & 15)
        high |= (s >> 4) << (2 * g)
    for i, v in enumerate(q):
        nibbles.put(16 * (i // 32) + i % 16, 4 * (i % 32 // 16), v)
    values = [d * (scale[i // 32] - 32) * LEVELS[v] for i, v in enumerate(q)]
    return d_bytes + struct.pack("<H", high) + bytes(low) + bytes(nibbles), values


def plain(code):
    def make(rng):
        values = [struct.unpack("<" + code, struct.pack("<" + code, rng.uniform(-2, 2)))[0] for _ in range(32)]
        return struct.pack(f"<32{code}", *values), values

    return make


def bf16(rng):
    stored = [struct.pack("<f", rng.uniform(-2, 2))[2:] for _ in range(32)]
    return b"".join(stored), [struct.unpack("<f", b"\0\0" + s)[0] for s in stored]


BY_HAND = {
    "F32": plain("f"), "F16": plain("e"), "BF16": bf16,
    "Q4_0": simple(4, False), "Q4_1": simple(4, True), "Q5_0": simple(5, False), "Q5_1": simple(5, True), "Q8_0": q8_0,
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q45_k(4), "Q5_K": q45_k(5), "Q6_K": q6_k, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs,
}  # fmt: skip
