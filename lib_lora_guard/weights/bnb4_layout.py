"""How bitsandbytes lays out a 4-bit weight (NF4, FP4): its state, and the sizes that go with it. Needs no torch.

Source: bitsandbytes' documentation of `QuantState` and its state-dict layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FileFormatError

KINDS = ("nf4", "fp4")
NESTED_PARTS = ("nested_absmax", "nested_code", "offset")
LARGEST_STATE_BYTES = 1 << 16
"""The JSON of a real file has some 200 bytes."""


@dataclass(frozen=True)
class Part:
    """The facts of one stored tensor. `dtype` is the short name: "uint8", "fp32"."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @property
    def values(self) -> int:
        """Number of stored elements; a byte that packs two 4-bit weights counts once."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Bnb4Layout:
    """The layout of one weight of `shape`.

    Args:
        format: "nf4" or "fp4".
        shape: The weight's real shape.
        block: Values that share one absmax.
        nested_block: Values of absmax that share one nested absmax, if there is one.

    Raises:
        FileFormatError: bitsandbytes writes no such layout.
    """

    format: str
    shape: tuple[int, ...]
    block: int = 64
    nested_block: int = 256

    def __post_init__(self) -> None:
        if self.format not in KINDS:
            raise FileFormatError(f"bitsandbytes 4-bit: expected quant_type nf4 or fp4, found {self.format!r}")
        if not self.shape or not all(_is_count(n) for n in self.shape):
            raise FileFormatError(f"{self.format}: expected a shape of positive whole numbers, found {self.shape!r}")
        if not _is_count(self.block) or self.block % 2 or not _is_count(self.nested_block):
            raise FileFormatError(
                f"{self.format}: expected an even number of values a block and a positive one of nested blocks, found "
                f"{self.block!r} and {self.nested_block!r}"
            )

    @property
    def data_bytes(self) -> int:
        """The bytes of the packed values."""
        return (math.prod(self.shape) + 1) // 2

    def is_transposed(self, absmax: tuple[int, ...]) -> bool:
        """Returns True for an absmax whose blocks must be transposed to lie in the weight's order.

        bitsandbytes' kernels for CPUs (`_convert_weight_packed_for_cpu`) keep it as (blocks of a row, rows). A model that has
        run on a CPU is saved with that, beside weights in the usual order.

        Args:
            absmax: Its shape.

        Raises:
            FileFormatError: It has two dimensions, and they are no such ones.
        """
        if sum(size != 1 for size in absmax) < 2:
            return False
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        wanted = (columns // self.block, rows)
        if absmax != wanted or columns % self.block:
            raise FileFormatError(
                f"{self.format}: expected absmax in one dimension, or as {list(wanted)} from a model that has run on a CPU, found "
                f"{list(absmax)}; the file is damaged"
            )
        return True

    def check(self, parts: Mapping[str, Part]) -> None:
        """Compares the sizes of parts with the layout.

        Args:
            parts: `data`, `absmax`, and for nested scales all of `NESTED_PARTS`.

        Raises:
            FileFormatError: A size or a dtype does not fit.
        """
        blocks = -(-math.prod(self.shape) // self.block)
        self._expect("bytes of data", parts["data"].bytes, self.data_bytes)
        self._expect("values of absmax", parts["absmax"].values, blocks)
        self.is_transposed(parts["absmax"].shape)
        nested = [name for name in NESTED_PARTS if name in parts]
        if (parts["absmax"].dtype == "uint8") != (len(nested) == len(NESTED_PARTS)) or 0 < len(nested) < 3:
            raise FileFormatError(
                f"{self.format}: expected absmax in float, or in uint8 with {', '.join(NESTED_PARTS)}, found "
                f"{parts['absmax'].dtype} with {', '.join(nested) or 'none of them'}"
            )
        if nested:
            self._expect("values of nested_absmax", parts["nested_absmax"].values, -(-blocks // self.nested_block))
            self._expect("values of nested_code", parts["nested_code"].values, 256)
            self._expect("values of offset", parts["offset"].values, 1)

    def _expect(self, what: str, count: int, wanted: int) -> None:
        if count != wanted:
            raise FileFormatError(
                f"{self.format}: expected {wanted} {what} for shape {list(self.shape)} in blocks of {self.block}, found "
                f"{count}; the file is damaged"
            )


@dataclass(frozen=True)
class Bnb4InFile:
    """One weight of a file that bitsandbytes has written.

    Attributes:
        layout: Its layout.
        keys: The names in the file of `data`, `absmax` and the nested parts.
        offset: The number added to nested scales; None if the scales are not nested.
    """

    layout: Bnb4Layout
    keys: Mapping[str, str]
    offset: float | None


def state_key(name: str, kind: str) -> str:
    """Returns the name in a file of the state of the weight `name` ("x.weight")."""
    return f"{name}.quant_state.bitsandbytes__{kind}"


def find_in_file(stored: Mapping[str, Part], read: Callable[[str], bytes], name: str) -> Bnb4InFile:
    """Finds the parts of a weight in a safetensors file that bitsandbytes has written.

    Args:
        stored: The tensors of the file, at least those whose names begin with `name`.
        read: Returns the bytes of a tensor; called for the state, once its size is known to be small.
        name: The weight's name, "x.weight".

    Raises:
        FileFormatError: A part is missing or does not fit.
    """
    states = [key for kind in KINDS if (key := state_key(name, kind)) in stored]
    if len(states) != 1:
        raise FileFormatError(
            f"{name}: expected one {name}.quant_state.bitsandbytes__nf4 or __fp4, found {len(states)}; the file is not "
            "of bitsandbytes' 4-bit layout"
        )
    state = _state(stored[states[0]], read, states[0])
    keys = {"data": name, "absmax": f"{name}.absmax"}
    offset = None
    try:
        parts = {part: stored[key] for part, key in keys.items()}
        if f"{name}.nested_absmax" in stored:
            nested = {"nested_absmax": f"{name}.nested_absmax", "nested_code": f"{name}.nested_quant_map"}
            parts |= {part: stored[key] for part, key in nested.items()}
            keys |= nested
            offset = float(state["nested_offset"])
            parts["offset"] = Part((), "fp32", 4)
        shape, kind = state["shape"], state["quant_type"]
        layout = Bnb4Layout(
            kind if isinstance(kind, str) else repr(kind),
            tuple(shape) if isinstance(shape, list) else (),
            state["blocksize"],
            state.get("nested_blocksize", 256),
        )
        layout.check(parts)
    except KeyError as error:
        raise FileFormatError(f"{name}: {error.args[0]} is missing; the file is damaged") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{name}: {error}") from None
    return Bnb4InFile(layout, keys, offset)


def _state(stored: Part, read: Callable[[str], bytes], key: str) -> Mapping[str, Any]:
    if stored.dtype != "uint8" or stored.values > LARGEST_STATE_BYTES:
        raise FileFormatError(
            f"{key}: expected JSON in at most {LARGEST_STATE_BYTES} bytes of uint8, found {list(stored.shape)} "
            f"{stored.dtype}"
        )
    try:
        state = json.loads(read(key))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{key}: expected JSON, found {type(error).__name__}: {error}") from None
    if not isinstance(state, dict):
        raise FileFormatError(f"{key}: expected a JSON object, found {type(state).__name__}")
    return state


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
