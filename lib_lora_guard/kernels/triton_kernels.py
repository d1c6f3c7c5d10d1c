"""The kernels. Imported on first use only: importing this module imports Triton.

Each program makes one tile of the temporary weight: it reads the stored bytes, decodes them with the host's roundings, adds
the tile of `(up * per_rank) @ down * alpha`, or of a LoHa's or LoKr's change, to each row times its factor, and stores once. Offsets
inside a tile are int32, the tile's own begins in int64.
Names in capitals are pointers or compile-time constants. No compiler may join a product and a sum into one operation
(`enable_fp_fusion=False` at the launch): the host's roundings would be lost.

TAIL, the arguments that all kernels end with:
    OUT: `(rows, cols)`. UP `(rows, rank)`, DOWN `(rank, cols)`, PER_RANK `(rank,)` fp32: the factors; not read where RANKS is 0.
    ROW_SCALE: `(rows,)` fp32, what each row is multiplied by before they are added; not read where ROW_SCALED is False.
    UP2, DOWN2: where HADAMARD, a second pair, by whose product that of the first one is multiplied, value by value.
    rows, cols, rank, height, alpha: numbers of the call.
    Where KRONECKER, UP is a LoKr's left side `(rows / height, cols / rank)` and DOWN the right one `(height, rank)`.
    VALUES: the dtype in which the host's dequantisation calculates and returns.
    RANKS: the rank's bucket, 0 for none. CHUNK: ranks per product. HAS_PER_RANK. ROW_SCALED. HADAMARD. KRONECKER.
    EVEN_RANK: the rank is a multiple of 16; where KRONECKER, of 8.
    BO, BI: rows and columns of a tile.
"""

# ruff: noqa: N803, N806, RET505, RUF005, SIM108  # Triton's style: capitals, and branches that its compiler chooses by constants
# mypy: ignore-errors

import triton
import triton.language as tl

NUMBERS = ("rows", "cols", "rank", "height", "scale_step")
"""Arguments whose values make no variants of a kernel. `x // 16 * 16` tells the compiler what a constant of the kernel promises."""


@triton.jit
def _rounded(x, VALUES: tl.constexpr):
    return x.to(VALUES).to(tl.float32)


@triton.jit
def _up(UP, PER_RANK, row, rows, rank, first, CHUNK: tl.constexpr, HAS_PER_RANK: tl.constexpr, BO: tl.constexpr):
    """Loads CHUNK ranks of the tile's rows of `up`, with the strengths in them."""
    ro, rr = tl.arange(0, BO), first + tl.arange(0, CHUNK)
    mask = (row + ro < rows)[:, None] & (rr < rank)[None, :]
    u = tl.load(UP + row.to(tl.int64) * rank + ro[:, None] * rank + rr[None, :], mask=mask, other=0.0)
    if HAS_PER_RANK:
        factor = tl.load(PER_RANK + rr, mask=rr < rank, other=0.0)
        u = (u.to(tl.float32) * factor[None, :]).to(u.dtype)
    return u


@triton.jit
def _down(DOWN, col, cols, rank, first, CHUNK: tl.constexpr, BI: tl.constexpr):
    """Loads CHUNK ranks of the tile's columns of `down`."""
    ri, rr = tl.arange(0, BI), first + tl.arange(0, CHUNK)
    mask = (rr < rank)[:, None] & (col + ri < cols)[None, :]
    return tl.load(DOWN + col + rr[:, None].to(tl.int64) * cols + ri[None, :], mask=mask, other=0.0)


@triton.jit
def _product(
    UP, DOWN, PER_RANK, row, col, rows, cols, rank,
    RANKS: tl.constexpr, CHUNK: tl.constexpr, HAS_PER_RANK: tl.constexpr, EVEN_RANK: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Returns a tile of `(up * per_rank) @ down` in fp32; zeros where RANKS is 0."""
    product = tl.zeros((BO, BI), dtype=tl.float32)
    if RANKS > 0:
        if EVEN_RANK:
            rank = rank // 16 * 16
        for first in tl.static_range(0, RANKS, CHUNK):
            u = _up(UP, PER_RANK, row, rows, rank, first, CHUNK, HAS_PER_RANK, BO)
            product = tl.dot(u, _down(DOWN, col, cols, rank, first, CHUNK, BI), product)
    return product


@triton.jit
def _kronecker(
    LEFT, RIGHT, row, col, rows, cols, height, width, EVEN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr
):  # fmt: skip
    """Returns a tile of `left (x) right` in fp32. EVEN: width is a multiple of 8, so that 8 columns share a number of left."""
    if EVEN:
        width = width // 8 * 8
    ro, ri = row + tl.arange(0, BO), col + tl.arange(0, BI)
    inside = (ro < rows)[:, None] & (ri < cols)[None, :]
    at = (ro % height).to(tl.int64)[:, None] * width + (ri % width)[None, :]
    right = tl.load(RIGHT + at, mask=inside, other=0.0).to(tl.float32)
    of_row = (ro // height * (cols // width))[:, None]
    if EVEN:
        rs = col + tl.arange(0, BI // 8) * 8
        inside = (ro < rows)[:, None] & (rs < cols)[None, :]
        left = tl.load(LEFT + of_row + (rs // width)[None, :], mask=inside, other=0.0).to(tl.float32)
        product = tl.reshape(right, (BO, BI // 8, 8)) * left[:, :, None]
        return tl.reshape(product, (BO, BI))
    else:
        left = tl.load(LEFT + of_row + (ri // width)[None, :], mask=inside, other=0.0).to(tl.float32)
        return right * left


@triton.jit
def _change(
    UP, DOWN, PER_RANK, UP2, DOWN2, row, col, rows, cols, rank, height,
    RANKS: tl.constexpr, CHUNK: tl.constexpr, HAS_PER_RANK: tl.constexpr, HADAMARD: tl.constexpr, KRONECKER: tl.constexpr,
    EVEN_RANK: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Returns what the factors add to a tile, without alpha: their product, two multiplied value by value, or a LoKr's."""
    if KRONECKER:
        product = _kronecker(UP, DOWN, row, col, rows, cols, height, rank, EVEN_RANK, BO, BI)
    else:
        product = _product(
            UP, DOWN, PER_RANK, row, col, rows, cols, rank, RANKS, CHUNK, HAS_PER_RANK, EVEN_RANK, BO, BI
        )  # fmt: skip
        if HADAMARD:
            product = product * _product(
                UP2, DOWN2, PER_RANK, row, col, rows, cols, rank, RANKS, CHUNK, False, EVEN_RANK, BO, BI
            )  # fmt: skip
    return product


@triton.jit
def _store(
    w, product, OUT, ROW_SCALE, row, col, rows, cols, alpha,
    VALUES: tl.constexpr, RANKS: tl.constexpr, ROW_SCALED: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rounds a tile of decoded values as the host does, adds the factors' product and stores it. EXACT: they need no rounding."""
    ro, ri = tl.arange(0, BO), tl.arange(0, BI)
    if RANKS == 0 or not EXACT:
        w = w.to(VALUES).to(OUT.dtype.element_ty)
    if RANKS > 0:
        w = w.to(tl.float32)
        if ROW_SCALED:
            w = w * tl.load(ROW_SCALE + row + ro, mask=row + ro < rows, other=0.0)[:, None]
        w = tl.fma(product, tl.full((BO, BI), 0.0, tl.float32) + alpha, w).to(OUT.dtype.element_ty)
    tile = OUT + row.to(tl.int64) * cols + col
    tl.store(tile + ro[:, None] * cols + ri[None, :], w, mask=(row + ro < rows)[:, None] & (col + ri < cols)[None, :])


@triton.jit(do_not_specialize=NUMBERS)
def scaled(
    DATA, SCALE, scale_step, OUT, UP, DOWN, PER_RANK, ROW_SCALE, UP2, DOWN2, rows, cols, rank, height, alpha,
    FORM: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
    VALUES: tl.constexpr, RANKS: tl.constexpr, CHUNK: tl.constexpr, HAS_PER_RANK: tl.constexpr, ROW_SCALED: tl.constexpr,
    HADAMARD: tl.constexpr, KRONECKER: tl.constexpr, EVEN_RANK: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """fp8 as its bytes, and int8; SCALE fp32, `scale_step` 0 for one, 1 for one a row. EVEN: cols is a multiple of 16."""
    if EVEN:
        cols = cols // 16 * 16
    row, col = tl.program_id(1) * BO, tl.program_id(0) * BI
    ro, ri = tl.arange(0, BO), tl.arange(0, BI)
    inside = (row + ro < rows)[:, None] & (col + ri < cols)[None, :]
    tile = DATA + row.to(tl.int64) * cols + col
    b = tl.load(tile + ro[:, None] * cols + ri[None, :], mask=inside, other=0)
    if FORM == "int8":
        w = b.to(tl.float32)
    else:
        b = b.to(tl.int32)
        if FORM == "e4m3" and NATIVE:
            w = b.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        elif FORM == "e4m3":
            # The exponent's bias is 7 here and 127 in fp32: 2**120 is the difference, subnormal numbers included.
            w = (((b & 0x80) << 24) | ((b & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
            w = tl.where((b & 0x7F) == 0x7F, float("nan"), w)
        else:
            w = (b << 8).to(tl.int16).to(tl.float16, bitcast=True)  # e5m2 is the upper half of fp16
    # The 16-bit value of an unscaled weight is the layer's: it needs no rounding.
    EXACT: tl.constexpr = not SCALED and (FORM == "e5m2" or (FORM == "e4m3" and NATIVE))
    if SCALED:
        s = tl.load(SCALE + (row + ro) * scale_step, mask=row + ro < rows, other=0.0)
        w = w.to(tl.float32) * s[:, None]
    product = _change(
        UP, DOWN, PER_RANK, UP2, DOWN2, row, col, rows, cols, rank, height,
        RANKS, CHUNK, HAS_PER_RANK, HADAMARD, KRONECKER, EVEN_RANK, BO, BI,
    )  # fmt: skip
    _store(w, product, OUT, ROW_SCALE, row, col, rows, cols, alpha, VALUES, RANKS, ROW_SCALED, BO, BI, EXACT)


@triton.jit
def _levels(index, LEVELS):
    """Returns the levels of 4-bit indices. Not by `tl.gather`, at which the compiler of Triton 3.3 ends the process."""
    return tl.load(LEVELS + index)


@triton.jit
def _nibbles(words):
    """Splits words of four bytes into eight nibbles, the higher one of a byte first."""
    return (
        (words >> 4) & 15, words & 15, (words >> 12) & 15, (words >> 8) & 15,
        (words >> 20) & 15, (words >> 16) & 15, (words >> 28) & 15, (words >> 24) & 15,
    )  # fmt: skip


@triton.jit
def _shuffled(words, LEVELS):
    """Returns the levels of the eight nibbles of words: lane N of a warp has level N % 16, and the others ask it."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 lane, level, at;
        .reg .b64 place;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 15;
        mad.wide.u32 place, lane, 4, $9;
        ld.global.nc.b32 level, [place];
        shr.u32 at, $8, 4;
        shfl.sync.idx.b32 $0, level, at, 31, -1;
        shfl.sync.idx.b32 $1, level, $8, 31, -1;
        shr.u32 at, $8, 12;
        shfl.sync.idx.b32 $2, level, at, 31, -1;
        shr.u32 at, $8, 8;
        shfl.sync.idx.b32 $3, level, at, 31, -1;
        shr.u32 at, $8, 20;
        shfl.sync.idx.b32 $4, level, at, 31, -1;
        shr.u32 at, $8, 16;
        shfl.sync.idx.b32 $5, level, at, 31, -1;
        shr.u32 at, $8, 28;
        shfl.sync.idx.b32 $6, level, at, 31, -1;
        shr.u32 at, $8, 24;
        shfl.sync.idx.b32 $7, level, at, 31, -1;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,l",
        [words, LEVELS.to(tl.int64)],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _in_order(v0, v1, v2, v3, v4, v5, v6, v7, BO: tl.constexpr, BI: tl.constexpr):
    """Puts eight tensors `(BO, BI // 8)` side by side, value by value."""
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), (BO, BI))


@triton.jit
def _absmax(at, mask, ABSMAX, CODE, NESTED_SCALE, OFFSET, NESTED: tl.constexpr):
    """Returns the fp32 scales of the blocks `at`."""
    a = tl.load(ABSMAX + at, mask=mask, other=0)
    if NESTED > 0:
        s = tl.load(NESTED_SCALE + at // NESTED, mask=mask, other=0.0)
        return tl.load(CODE + a.to(tl.int32)) * s + tl.load(OFFSET)
    else:
        return a


@triton.jit
def _of_bnb4(
    DATA, LEVELS, ABSMAX, CODE, NESTED_SCALE, OFFSET, row, col, rows, cols,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, CROSSING: tl.constexpr, SHUFFLE: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Returns a tile's values in fp32."""
    ro, ri = tl.arange(0, BO), tl.arange(0, BI)
    row_in = row + ro < rows
    if CROSSING:
        at = (row + ro).to(tl.int64)[:, None] * cols + (col + ri)[None, :]
        inside = row_in[:, None] & (col + ri < cols)[None, :]
        b = tl.load(DATA + at // 2, mask=inside, other=0).to(tl.int32)
        w = _levels(tl.where(at % 2 == 0, b >> 4, b & 15), LEVELS)
        w = w * _absmax(at // BLOCK, inside, ABSMAX, CODE, NESTED_SCALE, OFFSET, NESTED)
    else:
        SPAN: tl.constexpr = BLOCK if BLOCK < BI else BI
        G: tl.constexpr = BI // SPAN
        cols = cols // 32 * 32
        WIDTH: tl.constexpr = BI // 8
        row_words = cols // 32 * 4
        first = col // BI * WIDTH
        rw = tl.arange(0, WIDTH)
        tile = DATA + row.to(tl.int64) * row_words + first
        inside = row_in[:, None] & (first + rw < row_words)[None, :]
        words = tl.load(tile + ro[:, None] * row_words + rw[None, :], mask=inside, other=0)
        if SHUFFLE:
            v = _shuffled(words, LEVELS)
        else:
            v = _nibbles(words)
        q = _in_order(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], BO, BI)
        if not SHUFFLE:
            q = _levels(q, LEVELS)
        g = tl.arange(0, G)
        at = (row + ro).to(tl.int64)[:, None] * (cols // BLOCK) + (col // BLOCK + g)[None, :]
        inside = row_in[:, None] & (col + g * SPAN < cols)[None, :]
        a = _absmax(at, inside, ABSMAX, CODE, NESTED_SCALE, OFFSET, NESTED)
        w = tl.reshape(q, (BO, G, SPAN)) * a[:, :, None]
        w = tl.reshape(w, (BO, BI))
    return w


@triton.jit(do_not_specialize=NUMBERS)
def bnb4(
    DATA, LEVELS, ABSMAX, CODE, NESTED_SCALE, OFFSET,
    OUT, UP, DOWN, PER_RANK, ROW_SCALE, UP2, DOWN2, rows, cols, rank, height, alpha,
    FORM: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, CROSSING: tl.constexpr, SHUFFLE: tl.constexpr,
    SPANS: tl.constexpr, STAGES: tl.constexpr,
    VALUES: tl.constexpr, RANKS: tl.constexpr, CHUNK: tl.constexpr, HAS_PER_RANK: tl.constexpr, ROW_SCALED: tl.constexpr,
    HADAMARD: tl.constexpr, KRONECKER: tl.constexpr, EVEN_RANK: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """bitsandbytes' four bits. NESTED: values of absmax a scale of scales, 0 for none. CROSSING: blocks cross rows.

    SPANS: tiles of a program, side by side: all need the same part of `up`, which stays in registers. STAGES: tiles under way at once.
    """
    if not CROSSING:
        cols = cols // 32 * 32
    row, col = tl.program_id(1) * BO, tl.program_id(0) * BI * SPANS
    if SPANS == 1:
        w = _of_bnb4(
            DATA, LEVELS, ABSMAX, CODE, NESTED_SCALE, OFFSET, row, col, rows, cols, BLOCK, NESTED, CROSSING, SHUFFLE, BO, BI
        )  # fmt: skip
        product = _change(
            UP, DOWN, PER_RANK, UP2, DOWN2, row, col, rows, cols, rank, height,
            RANKS, CHUNK, HAS_PER_RANK, HADAMARD, KRONECKER, EVEN_RANK, BO, BI,
        )  # fmt: skip
        _store(w, product, OUT, ROW_SCALE, row, col, rows, cols, alpha, VALUES, RANKS, ROW_SCALED, BO, BI, False)
    else:
        if EVEN_RANK:
            rank = rank // 16 * 16
        ups = ()
        for first in tl.static_range(0, RANKS, CHUNK):
            ups = ups + (_up(UP, PER_RANK, row, rows, rank, first, CHUNK, HAS_PER_RANK, BO),)
        for number in tl.range(0, tl.minimum(SPANS, tl.cdiv(cols - col, BI)), num_stages=STAGES):
            at = col + number * BI
            w = _of_bnb4(
                DATA, LEVELS, ABSMAX, CODE, NESTED_SCALE, OFFSET, row, at, rows, cols, BLOCK, NESTED, CROSSING, SHUFFLE, BO, BI
            )  # fmt: skip
            product = tl.zeros((BO, BI), dtype=tl.float32)
            for chunk in tl.static_range(0, RANKS // CHUNK):
                product = tl.dot(ups[chunk], _down(DOWN, at, cols, rank, chunk * CHUNK, CHUNK, BI), product)
            _store(w, product, OUT, ROW_SCALE, row, at, rows, cols, alpha, VALUES, RANKS, ROW_SCALED, BO, BI, False)


@triton.jit
def _bytes_of_words(w, WIDE: tl.constexpr):
    """Splits words of two bytes, or four where WIDE, into their bytes, along new last dimensions."""
    if WIDE:
        w = tl.join(w & 0xFFFF, (w >> 16) & 0xFFFF)
    return tl.join(w & 0xFF, (w >> 8) & 0xFF)


@triton.jit
def _scale(WORDS2, at, mask, FROM: tl.constexpr, VALUES: tl.constexpr):
    """Reads a number of two bytes as the host has it: rounded to the dtype in which it calculates."""
    return _rounded(tl.load(WORDS2 + at, mask=mask, other=0).to(FROM, bitcast=True), VALUES)


@triton.jit
def _byte(WORDS2, at, j, mask):
    """Reads byte `j` from the word `at` on, as an unsigned number."""
    return (tl.load(WORDS2 + at + j // 2, mask=mask, other=0).to(tl.int32) >> (8 * (j % 2))) & 0xFF


@triton.jit
def _of_32(
    WORDS2, row_words, ro, row_in, first, groups,
    FORM: tl.constexpr, BAKED: tl.constexpr, VALUES: tl.constexpr, BO: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Q8_0, Q4_0 and Q5_0: G blocks of 32 of each row, from block `first` on. Returns `(BO, G, 32)` in fp32."""
    g = tl.arange(0, G)
    inside = row_in[:, None] & (first + g < groups)[None, :]
    SIZE: tl.constexpr = 17 if FORM == "Q8_0" else (9 if FORM == "Q4_0" else 11)
    HEAD: tl.constexpr = 3 if FORM == "Q5_0" else 1
    COUNT: tl.constexpr = SIZE - HEAD
    block = ro[:, None] * row_words + (first + g)[None, :] * SIZE
    if BAKED:
        d = _scale(WORDS2, block, inside, VALUES, VALUES)
    else:
        d = _scale(WORDS2, block, inside, tl.float16, VALUES)
    k = tl.arange(0, COUNT)
    at = block[:, :, None] + (HEAD + k)[None, None, :]
    w = tl.load(WORDS2 + at, mask=inside[:, :, None], other=0).to(tl.int32)
    if FORM == "Q8_0":
        q = tl.reshape(tl.join((w << 24) >> 24, w >> 8), (BO, G, 32))
    else:
        b = _bytes_of_words(w, False)
        if BAKED:
            q = tl.reshape(tl.join(b & 15, b >> 4), (BO, G, 32))
        else:
            halves = tl.join(tl.reshape(b & 15, (BO, G, 16)), tl.reshape(b >> 4, (BO, G, 16)))
            q = tl.reshape(tl.permute(halves, (0, 1, 3, 2)), (BO, G, 32))
        if FORM == "Q5_0":
            fifth = tl.load(WORDS2 + block + 1, mask=inside, other=0).to(tl.int32) & 0xFFFF
            fifth = fifth | (tl.load(WORDS2 + block + 2, mask=inside, other=0).to(tl.int32) << 16)
            q = (q | (((fifth[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1) << 4)) - 16
        else:
            q = q - 8
    return _rounded(q.to(tl.float32) * d[:, :, None], VALUES)


@triton.jit
def _of_q4_k_baked(
    WORDS2, WORDS4, row_words, ro, row_in, first, groups, VALUES: tl.constexpr, BO: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Q4_K as Forge lays it out: G groups of 32. A block: 8 scales, 8 minima, 128 bytes in the weight's order."""
    g = first + tl.arange(0, G)
    inside = row_in[:, None] & (g < groups)[None, :]
    block = ro[:, None] * row_words + (g // 8 * 80)[None, :]
    d = _scale(WORDS2, block + (g % 8)[None, :], inside, VALUES, VALUES)
    m = _scale(WORDS2, block + (8 + g % 8)[None, :], inside, VALUES, VALUES)
    k = tl.arange(0, 4)
    at = (ro[:, None] * (row_words // 2) + (g // 8 * 40 + 8 + g % 8 * 4)[None, :])[:, :, None] + k[None, None, :]
    b = _bytes_of_words(tl.load(WORDS4 + at, mask=inside[:, :, None], other=0), True)
    q = tl.reshape(tl.join(b & 15, b >> 4), (BO, G, 32))
    return _rounded(_rounded(q.to(tl.float32) * d[:, :, None], VALUES) - m[:, :, None], VALUES)


@triton.jit
def _of_k(
    WORDS2, WORDS4, row_words, ro, row_in, first, groups,
    FORM: tl.constexpr, VALUES: tl.constexpr, BO: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Q4_K and Q5_K as in the file: G groups of 32. 32 bytes hold a group in the low nibbles, the next in the high ones."""
    SIZE: tl.constexpr = 36 if FORM == "Q4_K" else 44
    NIBBLES: tl.constexpr = SIZE - 32
    C: tl.constexpr = G // 2
    c = first // 2 + tl.arange(0, C)
    inside = (row_in[:, None] & (c * 2 < groups)[None, :])[:, :, None]
    k = tl.arange(0, 8)
    block = ro[:, None] * (row_words // 2) + (c // 4 * SIZE)[None, :]
    at = (block + (NIBBLES + c % 4 * 8)[None, :])[:, :, None] + k[None, None, :]
    w = tl.load(WORDS4 + at, mask=inside, other=0)
    low, high = w & 0x0F0F0F0F, (w >> 4) & 0x0F0F0F0F
    if FORM == "Q5_K":
        fifth = tl.load(WORDS4 + block[:, :, None] + (4 + k)[None, None, :], mask=inside, other=0)
        fifth = fifth >> (c % 4 * 2)[None, :, None]
        low = low | ((fifth & 0x01010101) << 4)
        high = high | (((fifth >> 1) & 0x01010101) << 4)
    words = tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), (BO, G, 8))
    q = tl.reshape(_bytes_of_words(words, True), (BO, G, 32))
    g = first + tl.arange(0, G)
    inside = row_in[:, None] & (g < groups)[None, :]
    block = ro[:, None] * row_words + (g // 8 * (2 * SIZE))[None, :]
    j = (g % 4)[None, :]
    # The first four groups have six bits of scale and minimum; their upper two bits go to the other four.
    scales = _byte(WORDS2, block + 2, j, inside)
    minima = _byte(WORDS2, block + 4, j, inside)
    nibbles = _byte(WORDS2, block + 6, j, inside)
    is_first = (g % 8 < 4)[None, :]
    small = tl.where(is_first, scales & 63, (nibbles & 15) | (scales >> 6 << 4)).to(tl.float32)
    smallest = tl.where(is_first, minima & 63, (nibbles >> 4) | (minima >> 6 << 4)).to(tl.float32)
    d = _rounded(_scale(WORDS2, block, inside, tl.float16, VALUES) * small, VALUES)
    m = _rounded(_scale(WORDS2, block + 1, inside, tl.float16, VALUES) * smallest, VALUES)
    return _rounded(_rounded(q.to(tl.float32) * d[:, :, None], VALUES) - m[:, :, None], VALUES)


@triton.jit
def _of_q6_k(
    WORDS2, row_words, ro, row_in, first, groups, VALUES: tl.constexpr, BO: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Q6_K: G groups of 16, eight of them a half of a block. 64 bytes of nibbles and 32 of the upper two bits a half."""
    P: tl.constexpr = G // 8
    p = first // 8 + tl.arange(0, P)
    inside = (row_in[:, None] & (p * 8 < groups)[None, :])[:, :, None]
    k = tl.arange(0, 32)
    block = (ro[:, None] * row_words + (p // 2 * 105)[None, :])[:, :, None]
    half = (p % 2)[None, :, None]
    w = tl.load(WORDS2 + block + half * 32 + k[None, None, :], mask=inside, other=0).to(tl.int32)
    upper = tl.load(WORDS2 + block + 64 + half * 16 + (k % 16)[None, None, :], mask=inside, other=0).to(tl.int32)
    upper = upper >> (2 * (k // 16))[None, None, :]
    low = (w & 0x0F0F) | ((upper & 0x0303) << 4)
    high = ((w >> 4) & 0x0F0F) | (((upper >> 4) & 0x0303) << 4)
    words = tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), (BO, G, 8))
    q = tl.reshape(_bytes_of_words(words, False), (BO, G, 16)) - 32
    g = first + tl.arange(0, G)
    inside = row_in[:, None] & (g < groups)[None, :]
    block = ro[:, None] * row_words + (g // 16 * 105)[None, :]
    small = _byte(WORDS2, block + 96, (g % 16)[None, :], inside)
    small = ((small << 24) >> 24).to(tl.float32)
    d = _rounded(_scale(WORDS2, block + 104, inside, tl.float16, VALUES) * small, VALUES)
    return _rounded(q.to(tl.float32) * d[:, :, None], VALUES)


@triton.jit(do_not_specialize=NUMBERS)
def gguf(
    WORDS2, WORDS4, OUT, UP, DOWN, PER_RANK, ROW_SCALE, UP2, DOWN2, rows, cols, rank, height, alpha,
    FORM: tl.constexpr, BAKED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    VALUES: tl.constexpr, RANKS: tl.constexpr, CHUNK: tl.constexpr, HAS_PER_RANK: tl.constexpr, ROW_SCALED: tl.constexpr,
    HADAMARD: tl.constexpr, KRONECKER: tl.constexpr, EVEN_RANK: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """GGUF. WORDS2 and WORDS4: the same bytes as words of two and of four. BLOCK, BLOCK_BYTES: of a block."""
    cols = cols // BLOCK * BLOCK
    row, col = tl.program_id(1) * BO, tl.program_id(0) * BI
    ro = tl.arange(0, BO)
    row_in = row + ro < rows
    row_words = cols // BLOCK * (BLOCK_BYTES // 2)
    words2 = WORDS2 + row.to(tl.int64) * row_words
    if FORM == "Q6_K":
        w = _of_q6_k(words2, row_words, ro, row_in, col // 16, cols // 16, VALUES, BO, BI // 16)
    elif BLOCK == 32:
        w = _of_32(words2, row_words, ro, row_in, col // 32, cols // 32, FORM, BAKED, VALUES, BO, BI // 32)
    else:
        words4 = WORDS4 + row.to(tl.int64) * (row_words // 2)
        if BAKED:
            w = _of_q4_k_baked(words2, words4, row_words, ro, row_in, col // 32, cols // 32, VALUES, BO, BI // 32)
        else:
            w = _of_k(words2, words4, row_words, ro, row_in, col // 32, cols // 32, FORM, VALUES, BO, BI // 32)
    product = _change(
        UP, DOWN, PER_RANK, UP2, DOWN2, row, col, rows, cols, rank, height,
        RANKS, CHUNK, HAS_PER_RANK, HADAMARD, KRONECKER, EVEN_RANK, BO, BI,
    )  # fmt: skip
    w = tl.reshape(w, (BO, BI))
    _store(w, product, OUT, ROW_SCALE, row, col, rows, cols, alpha, VALUES, RANKS, ROW_SCALED, BO, BI, False)
