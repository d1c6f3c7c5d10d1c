"""The kernels of a product with one token. Imported on first use only, as `triton_kernels.py` is, whose decoding it uses.

A modulation or an embedder of time sees one token. Its weight is read once, so that a temporary one would be most of the work: here each
program multiplies some rows of the stored weight by the token as it decodes them, and adds `up` times what `down` has made of it.

Nothing here rounds as the host does: all is calculated in fp32 and rounded once, at the end.
"""

# ruff: noqa: N803, RET505, SIM108  # Triton's style: capitals, and branches that its compiler chooses by constants
# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_kernels import _absmax, _levels, _nibbles, _shuffled

NUMBERS = ("rows", "cols", "rank", "bias_rows")
"""Arguments whose values make no variants of a kernel."""


@triton.jit(do_not_specialize=NUMBERS)
def down_of_token(TOKEN, DOWN, OUT, cols, BI: tl.constexpr):
    """Makes `down @ token` in fp32, one rank a program. TOKEN `(cols,)`, DOWN `(rank, cols)`, OUT `(rank,)`."""
    cols = cols // 64 * 64
    rank, ri = tl.program_id(0), tl.arange(0, BI)
    total = tl.zeros((BI,), dtype=tl.float32)
    row = DOWN + rank.to(tl.int64) * cols
    for first in range(0, cols, BI):
        inside = first + ri < cols
        x = tl.load(TOKEN + first + ri, mask=inside, other=0.0).to(tl.float32)
        total += x * tl.load(row + first + ri, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + rank, tl.sum(total, 0))


@triton.jit
def _both(pair, FP16: tl.constexpr):
    """Splits words of four bytes into their two 16-bit numbers, in fp32, the first of them first."""
    if FP16:
        low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # bf16 is the upper half of fp32.
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _one_by_one(numbers):
    """Returns the numbers themselves, of which the compiler no longer knows that they follow each other.

    Else a thread takes four words that lie together, and the threads of a warp read tokens 64 bytes apart: 16 turns of the cache for one.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _token_of_word(TOKEN, at, ASM: tl.constexpr):
    """Returns the four pairs of a token that stand for words `at` of a row. ASM: in one load of 16 bytes.

    For each row of a program the same pairs: the compiler loads what is the same once, where a thread has them all.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l",
            [TOKEN.to(tl.int64) + at.to(tl.int64) * 16],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        at = TOKEN + at * 4
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit(do_not_specialize=NUMBERS)
def bnb4_token(
    DATA, LEVELS, ABSMAX, CODE, NESTED_SCALE, OFFSET, TOKEN, BIAS, LOW, UP, PER_RANK, OUT, rows, cols, rank, bias_rows, alpha,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ASM: tl.constexpr, FP16: tl.constexpr, HAS_PER_RANK: tl.constexpr,
    BO: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Makes `weight @ token + (up * per_rank) @ low * alpha + bias` for BO rows of bitsandbytes' four bits.

    DATA, LEVELS, ABSMAX, CODE, NESTED_SCALE, OFFSET: as `triton_kernels.bnb4` has them; BLOCK is a multiple of 64, and divides cols.
    TOKEN: `(cols,)` by pairs, as words of four bytes. FP16: they are fp16; else bf16. ASM: what a card alone understands is used.
    LOW: `(rank,)`, what `down_of_token` made. WORDS: words of DATA a turn, of 8 numbers each; and ranks.
    """
    cols = cols // 64 * 64
    row, ro, rw = tl.program_id(0) * BO, tl.arange(0, BO), tl.arange(0, WORDS)
    if ASM:
        rw = _one_by_one(rw)
    row_in, row_words = row + ro < rows, cols // 8
    tile = DATA + row.to(tl.int64) * row_words
    scales = row.to(tl.int64) * (cols // BLOCK)
    total = tl.zeros((BO, WORDS), dtype=tl.float32)
    for first in range(0, row_words, WORDS):
        word = ro[:, None] * 0 + (first + rw)[None, :]
        word_in = word < row_words
        inside = row_in[:, None] & word_in
        words = tl.load(tile + ro[:, None] * row_words + word, mask=inside, other=0)
        block = scales + ro[:, None] * (cols // BLOCK) + word // (BLOCK // 8)
        a = _absmax(block, inside, ABSMAX, CODE, NESTED_SCALE, OFFSET, NESTED)
        pairs = _token_of_word(TOKEN, tl.where(word_in, word, 0), ASM)
        if ASM:
            v = _shuffled(words, LEVELS)
        else:
            v = _nibbles(words)
        # Eight levels of at most 1 times the token, then their scale: above 3e37 a token's number could overflow here, and not in the host.
        part = tl.zeros((BO, WORDS), dtype=tl.float32)
        for pair in tl.static_range(4):
            low, high = _both(pairs[pair], FP16)
            if ASM:
                part += v[2 * pair] * low
                part += v[2 * pair + 1] * high
            else:
                part += _levels(v[2 * pair], LEVELS) * low
                part += _levels(v[2 * pair + 1], LEVELS) * high
        # Words outside have the first ones' part of the token, which may be infinite.
        total += tl.where(inside, part * a, 0.0)
    # Ranks in the places of words: one sum over both.
    for first in range(0, rank, WORDS):
        rank_in = first + rw < rank
        h = tl.load(LOW + first + rw, mask=rank_in, other=0.0) * alpha
        if HAS_PER_RANK:
            h = h * tl.load(PER_RANK + first + rw, mask=rank_in, other=0.0)
        u = tl.load(
            UP + row.to(tl.int64) * rank + ro[:, None] * rank + (first + rw)[None, :],
            mask=row_in[:, None] & rank_in[None, :],
            other=0.0,
        )
        total += u.to(tl.float32) * h[None, :]
    y = tl.sum(total, 1)
    y += tl.load(BIAS + row + ro, mask=row + ro < bias_rows, other=0.0).to(tl.float32)
    tl.store(OUT + row + ro, y.to(OUT.dtype.element_ty), mask=row_in)
