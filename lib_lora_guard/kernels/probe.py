"""Probes a kernel: small weights of odd shapes and odd values, compared with the twin and with fp64.

Only the kernel itself runs on the card. All else is calculated on the processor: a product of PyTorch's on the card would load
libraries there and keep a workspace, more than 100 MB that an image may need.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import torch

from . import twin
from .factors import Change, Factors, Sides
from .launch import Kernel
from .recipes import ONE_TOKEN, Recipe, recipe_of
from .stored import Bnb4, Fp8, Gguf, Int8, Nested, Stored
from .token_product import TokenProduct

CPU = torch.device("cpu")
Placed = TypeVar("Placed", bound=Stored | Factors | Sides | Nested)
SLACK = 1.1
"""A kernel's error against fp64 may be this many times the twin's: both round once, sums differ in their order."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ProbeError(Exception):
    """A kernel gives other values than its twin."""


def probe(kernel: Kernel, rank: int, device: torch.device) -> None:
    """Runs a kernel on two small weights and compares.

    Args:
        kernel: The kernel.
        rank: The rank of the factors, 0 for none.
        device: The device to probe on.

    Raises:
        ProbeError: A value is not the twin's, or the error is larger than the twin's.
    """
    generator = torch.Generator().manual_seed(rank)
    step = _column_step(kernel.kind)
    # The tiles of one program and a bit of a second one's in both directions; then less than one tile.
    wide = kernel.tile.columns * kernel.tile.spans
    sizes = ((kernel.tile.rows + 3, -(-wide // step) * step + step), (5, step))
    if kernel.constants["KRONECKER"]:
        # Blocks of other sizes than tiles, some of them across two; then one whose rows are the weight's.
        many, few = (24, 8) if kernel.constants["EVEN_RANK"] else (12, 4)
        columns = math.lcm(step, many)
        sizes = (
            (3 * (kernel.tile.rows // 2 + 3), -(-(wide + 1) // columns) * columns),
            (5, math.lcm(step, few)),
        )
    for is_second, (rows, columns) in enumerate(sizes):
        stored = sample(kernel.kind, rows, columns, kernel.dtype, generator, CPU)
        factors: Change | None = None
        if kernel.constants["KRONECKER"]:
            height, width = (rows, few) if is_second else (rows // 3, many)
            factors = sample_sides(rows, columns, height, width, kernel.dtype, generator, CPU)
        elif rank:
            factors = sample_factors(rows, columns, rank, kernel.has_per_rank, kernel.dtype, generator, CPU)
            if kernel.constants["HADAMARD"]:
                second = sample_factors(rows, columns, rank, False, kernel.dtype, generator, CPU)
                factors = dataclasses.replace(factors, times=(second.up, second.down), alpha=5.0)
        if factors is not None and kernel.constants["ROW_SCALED"]:
            factors = dataclasses.replace(factors, row_scale=torch.rand(rows, generator=generator) + 0.5)
        there = None if factors is None else moved(factors, device)
        made = kernel(moved(stored, device), there)
        compare(made, stored, factors, kernel.dtype)


def probe_token(product: TokenProduct, device: torch.device, rank: int | None = None) -> None:
    """Runs a product with one token on two small weights, and compares it with the twin's temporary weight.

    Args:
        product: The product.
        device: The device to probe on.
        rank: The rank of the factors. None: more than it takes at once, and no multiple of that.

    Raises:
        ProbeError: The error is larger than the twin's.
    """
    rank = product.tile.words + 13 if rank is None else rank
    generator = torch.Generator().manual_seed(rank)
    block = int(product.constants["BLOCK"])
    # More rows than one program's, more words of a row than one turn's; then less than either.
    for rows, columns in ((product.tile.rows * 2 + 3, -(-product.tile.words * 8 // block) * block + block), (5, block)):
        stored = sample(product.kind.removeprefix(ONE_TOKEN), rows, columns, product.dtype, generator, CPU)
        if isinstance(stored, Bnb4) and (nested := stored.nested) is not None:
            # Scales that differ by more than the offset, which is the same for all.
            stored = dataclasses.replace(stored, nested=dataclasses.replace(nested, code=nested.code * 100))
        factors = sample_factors(rows, columns, rank, product.has_per_rank, product.dtype, generator, CPU)
        token = torch.randn(1, columns, generator=generator).to(product.dtype)
        there, here = moved(stored, device), token.to(device)
        # Strong LoRAs show what is wrong with them, and weak ones what is wrong with the weight.
        for alpha in (factors.alpha, 0.02):
            weighed = dataclasses.replace(factors, alpha=alpha)
            bias = (torch.randn(rows, generator=generator) * alpha).to(product.dtype) if rows > 5 else None
            made = product(there, moved(weighed, device), here, None if bias is None else bias.to(device))
            compare_product(made, stored, weighed, token, bias)


def compare_product(
    made: torch.Tensor | None, stored: Stored, factors: Factors, token: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Compares a product with the twin's, on the processor, by the errors of both against fp64.

    Args:
        made: The kernel's product, on any device; None where it did not run.
        stored, factors, token, bias: What it was made of, in RAM.

    Raises:
        ProbeError: They differ by more than roundings.
    """
    if made is None:
        raise ProbeError("the kernel did not run")
    made, dtype = made.to(CPU), token.dtype
    exact = twin.dequantised(dataclasses.replace(stored, values=torch.float32), torch.float32).double()
    exact = (exact + _exact(factors) * factors.alpha) @ token.double().flatten()
    # As the host rounds: the weight, its product, what the LoRAs make of it.
    expected = torch.nn.functional.linear(token, twin.with_factors(twin.dequantised(stored, dtype), factors), bias)
    exact = (exact if bias is None else exact + bias.double()).view(expected.shape)
    if made.shape != expected.shape:
        raise ProbeError(f"a product of {list(made.shape)}, the twin's is {list(expected.shape)}")
    finite = exact.isfinite() & expected.isfinite()
    if not torch.equal(made[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0)):
        raise ProbeError("NaN or infinities in other places than the twin has them")
    error, twins = ((x.double() - exact)[finite].norm().item() for x in (made, expected))
    if not error <= SLACK * twins:
        raise ProbeError(f"error {error:.3g}, the twin's {twins:.3g}")


def compare(made: torch.Tensor | None, stored: Stored, factors: Change | None, dtype: torch.dtype) -> None:
    """Compares a weight with the twin's, on the processor: bit for bit without factors, else by its error against fp64.

    Args:
        made: The kernel's weight, on any device; None where it did not run.
        stored: The weight as it is stored, in RAM.
        factors: What was added, in RAM.
        dtype: The layer's.

    Raises:
        ProbeError: They differ.
    """
    if made is None:
        raise ProbeError("the kernel did not run")
    made = made.to(CPU)
    base = twin.dequantised(stored, dtype)
    expected = base if factors is None else twin.with_factors(base.clone(), factors)
    if not torch.equal(made.isnan(), expected.isnan()):
        raise ProbeError("NaN in other places than the twin has it")
    if factors is None:
        wrong = (made != expected) & ~expected.isnan()
        if bool(wrong.any()):
            row, column = (int(number) for number in wrong.nonzero()[0])
            raise ProbeError(
                f"{int(wrong.sum())} of {wrong.numel()} values are wrong, the first at row {row}, column {column}: "
                f"{float(made[row, column])!r} instead of {float(expected[row, column])!r}"
            )
        return
    exact = _exact(factors)
    scaled = base.double() if factors.row_scale is None else base.double() * factors.row_scale.double().unsqueeze(1)
    exact = scaled + exact * factors.alpha
    finite = exact.isfinite() & expected.isfinite()
    if not torch.equal(made[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        raise ProbeError("infinities in other places than the twin has them")
    error, twins = ((x.double() - exact)[finite].square().mean().sqrt().item() for x in (made, expected))
    largest, twins_largest = ((x.double() - exact)[finite].abs().max().item() for x in (made, expected))
    if error > SLACK * twins or largest > 2 * twins_largest:
        raise ProbeError(f"error {error:.3g} (largest {largest:.3g}), the twin's {twins:.3g} ({twins_largest:.3g})")


def _exact(factors: Change) -> torch.Tensor:
    """Returns what the factors add to a weight, without alpha, in fp64."""
    if isinstance(factors, Sides):
        return torch.kron(factors.left.double(), factors.right.double())
    up = factors.up.double()
    if factors.per_rank is not None:
        up = up * factors.per_rank.double()
    exact = up @ factors.down.double()
    if factors.times is not None:
        exact = exact * (factors.times[0].double() @ factors.times[1].double())
    return exact


def moved(thing: Placed, device: torch.device) -> Placed:
    """Returns a stored weight or factors with all tensors on `device`."""
    fields = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in fields.items() if isinstance(value, torch.Tensor)
    }
    if isinstance(pair := fields.get("times"), tuple):
        tensors["times"] = tuple(one.to(device) for one in pair)
    if isinstance(nested := fields.get("nested"), Nested):
        tensors["nested"] = moved(nested, device)
    return dataclasses.replace(thing, **tensors)


def sample(
    kind: str, rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Stored:
    """Makes a weight of a kind, with every pattern of bits that its numbers can have.

    Args:
        kind: `Stored.kind`.
        rows: Its rows.
        columns: Its columns; a kind says what they must be multiples of.
        dtype: The layer's dtype.
        generator: The source of its values.
        device: Where it lies.
    """
    recipe = recipe_of(kind)
    assert recipe is not None
    make = {"scaled": _scaled_sample, "bnb4": _bnb4_sample, "gguf": _gguf_sample}[recipe.function]
    values = _DTYPES.get(kind.partition(" by ")[2])
    return make(recipe, rows, columns, values, generator, device)


def _scaled_sample(
    recipe: Recipe,
    rows: int,
    columns: int,
    values: torch.dtype | None,
    generator: torch.Generator,
    device: torch.device,
) -> Stored:
    scale = None
    if recipe.constants["SCALED"]:
        scale = _numbers(generator, rows if rows % 2 else 1).to(device)
    # Each byte occurs: with them the infinities and NaN of fp8.
    data = torch.arange(rows * columns).to(torch.uint8).view(rows, columns).to(device)
    if recipe.constants["FORM"] == "int8":
        return Int8(data.view(torch.int8), values, scale)
    return Fp8(
        data.view(torch.float8_e4m3fn if recipe.constants["FORM"] == "e4m3" else torch.float8_e5m2), values, scale
    )


def _bnb4_sample(
    recipe: Recipe,
    rows: int,
    columns: int,
    values: torch.dtype | None,
    generator: torch.Generator,
    device: torch.device,
) -> Stored:
    block, nested_block = int(recipe.constants["BLOCK"]), int(recipe.constants["NESTED"])
    blocks = -(-rows * columns // block)
    data = _bytes(generator, (rows * columns + 1) // 2, 1).to(device)
    form = str(recipe.constants["FORM"])
    if not nested_block:
        return Bnb4(data, values, _numbers(generator, blocks).to(device), (rows, columns), form, block)
    nested = Nested(
        _numbers(generator, 256).sub_(0.01).to(device),
        _numbers(generator, -(-blocks // nested_block)).to(device),
        _numbers(generator, 1)[0].to(device),
        nested_block,
    )
    return Bnb4(data, values, _bytes(generator, blocks).to(device), (rows, columns), form, block, nested)


def _gguf_sample(
    recipe: Recipe,
    rows: int,
    columns: int,
    values: torch.dtype | None,
    generator: torch.Generator,
    device: torch.device,
) -> Stored:
    form, baked = str(recipe.constants["FORM"]), bool(recipe.constants["BAKED"])
    blocks = _bytes(generator, rows * columns // int(recipe.constants["BLOCK"]), int(recipe.constants["BLOCK_BYTES"]))
    # The scales in a block's bytes must be numbers of a usual size: the first two, or where the format has them.
    first, count = {"Q6_K": (208, 1), "Q5_K": (0, 2), "Q4_K": (0, 16 if baked else 2)}.get(form, (0, 1))
    dtype = values if baked and values is not None else torch.float16
    scales = _numbers(generator, len(blocks), count).to(dtype)
    blocks[:, first : first + 2 * count] = scales.view(torch.uint8)
    return Gguf(blocks.to(device), values, form, (rows, columns), baked)


def _bytes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * 0.02 + 0.001


def sample_factors(
    rows: int,
    columns: int,
    rank: int,
    per_rank: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> Factors:
    """Makes factors whose product is as large as the values of `sample`."""
    up, down = (
        (torch.randn(shape, generator=generator) * rank**-0.25 * 0.3).to(device, dtype)
        for shape in ((rows, rank), (rank, columns))
    )
    strengths = (torch.rand(rank, generator=generator) + 0.5).to(device) if per_rank else None
    return Factors(up, down, 0.7, strengths)


def sample_sides(
    rows: int,
    columns: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> Sides:
    """Makes the sides of a LoKr, the right one `(height, width)`, whose products are as large as the values of `sample`."""
    left, right = (
        (torch.randn(shape, generator=generator) * 0.3).to(device, dtype)
        for shape in ((rows // height, columns // width), (height, width))
    )
    return Sides(left, right, 0.7)


def _column_step(kind: str) -> int:
    """Returns what a weight's columns are multiples of, for this kind and no other."""
    recipe = recipe_of(kind)
    assert recipe is not None
    constants = recipe.constants
    if recipe.function == "scaled":
        return 16 if constants["EVEN"] else 13
    if recipe.function == "bnb4":
        return 12 if constants["CROSSING"] else max(32, int(constants["BLOCK"]))
    return int(constants["BLOCK"])
