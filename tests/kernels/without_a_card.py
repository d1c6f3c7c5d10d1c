"""Runs in a process of its own: kernels on the CPU by Triton's interpreter, or compiled for cards that are not here.

TRITON_INTERPRET, which Triton reads when it is imported, says which. Writes one JSON object: for every name of a check "" or how it
failed. The interpreter has fp16 alone: it rounds bf16 wrongly (Triton 3.9).
"""

import importlib.util
import json
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
warnings.simplefilter("ignore")  # numpy's, about NaN and infinities

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from compile_kernels import compiled, compiled_down  # noqa: E402
from support.short_way import bnb_parameter  # noqa: E402

from lib_lora_guard.adapters import LokrAdapter, LoraAdapter, Term  # noqa: E402
from lib_lora_guard.hosts.forge.guard_patches import GuardPatches  # noqa: E402
from lib_lora_guard.hosts.forge.raw_weights import ForgeWeight  # noqa: E402
from lib_lora_guard.kernels import fragment_kernels, token_kernels, triton_kernels  # noqa: E402
from lib_lora_guard.kernels.choice import KERNELS  # noqa: E402
from lib_lora_guard.kernels.factors import Sides  # noqa: E402
from lib_lora_guard.kernels.launch import Kernel  # noqa: E402
from lib_lora_guard.kernels.probe import (  # noqa: E402
    ProbeError,
    compare,
    compare_product,
    probe,
    probe_token,
    sample,
    sample_factors,
    sample_sides,
)
from lib_lora_guard.kernels.recipes import ONE_TOKEN, Tile, TokenTile, bucket_of, rank_of_sides, split_kind  # noqa: E402
from lib_lora_guard.kernels.token_product import TokenProduct  # noqa: E402
from lib_lora_guard.kernels.twin import dequantised  # noqa: E402
from lib_lora_guard.patching.access import plain_bias  # noqa: E402
from lib_lora_guard.patching.forward_program import compile_program, lokr_pass  # noqa: E402
from lib_lora_guard.patching.fused import Fused  # noqa: E402
from lib_lora_guard.patching.fused_choice import CHOICE  # noqa: E402
from lib_lora_guard.patching.on_the_fly import WeightTerms  # noqa: E402
from lib_lora_guard.planning.cheap import forms_of  # noqa: E402

CPU, FP16, BF16 = torch.device("cpu"), torch.float16, torch.bfloat16
CARDS = (
    (75, "fp8 e4m3", FP16, 16), (86, "nf4 64 nested256 by fp16", FP16, 128),
    (90, "Q4_K baked by bf16", BF16, 64), (120, "nf4 64 by bf16", BF16, 0), (89, "loha fp8 e4m3", BF16, 16),
    (80, "int8 scaled", BF16, 16), (75, "lokr fp8 e4m3", FP16, 16), (80, "lokr int8 scaled", BF16, 1),
    (86, "lokr nf4 64 by bf16", BF16, 16), (89, "lokr fp8 e4m3 scaled", BF16, 16), (90, "lokr Q8_0 baked by bf16", BF16, 16),
    (120, "lokr Q4_K baked by bf16", BF16, 16), (86, "dora nf4 64 by bf16", BF16, 64), (75, "dora lokr fp8 e4m3", FP16, 16),
    (75, "token nf4 64 by fp16", FP16, 16), (86, "token nf4 64 by bf16", BF16, 16), (120, "token fp4 64 nested256 by bf16", BF16, 16),
)  # fmt: skip
FRAGMENT_CARDS = (
    (80, "nf4 64 by bf16", BF16), (86, "nf4 64 by fp16", FP16), (89, "nf4 128 by bf16", BF16), (90, "nf4 64 by bf16", BF16),
    (120, "fp4 64 nested256 by bf16", BF16),
)  # fmt: skip
SMALLEST_SHARED_BYTES = 48 * 1024
"""What every card gives a program."""
KINDS = {
    "fp8 e4m3": Tile(16, 32, 1), "fp8 e4m3 scaled odd": Tile(16, 32, 1), "fp8 e5m2 scaled": Tile(16, 32, 1),
    "int8 scaled": Tile(16, 32, 1), "nf4 64 by fp16": Tile(16, 128, 1), "fp4 32 nested256 by fp16": Tile(16, 64, 1),
    "nf4 64 crossing by fp16": Tile(16, 64, 1), "nf4 128 by fp16": Tile(16, 64, 1), "Q8_0 baked by fp16": Tile(16, 64, 1),
    "Q4_0 baked by fp16": Tile(16, 64, 1), "Q4_K baked by fp16": Tile(16, 256, 1), "Q8_0": Tile(16, 64, 1), "Q4_0": Tile(16, 64, 1),
    "Q4_K": Tile(16, 128, 1), "Q5_0 by fp16": Tile(16, 64, 1), "Q5_K by fp16": Tile(16, 256, 1), "Q6_K by fp16": Tile(16, 256, 1),
}  # fmt: skip
PLAIN = tuple(KINDS)
KINDS |= {f"loha {kind}": KINDS[kind] for kind in ("fp8 e4m3", "nf4 64 by fp16", "Q8_0 baked by fp16")}
ROW_SCALED = ("fp8 e4m3", "int8 scaled", "nf4 64 by fp16", "Q4_K baked by fp16", "loha fp8 e4m3")
KINDS |= {f"dora {kind}": KINDS[kind] for kind in ROW_SCALED}
WITH_LORA = (
    "int8 scaled",
    "nf4 64 by fp16",
    "Q8_0 baked by fp16",
    "Q4_K baked by fp16",
    *(kind for kind in KINDS if kind not in PLAIN),
)
WITH_LOKR = (
    "fp8 e4m3", "fp8 e4m3 scaled odd", "fp8 e5m2 scaled", "int8 scaled", "nf4 64 by fp16", "fp4 32 nested256 by fp16",
    "nf4 64 crossing by fp16", "Q8_0 baked by fp16", "Q4_0 baked by fp16", "Q4_K baked by fp16", "Q4_0",
)  # fmt: skip
KINDS |= {f"lokr {kind}": KINDS[kind] for kind in WITH_LOKR}
KINDS["dora lokr fp8 e4m3"] = KINDS["fp8 e4m3"]
"""One of each shape of tile: what adds the factors is the same for all."""
SIDES = (
    (4, 4, 24, 40),
    (8, 8, 5, 8),
    (16, 16, 3, 4),
    (3, 5, 7, 16),
    (1, 6, 40, 24),
    (9, 1, 8, 64),
    (7, 2, 1, 32),
    (2, 64, 30, 1),
)
"""Rows and columns of a LoKr's left side, and of its right one: smaller and larger than tiles, and no part of one."""
# In fp16: the interpreter cuts bf16 off where it should round.
TOKENS = ("nf4 64 by fp16", "fp4 64 nested256 by fp16", "nf4 128 by fp16")
TOKEN_TILE = TokenTile(rows=4, words=16, warps=1, columns=64)
FRAGMENTS = ("nf4 64 by fp16", "fp4 64 nested256 by fp16", "nf4 128 by fp16")
FRAGMENT_TILE = Tile(64, 64, 2)
"""Two turns of 32 rows a program."""
RANKS = (1, 16, 100, 256)
SPANS = (("nf4 64 by fp16", 24, True, 2), ("fp4 32 nested256 by fp16", 48, False, 3))
"""Several tiles a program: of ranks in one product and in several."""
FAULTS = {
    "a block skipped": ("Q8_0 baked by fp16", 0, "(first + g < groups)[None, :]", "(first + g < groups - 1)[None, :]"),
    "a scale left out": ("fp8 e4m3 scaled odd", 0, "w = w.to(tl.float32) * s[:, None]", "w = w"),
    "nibbles swapped": ("nf4 64 by fp16", 0, "tl.join(even, odd)", "tl.join(odd, even)"),
    "the minimum left out": ("Q4_K", 0, "VALUES) - m[:, :, None]", "VALUES)"),
    "NaN lost": ("fp8 e4m3", 0, '(b & 0x7F) == 0x7F, float("nan")', '(b & 0x7F) == 0x7F, 480.0'),
    "a rounding left out": ("Q5_K by fp16", 0, "d = _rounded(_scale(WORDS2, block, inside, tl.float16, VALUES) * small, VALUES)",
                            "d = _scale(WORDS2, block, inside, tl.float16, VALUES) * small"),
    "ranks left out": ("fp8 e4m3", 100, "tl.static_range(0, RANKS, CHUNK)", "tl.static_range(0, CHUNK, CHUNK)"),
    "the first ranks added twice": ("fp8 e4m3", 100, "tl.arange(0, BO), first + tl.arange", "tl.arange(0, BO), tl.arange"),
    "rows not scaled": ("dora int8 scaled", 16, "if ROW_SCALED:", "if False:"),
    "one row's factor for all": ("dora fp8 e4m3", 16, "ROW_SCALE + row + ro", "ROW_SCALE + row + ro * 0"),
    "a LoHa's second product left out": ("loha fp8 e4m3", 20, "if HADAMARD:", "if False:"),
    "a LoHa's pairs mixed": ("loha fp8 e4m3", 20, "UP2, DOWN2, PER_RANK, row", "UP, DOWN2, PER_RANK, row"),
    "a LoKr's left side turned": ("lokr fp8 e4m3", 16, "of_row + (rs // width)[None, :]",
                                  "(ro // height)[:, None] + (rs // width * (rows // height))[None, :]"),
    "a LoKr's left side left out": ("lokr nf4 64 by fp16", 16, " * left[:, :, None]", ""),
    "a LoKr's width for its height": ("lokr fp8 e4m3", 1, "ro // height * (cols", "ro // width * (cols"),
    "a LoKr's height for its width": ("lokr int8 scaled", 1, "(ri % width)", "(ri % height)"),
    "a LoKr without alpha": ("lokr Q8_0 baked by fp16", 16, "0.0, tl.float32) + alpha", "1.0, tl.float32)"),
    "a LoKr's row of blocks too short": ("lokr fp8 e4m3", 16, "rs // width)[None, :], mask", "rs // (width + 8))[None, :], mask"),
    "alpha left out": ("fp8 e4m3", 5, "0.0, tl.float32) + alpha", "1.0, tl.float32)"),
}  # fmt: skip


NESTED = "fp4 64 nested256 by fp16"
TOKEN_FAULTS = {
    "a token's nested scales of another row": (
        NESTED,
        "block = scales + ro[:, None] * (cols // BLOCK)",
        "block = scales + ro[:, None] * 0",
    ),
    "a token's nested scales of the next block": (
        NESTED,
        "word // (BLOCK // 8)\n",
        "word // (BLOCK // 8) + 1\n",
    ),
    "a token's numbers swapped": (False, "low, high = _both(", "high, low = _both("),
    "a token's scale left out": (False, "part * a, 0.0", "part, 0.0"),
    "a token's last words left out": (
        False,
        "inside = row_in[:, None] & word_in",
        "inside = row_in[:, None] & (word < row_words - 1)",
    ),
    "a token's first pairs where words are outside": (
        False,
        "tl.where(inside, part * a, 0.0)",
        "part * _absmax(scales + word * 0, word >= 0, ABSMAX, CODE, NESTED_SCALE, OFFSET, NESTED)",
    ),
    "a token's last turn left out": (False, "range(0, row_words, WORDS)", "range(0, row_words - 16, WORDS)"),
    "a token's ranks left out": (False, "range(0, rank, WORDS)", "range(0, WORDS, WORDS)"),
    "a token's last rank left out": (False, "first + rw < rank\n", "first + rw < rank - 1\n"),
    "a token's strengths left out": (True, "if HAS_PER_RANK:", "if False:"),
    "a token's alpha left out": (False, "other=0.0) * alpha", "other=0.0)"),
    "a token's bias left out": (False, "row + ro < bias_rows", "row + ro < 0"),
    "a token's last numbers left out of down": (False, "inside = first + ri < cols", "inside = first + ri < cols - 1"),
}


FRAGMENT_FAULTS = {
    "fragments, nibbles swapped": ("_pair(v[2 * n] * scale, v[2 * n + 1]", "_pair(v[2 * n + 1] * scale, v[2 * n]"),
    "fragments, a scale left out": ("v[2 * n] * scale,", "v[2 * n],"),
    "fragments, the scale of the next row": ("_absmax(row * (cols", "_absmax((row + 1) % rows * (cols"),
    "fragments, the scale of the first columns": ("+ col // BLOCK, row", "+ 0, row"),
    "fragments, the other columns' words": ("_words(DATA, at + 4, 1", "_words(DATA, at, 1"),
    "fragments, the other rows' ranks": ("_words(UP, row * 8", "_words(UP, (row ^ 8) % rows * 8"),
    "fragments, ranks of another thread": ("row * 8 + t * 2, 2", "row * 8 + (t ^ 1) * 2, 2"),
    "fragments, the other half of down": ("g % 2 == 1, ASM)", "g % 2 == 0, ASM)"),
    "fragments, columns of down in their order": ("+ side * 16 + g // 2 * 4", "+ side * 16 + g // 4 * 4"),
    "fragments, one side's part of down": ("downs[side * 4 + n], downs[8", "downs[n], downs[8"),
    "fragments, alpha left out": ("0.0, tl.float32) + alpha", "1.0, tl.float32)"),
    "fragments, strengths left out": ("if HAS_PER_RANK:", "if False:"),
    "fragments, the rows of the turn before": ("UP, following, rows", "UP, row, rows"),
    "fragments, rows g + 8 in the place of g": ("at + cols // 2 * 8 + side * 16, words", "at + side * 16, words"),
}  # fmt: skip


def fragments_of(kind, per_rank):
    made = Kernel(kind, FP16, 16, True, per_rank, FRAGMENT_TILE, fragments=True)
    if not made.has_fragments:
        raise ProbeError("another kernel")
    return made


def kernel_of(kind, rank, per_rank, **tile):
    return Kernel(kind, FP16, bucket_of(rank), rank % 16 == 0, per_rank, KINDS[kind]._replace(**tile))


def failure(call):
    try:
        call()
    except ProbeError as error:
        return str(error)
    return ""


def with_fault(old, new, folder, source=triton_kernels):
    """Returns the kernels' module with one of its lines changed."""
    text = Path(source.__file__).read_text(encoding="utf-8")
    assert old in text, old
    file = Path(folder, "faulty.py")
    text = text.replace("from .", f"from {source.__package__}.")
    file.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("faulty", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_for(card, kind, dtype, rank):
    """Says where a kernel does not compile, needs too much memory, or writes less than 16 bytes at once."""
    made = compiled(kind, dtype, rank, card)
    ptx = made.asm["ptx"]
    if split_kind(kind).form == ONE_TOKEN:
        # It reads the token 16 bytes at once.
        down = compiled_down(dtype, card).asm["ptx"]
        is_right = all(f".target sm_{card}" in one for one in (ptx, down)) and "ld.global.nc.v4.b32" in ptx
        return "" if is_right else ptx[:200]
    if f".target sm_{card}" not in ptx or made.metadata.shared > SMALLEST_SHARED_BYTES or "st.global.v4.b32" not in ptx:
        return f"{made.metadata.shared} bytes of shared memory, {ptx.count('st.global')} stores: {ptx[:200]}"
    return ""


def compile_fragments_for(card, kind, dtype):
    """Says where the kernel uses shared memory or no tensor cores, or reads or writes less than it could at once."""
    for per_rank in (False, True):
        made = compiled(kind, dtype, 16, card, per_rank, fragments=True)
        ptx = made.asm["ptx"]
        words = (f".target sm_{card}", "mma.sync.aligned.m16n8k16", "st.global.v4.b32", "ld.global.nc.v4.b32")
        if made.metadata.shared or not all(word in ptx for word in words):
            return f"{made.metadata.shared} bytes of shared memory: {ptx[:200]}"
    return ""


def weak_fragments(kernel):
    """A weak LoRA shows what is wrong with the weight."""
    generator = torch.Generator().manual_seed(11)
    stored = sample("nf4 64 by fp16", 37, 128, FP16, generator, CPU)
    factors = replace(sample_factors(37, 128, 16, False, FP16, generator, CPU), alpha=0.003)
    compare(kernel(stored, factors), stored, factors, FP16)


def infinite_fragments():
    """Infinities and NaN in the factors come out where the twin has them."""
    generator = torch.Generator().manual_seed(10)
    stored = sample("nf4 64 by fp16", 37, 128, FP16, generator, CPU)
    factors = sample_factors(37, 128, 16, False, FP16, generator, CPU)
    factors.up[2, 1], factors.down[3, 7], factors.up[5, 0] = float("inf"), float("nan"), 60000.0
    compare(fragments_of("nf4 64 by fp16", False)(stored, factors), stored, factors, FP16)


def infinite():
    """Infinities and NaN in the factors come out where the twin has them."""
    generator = torch.Generator().manual_seed(3)
    stored = sample("fp8 e5m2 scaled", 19, 48, FP16, generator, CPU)
    factors = sample_factors(19, 48, 5, True, FP16, generator, CPU)
    factors.up[2, 1], factors.down[3, 7], factors.up[5, 0] = float("inf"), float("nan"), 60000.0
    compare(kernel_of("fp8 e5m2 scaled", 5, True)(stored, factors), stored, factors, FP16)


def factors_of_rows_alone():
    """A kernel says so where rows shall be scaled and it does not do that, and the other way round."""
    generator = torch.Generator().manual_seed(4)
    stored = sample("int8 scaled", 19, 48, FP16, generator, CPU)
    factors = sample_factors(19, 48, 5, False, FP16, generator, CPU)
    for kind, scale, words in (("int8 scaled", torch.ones(19), ""), ("dora int8 scaled", None, "no ")):
        try:
            kernel_of(kind, 5, False)(stored, replace(factors, row_scale=scale))
        except ValueError as error:
            if str(error) == f"{kind}: found {words}factors of rows":
                continue
        raise ProbeError(kind)


def looked_at_once():
    """What a kernel has found out about factors holds for the same weight alone, and keeps no copies of them."""
    generator = torch.Generator().manual_seed(6)
    kernel = kernel_of("nf4 64 by fp16", 5, True)
    stored, other = (sample("nf4 64 by fp16", rows, 128, FP16, generator, CPU) for rows in (19, 16))
    factors = sample_factors(19, 128, 5, True, FP16, generator, CPU)
    turned = replace(factors, up=factors.up.t().contiguous().t())
    for one, is_kept in ((factors, True), (turned, False)):
        for _ in range(2):
            compare(kernel(stored, one), stored, factors, FP16)
        if (list(one.known) == [kernel]) is not is_kept:
            raise ProbeError(f"kept: {one.known}")
        try:
            kernel(other, one)
        except ValueError:
            continue
        raise ProbeError("factors for another weight were taken")


def with_sides(kind, a, b, c, d, alpha):
    """Compares a LoKr of any strength with the twin, and one of none with the host's dequantisation, bit for bit."""
    generator = torch.Generator().manual_seed(a)
    stored = sample(kind, a * c, b * d, FP16, generator, CPU)
    sides = sample_sides(a * c, b * d, c, d, FP16, generator, CPU)
    sides = Sides(sides.left, sides.right, alpha)
    made = kernel_of(f"lokr {kind}", rank_of_sides(d), False)(stored, sides)
    compare(made, stored, sides if alpha else None, FP16)
    if alpha:
        # As an own product of fp64: the twin may be as wrong.
        exact = dequantised(stored, FP16).double() + alpha * torch.kron(sides.left.double(), sides.right.double())
        error = ((made.double() - exact).abs() / exact.abs().clamp_min(2.0**-14)).nan_to_num(0.0).max().item()
        if error > 2.0**-10:
            raise ProbeError(f"error {error:.3g}")


def through_a_layer():
    """A layer of fp8 gives with a LoKr in the kernel what the host's call gives with the terms in it, at any strength.

    The two multiply three numbers in another order before they round: a few weights are one step of fp16 apart, of which those below
    8 have at most 2**-8, and then an output is rounded to the next number.
    """
    KERNELS.prepare(["lokr fp8 e4m3"], CPU, FP16, [16, 1])
    assert KERNELS.wait(60)
    generator = torch.Generator().manual_seed(5)
    for width, strength in ((32, 0.8), (32, 0.0), (4, -0.4)):
        layer = torch.nn.Linear(96, 40, dtype=FP16)
        stored = torch.randn(40, 96, generator=generator).to(torch.float8_e4m3fn)
        layer.weight = torch.nn.Parameter(stored, requires_grad=False)
        x = torch.randn(3, 96, generator=generator).to(FP16)
        sides = sample_sides(40, 96, 5, width, FP16, generator, CPU)
        terms = WeightTerms("weight", [Term(LokrAdapter(sides.left, sides.right), strength)])
        host = torch.nn.functional.linear(x, layer.weight.to(FP16), layer.bias)
        patched = torch.nn.functional.linear(x, terms.apply(layer.weight.to(FP16), layer.weight), layer.bias)
        layer.forge_online_loras = {"weight": GuardPatches(terms, layer)}
        forms = forms_of(terms.terms, (40, 96))
        fused = Fused(ForgeWeight(lambda: False), lokr_pass(terms.terms, forms, (40, 96), plain_bias))
        with torch.no_grad():
            found = fused.run(layer, x, terms)
        change = (patched - host).abs().max().item()
        if found is None or (change > 0.1) != (strength != 0.0):
            raise ProbeError(f"strength {strength}, {width} columns: {found}, changed by {change}")
        apart = (found.float() - patched.float()).abs()
        if not (apart <= 2.0**-10 * patched.float().abs() + 2.0**-8 * (strength != 0.0)).all():
            raise ProbeError(f"strength {strength}, {width} columns: up to {apart.max().item()} apart")
        with torch.no_grad():
            if fused.run(layer, x) is not None or fused.run(layer, x, WeightTerms("weight", terms.terms)) is not None:
                raise ProbeError("the short way goes where other terms are on the layer")


def token_of(kind, per_rank):
    return TokenProduct(ONE_TOKEN + kind, FP16, per_rank, TOKEN_TILE)


def infinite_token():
    """NaN in the factors comes out where the twin has it; an infinity comes out of its row, one in the token out of every row."""
    generator = torch.Generator().manual_seed(7)
    stored = sample("nf4 64 by fp16", 9, 128, FP16, generator, CPU)
    factors = sample_factors(9, 128, 3, True, FP16, generator, CPU)
    token = torch.randn(1, 128, generator=generator).to(FP16)
    factors.up[2, 1] = float("nan")
    product = token_of("nf4 64 by fp16", True)
    compare_product(product(stored, factors, token, None), stored, factors, token, None)
    # A weight with it in has infinities of both signs, whose sum is no number.
    factors.up[5, 0] = float("inf")
    if (~product(stored, factors, token, None).isfinite()).nonzero()[:, 1].tolist() != [2, 5]:
        raise ProbeError("an infinity in the factors is lost, or in other rows")
    token[0, 77] = float("inf")
    if product(stored, factors, token, None).isfinite().any():
        raise ProbeError("an infinity in the token is lost")


def halves_of_words():
    """Every 16-bit number comes out of a word as it went in, bf16 too, which the interpreter cannot round."""
    for dtype in (FP16, BF16):
        numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        low, high = (torch.empty(1 << 15, dtype=torch.float32) for _ in range(2))
        halves_kernel[(1,)](numbers.view(torch.int32), low, high, FP16=dtype == FP16, COUNT=1 << 15)
        for found, wanted in ((low, numbers[0::2].float()), (high, numbers[1::2].float())):
            if not torch.equal(found.isnan(), wanted.isnan()) or not torch.equal(
                found.nan_to_num(7.0), wanted.nan_to_num(7.0)
            ):
                raise ProbeError(f"{dtype}: other numbers")


@triton.jit
def halves_kernel(PAIRS, LOW, HIGH, FP16: tl.constexpr, COUNT: tl.constexpr):  # noqa: N803
    at = tl.arange(0, COUNT)
    low, high = token_kernels._both(tl.load(PAIRS + at), FP16)
    tl.store(LOW + at, low)
    tl.store(HIGH + at, high)


def not_for_this_product():
    """What the kernel cannot take goes the long way, and what is not for it is said."""
    generator = torch.Generator().manual_seed(8)
    product, stored = token_of("nf4 64 by fp16", False), sample("nf4 64 by fp16", 9, 128, FP16, generator, CPU)
    factors = sample_factors(9, 128, 3, False, FP16, generator, CPU)
    token, bias = torch.randn(1, 128, generator=generator).to(FP16), torch.zeros(9, dtype=FP16)
    for x, b in (
        (token.repeat(2, 1), bias),
        (token.float(), bias),
        (token, bias.float()),
        (token, torch.zeros(18, dtype=FP16)[::2]),
    ):
        if product(stored, factors, x, b) is not None:
            raise ProbeError(f"taken: {x.shape} {x.dtype}, {b.dtype}")
    other = sample_factors(9, 64, 3, False, FP16, generator, CPU)
    scaled, pairs = replace(factors, row_scale=torch.ones(9)), replace(factors, times=(factors.up, factors.down))
    for wrong in (
        other,
        scaled,
        pairs,
        replace(factors, per_rank=torch.ones(3)),
        replace(factors, up=factors.up.float()),
    ):
        try:
            product(stored, wrong, token, bias)
        except ValueError:
            continue
        raise ProbeError("factors for something else were taken")


def a_token_through_a_layer():
    """A layer of four bits gives with one token what its weight with the LoRA in it gives, at any strength."""
    KERNELS.prepare(["token nf4 64 by fp32"], CPU, FP16, [4])
    assert KERNELS.wait(120)
    generator = torch.Generator().manual_seed(9)
    layer = torch.nn.Linear(128, 24, dtype=FP16)
    layer.weight, dense = bnb_parameter(torch.randn(24, 128, generator=generator) * 0.1)
    up, down = (torch.randn(shape, generator=generator).to(FP16) * 0.2 for shape in ((24, 4), (4, 128)))
    x = torch.randn(1, 128, generator=generator).to(FP16)
    for strength in (0.8, -0.3):
        terms = (Term(LoraAdapter(up, down), strength),)
        fused = Fused(
            ForgeWeight(lambda: False),
            compile_program(terms, forms_of(terms, (24, 128)), (24, 128), {}, plain_bias).one_pass,
        )
        change = strength * (x.double() @ down.double().t() @ up.double().t())
        exact = x.double() @ dense.double().t() + change + layer.bias.double()
        was, CHOICE.multiplies_tokens, CHOICE.held = CHOICE.multiplies_tokens, False, {}
        with torch.no_grad():
            if fused.run(layer, x) is not None:
                raise ProbeError("switched off, and taken")
            CHOICE.multiplies_tokens = True
            found = fused.run(layer, x)
            few = fused.run(layer, x.repeat(2, 1))
        CHOICE.multiplies_tokens = was
        if found is None or few is not None:
            raise ProbeError(f"one token: {found}, two: {few}")
        apart = (found.double() - exact).norm() / change.norm()
        if apart > 0.002:
            raise ProbeError(f"strength {strength}: {apart:.2%} of the LoRA apart")


def interpret():
    found = {}
    for kind in TOKENS:
        for rank, per_rank in ((45, True), (16, False), (1, False)):
            found[f"token {kind}, rank {rank}"] = failure(
                lambda kind=kind, rank=rank, per_rank=per_rank: probe_token(token_of(kind, per_rank), CPU, rank)
            )
    found["infinities with a token"] = failure(infinite_token)
    for kind in FRAGMENTS:
        for per_rank in (True, False):
            found[f"fragments of {kind}, {per_rank}"] = failure(
                lambda kind=kind, per_rank=per_rank: probe(fragments_of(kind, per_rank), 16, CPU)
            )
    found["infinities in fragments"] = failure(infinite_fragments)
    found["fragments of a weak LoRA"] = failure(lambda: weak_fragments(fragments_of("nf4 64 by fp16", False)))
    found["halves of words"] = failure(halves_of_words)
    found["not for a token"] = failure(not_for_this_product)
    found["a token through a layer"] = failure(a_token_through_a_layer)
    for kind in PLAIN:
        found[f"{kind}, no LoRA"] = failure(lambda kind=kind: probe(kernel_of(kind, 0, False), 0, CPU))
    for kind in WITH_LORA:
        per_rank = not split_kind(kind).form
        found[f"{kind}, rank 5"] = failure(
            lambda kind=kind, per_rank=per_rank: probe(kernel_of(kind, 5, per_rank), 5, CPU)
        )
    for kind in WITH_LOKR:
        for rank in (16, 1):
            found[f"lokr {kind}, {rank}"] = failure(
                lambda kind=kind, rank=rank: probe(kernel_of(f"lokr {kind}", rank, False), rank, CPU)
            )
    found["a DoRA's LoKr"] = failure(lambda: probe(kernel_of("dora lokr fp8 e4m3", 16, False), 16, CPU))
    for number, sides in enumerate(SIDES):
        alpha = (0.0, -0.7, 1.5)[number % 3]
        for strength in {alpha, -0.7}:
            kind = "fp8 e4m3" if sides[1] * sides[3] % 16 == 0 else "fp8 e4m3 scaled odd"
            found[f"{kind}, sides {sides}, {strength}"] = failure(
                lambda kind=kind, sides=sides, strength=strength: with_sides(kind, *sides, strength)
            )
    found["nf4, no strength"] = failure(lambda: with_sides("nf4 64 by fp16", 3, 4, 7, 48, 0.0))
    found["Q4_K, no strength"] = failure(lambda: with_sides("Q4_K baked by fp16", 2, 4, 5, 64, 0.0))
    for rank in RANKS:
        found[f"rank {rank}"] = failure(lambda rank=rank: probe(kernel_of("fp8 e4m3", rank, False), rank, CPU))
    for kind, rank, per_rank, spans in SPANS:
        kernel = kernel_of(kind, rank, per_rank, spans=spans, stages=2)
        found[f"{kind}, rank {rank}, {spans} tiles a program"] = failure(
            lambda kernel=kernel, rank=rank: probe(kernel, rank, CPU)
        )
    found["infinities"] = failure(infinite)
    found["looked at once"] = failure(looked_at_once)
    found["factors of rows"] = failure(factors_of_rows_alone)
    found["a LoKr through a layer"] = failure(through_a_layer)
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, rank, old, new) in FAULTS.items():
            kernel = kernel_of(kind, rank, False)
            kernel.function = getattr(with_fault(old, new, folder), kernel.function.__name__)
            found[f"fault: {name}"] = failure(lambda kernel=kernel, rank=rank: probe(kernel, rank, CPU))
        for name, (how, old, new) in TOKEN_FAULTS.items():
            kind, per_rank = (how, False) if isinstance(how, str) else ("nf4 64 by fp16", how)
            product, faulty = token_of(kind, per_rank), with_fault(old, new, folder, token_kernels)
            product.function, product.down_function = faulty.bnb4_token, faulty.down_of_token
            found[f"fault: {name}"] = failure(lambda product=product: probe_token(product, CPU))
        for name, (old, new) in FRAGMENT_FAULTS.items():
            kernel = fragments_of("fp4 64 nested256 by fp16" if "scale" in name else "nf4 64 by fp16", True)
            kernel.function = with_fault(old, new, folder, fragment_kernels).bnb4_fragments
            found[f"fault: {name}"] = failure(lambda kernel=kernel: probe(kernel, 16, CPU))
        kernel = fragments_of("nf4 64 by fp16", False)
        old = "_numbers(_pair(v[2 * n] * scale, v[2 * n + 1] * scale, VALUES, ASM), VALUES)"
        new = "v[2 * n] * scale, v[2 * n + 1] * scale"
        kernel.function = with_fault(old, new, folder, fragment_kernels).bnb4_fragments
        found["fault: fragments, a rounding left out"] = failure(lambda: weak_fragments(kernel))
        # That of all weights of four bits, through this product.
        old, new = "NESTED_SCALE + at // NESTED", "NESTED_SCALE + at * 0"
        # More rows than share a scale of scales.
        product = TokenProduct(ONE_TOKEN + NESTED, FP16, False, TOKEN_TILE._replace(rows=64))
        token_kernels._absmax, right = with_fault(old, new, folder)._absmax, token_kernels._absmax
        try:
            found["fault: a token's first scale of scales for all"] = failure(lambda: probe_token(product, CPU))
        finally:
            token_kernels._absmax = right
    return found


def main():
    if os.environ.get("TRITON_INTERPRET") == "1":
        found = interpret()
    else:
        found = {f"sm_{card}, {kind}": compile_for(card, kind, *rest) for card, kind, *rest in CARDS}
        found |= {
            f"sm_{card}, fragments of {kind}": compile_fragments_for(card, kind, dtype)
            for card, kind, dtype in FRAGMENT_CARDS
        }
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
