"""Launches a compiled kernel on the tensors of one weight."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..weights.bnb4 import LEVELS
from .factors import Change, Factors, Sides
from .recipes import FRAGMENTS, HADAMARD, KRONECKER, OLDEST_TRITON, Tile, chunk_of, recipe_of, takes_fragments, tile_of
from .stored import Bnb4, Fp8, Gguf, Int8, Stored

ALIGNED_BYTES = 16
"""Kernels are compiled for tensors that begin at a multiple of this: they read 16 bytes at once."""
FRAGMENTS_SWITCH = "LORA_GUARD_FRAGMENTS"
"""1 in the environment: NF4 and FP4 with a LoRA of 16 ranks take the kernel of `fragment_kernels.py`. Off until it is measured in whole steps."""
_FIRST_WITH_CONSTANTS = (3, 3)
"""From this Triton on a compiled kernel takes all arguments of its function, the compile-time constants among them."""

Handle: TypeAlias = Callable[[tuple[int, int, int], tuple[Any, ...]], None]
"""Launches a compiled kernel: the grid, and the arguments in order."""


def interprets() -> bool:
    """Returns True where Triton calculates on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class OldTritonError(ImportError):
    """Triton is older than the kernels. The error's text is its version."""


def triton_version() -> tuple[int, int]:
    """Returns the first two numbers of Triton's version, very large ones where it states none: then a probe decides.

    Raises:
        ImportError: There is no Triton, or it fails to load.
    """
    triton = importlib.import_module("triton")
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return (int(found[1]), int(found[2])) if found else (9999, 0)


def triton_kernels() -> Any:
    """Imports the kernels that make weights, and with them Triton. Raises what `kernels_of` does."""
    return kernels_of("triton_kernels")


def kernels_of(module: str) -> Any:
    """Imports a module of kernels, and with it Triton.

    Raises:
        ImportError: There is no Triton, or it fails to load.
        OldTritonError: It cannot compile the kernels; not even their import is tried.
    """
    if (version := triton_version()) < OLDEST_TRITON:
        raise OldTritonError("{}.{}".format(*version))
    return importlib.import_module(f".{module}", __package__)


def load_triton() -> None:
    """Imports all that a first launch would import: 0.2 s and more of the interpreter's lock.

    Raises:
        ImportError: As `kernels_of` says.
    """
    triton_kernels()
    for module in ("triton.compiler", "triton.experimental.gluon"):
        with contextlib.suppress(ImportError):  # not in every Triton
            importlib.import_module(module)


def has_fp8_instructions() -> bool:
    """Returns True where the present card converts fp8 itself: sm_89 and newer."""
    return not interprets() and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def uses_fragments() -> bool:
    """Returns True where the present card has the products of `fragment_kernels.py`, sm_80 and newer, and it is switched on."""
    if os.environ.get(FRAGMENTS_SWITCH) != "1" or interprets():
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


class _Change:
    """A kernel's arguments for some factors.

    Args:
        tensors: UP, DOWN, PER_RANK, ROW_SCALE, UP2 and DOWN2. Where the kernel reads none any other stands in its place.
        numbers: Rows, columns, rank, height and alpha.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...], numbers: tuple[Any, ...]) -> None:
        self.tensors, self.numbers = tensors, numbers
        self.addresses = [tensor.data_ptr() for tensor in tensors]
        self.joined_addresses = functools.reduce(operator.or_, self.addresses)
        """A bit is set where one of them has it."""


class Kernel:
    """One kernel: a kind of weight, a dtype, a bucket of ranks.

    Args:
        kind: `Stored.kind`.
        dtype: The dtype of the weights it makes.
        bucket: The ranks it counts with, 0 for none.
        even_rank: True for ranks that are multiples of 16, and for a LoKr as `rank_of_sides` says.
        per_rank: True for factors with a strength for each rank.
        tile: Another tile than `tile_of` gives, to measure.
        fragments: Whether the kernel of `fragment_kernels.py` is taken where it makes this; None: as `uses_fragments` says.

    Raises:
        ImportError: As `kernels_of` says.
        ValueError: The kind has no kernel.
    """

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype,
        bucket: int,
        even_rank: bool,
        per_rank: bool,
        tile: Tile | None = None,
        fragments: bool | None = None,
    ) -> None:
        module, recipe = triton_kernels(), recipe_of(kind)
        if recipe is None:
            raise ValueError(f"no kernel for {kind}")
        tl = module.tl
        names = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}
        layer = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        self.kind, self.dtype, self.has_per_rank = kind, dtype, per_rank
        self._bucket = bucket
        self.function: Any = getattr(module, recipe.function)
        wanted = tile is None and uses_fragments() if fragments is None else fragments
        self.has_fragments = wanted and takes_fragments(recipe, layer, bucket, even_rank)
        if self.has_fragments:
            self.function = kernels_of("fragment_kernels").bnb4_fragments
        self.tile = tile or (FRAGMENTS if self.has_fragments else tile_of(recipe, bucket))
        self.constants: dict[str, Any] = {
            **recipe.constants,
            "VALUES": names[recipe.values or layer],
            "RANKS": bucket,
            "CHUNK": chunk_of(bucket),
            "HAS_PER_RANK": per_rank,
            "ROW_SCALED": recipe.is_row_scaled,
            "HADAMARD": recipe.form == HADAMARD,
            "KRONECKER": recipe.form == KRONECKER,
            "EVEN_RANK": even_rank,
            "BO": self.tile.rows,
            "BI": self.tile.columns,
        }
        if recipe.function == "scaled":
            self.constants["NATIVE"] = has_fp8_instructions()
        if recipe.function == "bnb4":
            self.constants |= {"SHUFFLE": not interprets(), "SPANS": self.tile.spans, "STAGES": self.tile.stages}
        if self.has_fragments:
            self.constants |= {"ASM": not interprets(), "WARPS": self.tile.warps}
        self.options: dict[str, Any] = {"num_warps": self.tile.warps, "enable_fp_fusion": False}
        self._handle: Handle | None = None

    def __call__(self, stored: Stored, factors: Change | None) -> torch.Tensor | None:
        """Returns the weight `(out, in)`, or None where a tensor begins at an address the kernel cannot take."""
        rows, columns = stored.shape
        data = stored.data
        out = torch.empty(rows, columns, dtype=self.dtype, device=data.device)
        mine, step = tensors_of(stored, out)
        if factors is None:
            if self._bucket:
                raise ValueError(f"{self.kind}: a kernel for {self._bucket} ranks got no factors")
            change = _Change((out,) * 6, (rows, columns, 0, 1, 0.0))
        else:
            # Of a layer they are the same ones in each call: looked at once.
            known = factors.known.get(self)
            change = known if known and known.numbers[:2] == (rows, columns) else self._change(factors, rows, columns)
        addresses = [tensor.data_ptr() for tensor in mine]
        addresses.append(out.data_ptr())
        joined = change.joined_addresses
        for address in addresses:
            joined |= address
        if joined % ALIGNED_BYTES:
            return None
        grid = (-(-columns // (self.tile.columns * self.tile.spans)), -(-rows // self.tile.rows), 1)
        if self._handle is None:
            tensors = (*mine, out, *change.tensors)
            self._launch_first(grid, typed(stored, tensors), step, change.numbers)
        else:
            self._handle(grid, (*addresses[:2], *step, *addresses[2:], *change.addresses, *change.numbers))
        return out

    def _change(self, factors: Change, rows: int, columns: int) -> _Change:
        """Returns the arguments for some factors on a weight of so many rows and columns.

        Raises:
            ValueError: They are not for this kernel, or not for this weight.
        """
        if isinstance(factors, Sides):
            left, right = self._sides(factors, rows, columns)
            height, width = right.shape
            row_scale = self._row_scale(factors, rows, right)
            return _Change(
                (left, right, right, row_scale, right, right), (rows, columns, width, height, float(factors.alpha))
            )
        up, down = factors.up, factors.down
        if (
            self.constants["KRONECKER"]
            or up.shape != (rows, down.shape[0])
            or down.shape[1] != columns
            or up.dtype != down.dtype
            or up.dtype != self.dtype
        ):
            raise ValueError(
                f"{self.kind}: expected factors of {rows} x rank and rank x {columns} in {self.dtype}, found {list(up.shape)} "
                f"{up.dtype} and {list(down.shape)} {down.dtype}"
            )
        if not (up.is_contiguous() and down.is_contiguous()):
            up, down = up.contiguous(), down.contiguous()
        per_rank = down if factors.per_rank is None else factors.per_rank.float()
        row_scale = self._row_scale(factors, rows, down)
        tensors = (up, down, per_rank, row_scale, *self._second(factors, down))
        change = _Change(tensors, (rows, columns, down.shape[0], 1, float(factors.alpha)))
        own = (factors.up, factors.down, factors.per_rank, factors.row_scale, *(factors.times or ()))
        if all(any(one is mine for mine in own) for one in tensors):
            # No copies, which would be kept with them.
            factors.known[self] = change
        return change

    def _row_scale(self, factors: Change, rows: int, unused: torch.Tensor) -> torch.Tensor:
        """Returns the factors of the rows; `unused` where there are none, and the kernel reads none."""
        scale = factors.row_scale
        if (scale is not None) != self.constants["ROW_SCALED"]:
            raise ValueError(f"{self.kind}: found {'no ' if scale is None else ''}factors of rows")
        if scale is None:
            return unused
        if scale.shape != (rows,) or scale.dtype != torch.float32:
            raise ValueError(f"{self.kind}: expected {rows} factors in fp32, found {list(scale.shape)}")
        return scale

    def _sides(self, sides: Sides, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        (a, b), (c, d) = sides.left.shape, sides.right.shape
        is_mine = self.constants["KRONECKER"] and (d % 8 == 0 or not self.constants["EVEN_RANK"])
        if not is_mine or (a * c, b * d) != (rows, columns) or {sides.left.dtype, sides.right.dtype} != {self.dtype}:
            raise ValueError(
                f"{self.kind}: found sides of {a} x {b} {sides.left.dtype} and {c} x {d} {sides.right.dtype} for {rows} x {columns}"
            )
        return sides.left.contiguous(), sides.right.contiguous()

    def _second(self, factors: Factors, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if factors.times is None and not self.constants["HADAMARD"]:
            return unused, unused
        up, down = factors.times or (unused, unused)
        if not self.constants["HADAMARD"] or (up.shape, down.shape) != (factors.up.shape, factors.down.shape):
            raise ValueError(f"{self.kind}: found a second pair of {list(up.shape)} and {list(down.shape)}")
        if up.dtype != factors.up.dtype or down.dtype != up.dtype:
            raise ValueError(
                f"{self.kind}: expected a second pair in {factors.up.dtype}, found {up.dtype} and {down.dtype}"
            )
        return up.contiguous(), down.contiguous()

    def _launch_first(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        step: tuple[int, ...],
        numbers: tuple[Any, ...],
    ) -> None:
        """Compiles the kernel if Triton has not, launches it as Triton's documentation does, and keeps what it compiled."""
        constants = {name: value for name, value in self.constants.items() if name in self.function.arg_names}
        compiled = self.function[grid](*tensors[:2], *step, *tensors[2:], *numbers, **constants, **self.options)
        self._handle = handle_of(compiled, self.function, self.constants)


def handle_of(compiled: Any, function: Any, constants: dict[str, Any]) -> Handle | None:
    """Returns what launches a compiled kernel by addresses and numbers alone; None where Triton itself must launch it each time.

    What Triton does beside this in each launch is to find the compiled kernel again: most of a launch's time.
    """
    if interprets() or triton_version() < _FIRST_WITH_CONSTANTS:
        return None
    in_order = tuple(constants[name] for name in function.arg_names if name in constants)
    return lambda grid, arguments: compiled[grid](*arguments, *in_order)


def tensors_of(stored: Stored, unused: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Returns a weight's tensors in the order of its kernel's pointers, and the scale's step where it has one."""
    if isinstance(stored, (Fp8, Int8)):
        scale = stored.scale
        if scale is None:
            return (stored.data, unused), (0,)
        if scale.dtype != torch.float32:
            scale = scale.float()
        return (stored.data, scale), (0 if scale.numel() == 1 else 1,)
    if isinstance(stored, Bnb4):
        levels = _levels(stored.form, stored.data.device)
        nested = stored.nested
        kinds = [
            stored.absmax.dtype,
            *([] if nested is None else [nested.code.dtype, nested.scales.dtype, nested.offset.dtype]),
        ]
        if kinds != [torch.float32 if nested is None else torch.uint8, *[torch.float32] * (len(kinds) - 1)]:
            raise ValueError(f"{stored.form}: expected scales in fp32, or in uint8 with scales in fp32, found {kinds}")
        if nested is None:
            return (stored.data, levels, stored.absmax, unused, unused, unused), ()
        return (stored.data, levels, stored.absmax, nested.code, nested.scales, nested.offset), ()
    assert isinstance(stored, Gguf)
    return (stored.data, stored.data), ()


def typed(stored: Stored, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Gives the stored bytes the dtype by which the kernel reads them."""
    data, second, *rest = tensors
    if isinstance(stored, Gguf):
        flat = data.reshape(-1).view(torch.uint8)
        wide = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat.view(torch.int16)
        return (flat.view(torch.int16), wide, *rest)
    if isinstance(stored, (Fp8, Bnb4)):
        data = data.reshape(-1).view(torch.uint8)
    if isinstance(stored, Bnb4) and not stored.is_crossing:
        data = data.view(torch.int32)
    return (data, second, *rest)


@functools.cache
def _levels(form: str, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(LEVELS[form], dtype=torch.float32, device=device)
