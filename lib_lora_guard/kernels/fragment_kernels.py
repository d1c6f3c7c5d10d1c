"""The kernel of four bits with a LoRA of 16 ranks that decodes each number where the tensor cores leave the product for it.

In `triton_kernels.bnb4` decoded numbers and finished ones go through shared memory, to and from the layout of `tl.dot`'s result: for few ranks that
is what a LoRA costs there. Here every tensor has one value for each thread of the program, as in a kernel of CUDA, and PTX's `mma` gets what a thread has.

What a thread has: the result of one `mma`, 16 rows x 8 columns, lies in a warp by pairs of columns; which columns these are is as free as their
order in `down`. So thread `4 * g + t` of a warp is given columns `8 * t ... 8 * t + 7` of each 32, in rows `g` and `g + 8`: four bytes of stored
numbers, 16 of the weight. Ranks are as free: it has ranks `4 * t ... 4 * t + 3` of the factors, eight bytes of a row of `up`.

ASM: what a card alone understands is used; else the same is done by Triton's own operations, for its interpreter.
"""

# ruff: noqa: N803, RET505, RUF005, SIM300  # Triton's style: capitals, branches that its compiler chooses by constants, tuples that grow
# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_kernels import NUMBERS, _absmax, _levels, _nibbles


@triton.jit
def _words(POINTER, at, COUNT: tl.constexpr, ASM: tl.constexpr):
    """Loads COUNT words of four bytes, one, two or four, from word `at` on. Its place is a multiple of COUNT words."""
    if ASM:
        place = POINTER.to(tl.int64) + at * 4
        if COUNT == 4:
            return tl.inline_asm_elementwise(
                "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [place],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        elif COUNT == 2:
            return tl.inline_asm_elementwise(
                "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [place],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return (
                tl.inline_asm_elementwise(
                    "ld.global.nc.b32 $0, [$1];", "=r,l", [place], dtype=tl.int32, is_pure=True, pack=1
                ),
            )
    else:
        words = ()
        for n in tl.static_range(0, COUNT):
            words = words + (tl.load(POINTER.to(tl.pointer_type(tl.int32)) + at + n),)
        return words


@triton.jit
def _store_words(OUT, at, words, inside, ASM: tl.constexpr):
    """Stores four words of four bytes, from word `at` on, where `inside` is true."""
    if ASM:
        tl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            setp.ne.u32 inside, $6, 0;
            @inside st.global.v4.b32 [$1], {$2, $3, $4, $5};
            mov.u32 $0, 0;
            }""",
            "=r,l,r,r,r,r,r",
            [OUT.to(tl.int64) + at * 4, words[0], words[1], words[2], words[3], inside.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        for n in tl.static_range(0, 4):
            tl.store(OUT.to(tl.pointer_type(tl.int32)) + at + n, words[n], mask=inside)


@triton.jit
def _pair(first, second, VALUES: tl.constexpr, ASM: tl.constexpr):
    """Rounds two fp32 numbers to VALUES and puts them into a word, the first one into its lower half."""
    if not ASM:
        low = first.to(VALUES).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (second.to(VALUES).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    elif VALUES == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [second, first], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [second, first], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _numbers(pair, VALUES: tl.constexpr):
    """Returns the two numbers of a word in fp32, the lower half first."""
    if VALUES == tl.float16:
        low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # bf16 is the upper half of fp32.
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _halves_of(upper, lower, is_second, ASM: tl.constexpr):
    """Returns a word of the same half of two words, that of `upper` in the lower half."""
    if ASM:
        chosen = tl.where(is_second, 0x7632, 0x5410)
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [upper, lower, chosen], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        first = (upper & 0xFFFF) | (lower << 16)
        second = ((upper >> 16) & 0xFFFF) | (lower & -65536)
        return tl.where(is_second, second, first)


@triton.jit
def _eight_levels(word, level, LEVELS, ASM: tl.constexpr):
    """Returns the levels of the eight numbers in a word. `level`: that of lane N of a warp is level N % 16, which the others ask for."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 at;
            shr.u32 at, $8, 4;
            shfl.sync.idx.b32 $0, $9, at, 31, -1;
            shfl.sync.idx.b32 $1, $9, $8, 31, -1;
            shr.u32 at, $8, 12;
            shfl.sync.idx.b32 $2, $9, at, 31, -1;
            shr.u32 at, $8, 8;
            shfl.sync.idx.b32 $3, $9, at, 31, -1;
            shr.u32 at, $8, 20;
            shfl.sync.idx.b32 $4, $9, at, 31, -1;
            shr.u32 at, $8, 16;
            shfl.sync.idx.b32 $5, $9, at, 31, -1;
            shr.u32 at, $8, 28;
            shfl.sync.idx.b32 $6, $9, at, 31, -1;
            shr.u32 at, $8, 24;
            shfl.sync.idx.b32 $7, $9, at, 31, -1;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f",
            [word, level],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        v = _nibbles(word)
        levels = ()
        for n in tl.static_range(0, 8):
            levels = levels + (_levels(v[n], LEVELS),)
        return levels


@triton.jit
def _rows_by_columns(a0, a1, b0, b1, VALUES: tl.constexpr, WARPS: tl.constexpr):
    """For the interpreter: 8 rows of a product by 8 columns, in the two numbers that each thread has of it."""
    product = tl.zeros((WARPS, 8, 8), dtype=tl.float32)
    left, right = _numbers(a0, VALUES) + _numbers(a1, VALUES), _numbers(b0, VALUES) + _numbers(b1, VALUES)
    for n in tl.static_range(0, 4):
        a = tl.reshape(left[n], (WARPS, 8, 1, 4))
        b = tl.reshape(right[n], (WARPS, 1, 8, 4))
        product += tl.sum(a * b, 3)
    first, second = tl.split(tl.reshape(product, (WARPS, 8, 4, 2)))
    return tl.reshape(first, (WARPS * 32,)), tl.reshape(second, (WARPS * 32,))


@triton.jit
def _product(a0, a1, b0, b1, a2, a3, VALUES: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr):
    """Multiplies 16 rows by 8 columns, over 16 ranks, in fp32.

    `a0`, `a1`: four ranks of row g, as two words; `a2`, `a3`: of row g + 8. `b0`, `b1`: the same ranks of column g of the eight. Returns the
    numbers in columns `2 * t` and `2 * t + 1` of row g, then of row g + 8.
    """
    if not ASM:
        return _rows_by_columns(a0, a1, b0, b1, VALUES, WARPS) + _rows_by_columns(a2, a3, b0, b1, VALUES, WARPS)
    elif VALUES == tl.float16:
        zero = tl.zeros((WARPS * 32,), dtype=tl.float32)
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $6, $5, $7}, {$8, $9}, {$10, $10, $10, $10};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f", [a0, a1, a2, a3, b0, b1, zero],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        zero = tl.zeros((WARPS * 32,), dtype=tl.float32)
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $6, $5, $7}, {$8, $9}, {$10, $10, $10, $10};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f", [a0, a1, a2, a3, b0, b1, zero],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _of_row(
    DATA, ABSMAX, CODE, NESTED_SCALE, OFFSET, UP, row, rows, col, cols, t,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Loads what a thread needs of a row: two words of stored numbers, their scale, two words of `up`. Of the last row, where there is none."""
    row = tl.minimum(row, rows - 1).to(tl.int64)
    at = row * (cols // 8) + col // 8 + t
    scale = _absmax(row * (cols // BLOCK) + col // BLOCK, row >= 0, ABSMAX, CODE, NESTED_SCALE, OFFSET, NESTED)
    first, second = _words(DATA, at, 1, ASM), _words(DATA, at + 4, 1, ASM)
    return first + second + (scale,) + _words(UP, row * 8 + t * 2, 2, ASM)


@triton.jit
def _finished(
    word, level, scale, p0, p1, p2, p3, p4, p5, p6, p7, alpha, LEVELS, VALUES: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Returns eight numbers of the weight as four words: decoded, rounded as the host does, with the LoRA's product, rounded once more."""
    v, p = _eight_levels(word, level, LEVELS, ASM), (p0, p1, p2, p3, p4, p5, p6, p7)
    words = ()
    for n in tl.static_range(0, 4):
        low, high = _numbers(_pair(v[2 * n] * scale, v[2 * n + 1] * scale, VALUES, ASM), VALUES)
        words = words + (_pair(tl.fma(p[2 * n], alpha, low), tl.fma(p[2 * n + 1], alpha, high), VALUES, ASM),)
    return words


@triton.jit(do_not_specialize=NUMBERS)
def bnb4_fragments(
    DATA, LEVELS, ABSMAX, CODE, NESTED_SCALE, OFFSET,
    OUT, UP, DOWN, PER_RANK, ROW_SCALE, UP2, DOWN2, rows, cols, rank, height, alpha,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, VALUES: tl.constexpr, HAS_PER_RANK: tl.constexpr, BO: tl.constexpr,
    WARPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Makes BO rows of 64 columns of bitsandbytes' four bits, with factors of 16 ranks.

    Arguments as `triton_kernels.bnb4` has them; ROW_SCALE, UP2, DOWN2, rank and height are not read. BLOCK is a multiple of 64, and divides
    cols. VALUES is the layer's dtype too.
    """
    cols = cols // 64 * 64
    thread = tl.arange(0, WARPS * 32)
    warp, g, t = thread // 32, thread % 32 // 4, thread % 4
    col = tl.program_id(0) * 64
    level = tl.load(LEVELS + thread % 16)
    alphas = tl.full((WARPS * 32,), 0.0, tl.float32) + alpha
    # Of 32 columns, in the place of column g of the n-th eight: column 8 * (g // 2) + 2 * n + g % 2.
    downs = ()
    for half in tl.static_range(0, 2):
        k = t * 4 + half * 2
        for side in tl.static_range(0, 2):
            at = k.to(tl.int64) * (cols // 2) + col // 2 + side * 16 + g // 2 * 4
            one, other = _words(DOWN, at, 4, ASM), _words(DOWN, at + cols // 2, 4, ASM)
            for n in tl.static_range(0, 4):
                pair = _halves_of(one[n], other[n], g % 2 == 1, ASM)
                if HAS_PER_RANK:
                    low, high = _numbers(pair, VALUES)
                    pair = _pair(low * tl.load(PER_RANK + k), high * tl.load(PER_RANK + k + 1), VALUES, ASM)
                downs = downs + (pair,)
    row = tl.program_id(1) * BO + warp * 16 + g
    top = _of_row(DATA, ABSMAX, CODE, NESTED_SCALE, OFFSET, UP, row, rows, col, cols, t, BLOCK, NESTED, ASM)
    bottom = _of_row(DATA, ABSMAX, CODE, NESTED_SCALE, OFFSET, UP, row + 8, rows, col, cols, t, BLOCK, NESTED, ASM)
    for _ in range(0, BO // (WARPS * 16)):
        upper, lower, following = top, bottom, row + WARPS * 16
        # Under way while these rows are made.
        top = _of_row(DATA, ABSMAX, CODE, NESTED_SCALE, OFFSET, UP, following, rows, col, cols, t, BLOCK, NESTED, ASM)
        bottom = _of_row(
            DATA, ABSMAX, CODE, NESTED_SCALE, OFFSET, UP, following + 8, rows, col, cols, t, BLOCK, NESTED, ASM
        )
        at = row.to(tl.int64) * (cols // 2) + col // 2 + t * 4
        for side in tl.static_range(0, 2):
            p = ()
            for n in tl.static_range(0, 4):
                p = p + _product(
                    upper[3], upper[4], downs[side * 4 + n], downs[8 + side * 4 + n], lower[3], lower[4], VALUES, WARPS, ASM
                )  # fmt: skip
            words = _finished(
                upper[side], level, upper[2], p[0], p[1], p[4], p[5], p[8], p[9], p[12], p[13], alphas, LEVELS, VALUES, ASM
            )  # fmt: skip
            _store_words(OUT, at + side * 16, words, row < rows, ASM)
            words = _finished(
                lower[side], level, lower[2], p[2], p[3], p[6], p[7], p[10], p[11], p[14], p[15], alphas, LEVELS, VALUES, ASM
            )  # fmt: skip
            _store_words(OUT, at + cols // 2 * 8 + side * 16, words, row + 8 < rows, ASM)
        row = following
