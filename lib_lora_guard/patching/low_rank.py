"""Joins the low-rank terms on one weight into few matrix products on the layer's input and output.

For every part of the input that terms read (the whole, or one slice) the `down` factors are joined along the rank;
every part of the output gets its own `up`. Strengths are not folded into the factors: one strength is the `alpha` of
the last product, several are a vector over the rank. So a change of strength moves no factor.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..adapters import LowRank, Slice
from ..adapters.base import product_of
from .device_cache import DeviceCache


@dataclass(frozen=True)
class Output:
    """Ranks `start : start + up.shape[1]` of a block go to `part` of the output through `up` `(out, rank)`."""

    up: torch.Tensor
    start: int
    part: Slice | None


@dataclass(frozen=True)
class Block:
    """All terms that read one part of the input. `down` is `(rank, in * kernel)`."""

    down: torch.Tensor
    part: Slice | None
    outputs: tuple[Output, ...]

    @property
    def is_whole(self) -> bool:
        """True if all terms are on all of the output."""
        return len(self.outputs) == 1 and self.outputs[0].part is None

    def whole_up(self, rows: int) -> torch.Tensor:
        """Returns one `up` `(rows, rank)` for all of the output: zero where a term has no part in it."""
        first = self.outputs[0].up
        if self.is_whole:
            return first
        whole = torch.zeros(rows, self.down.shape[0], dtype=first.dtype, device=first.device)
        for output in self.outputs:
            of_part = whole if output.part is None else output.part.of(whole)
            of_part.narrow(1, output.start, output.up.shape[1]).copy_(output.up)
        return whole


@dataclass(frozen=True)
class Scale:
    """The factor on a block's `down @ x`: `alpha`, and where strengths differ one fp32 number per rank, `(rank,)`."""

    alpha: float
    per_rank: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Entry:
    """One additive low-rank term: `strength * factors` on `part` of the weight."""

    factors: LowRank
    strength: float
    part: Slice | None = None


MOST_VECTORS = 64
"""As many different ones are kept for stacks that are made one after the other."""


class ScaleVectors:
    """Scales with one value per rank, on their devices, shared by all layers that need the same ones.

    A stack, and a change of strengths, copies a handful of vectors to a device instead of one per layer (measured on an H200:
    3 LoRAs on 304 layers, 41 ms).
    """

    _present: weakref.ref[ScaleVectors] | None = None

    @classmethod
    def present(cls) -> ScaleVectors:
        """Returns those of the stacks that are being made now. They go with the last layer that has them."""
        found = None if cls._present is None else cls._present()
        if found is None or len(found._vectors) >= MOST_VECTORS:
            found = cls()
            cls._present = weakref.ref(found)
        return found

    def __init__(self) -> None:
        self._vectors: dict[tuple[tuple[int, ...], tuple[float, ...]], DeviceCache[torch.Tensor]] = {}

    def get(self, ranks: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> torch.Tensor:
        """Returns `scales[i]` repeated `ranks[i]` times. fp32 whatever the activations are: in bf16 0.85 is 0.8516."""

        def make() -> torch.Tensor:
            return torch.tensor(scales, dtype=torch.float32).repeat_interleave(torch.tensor(ranks)).to(device)

        cache = self._vectors.get((ranks, scales))
        if cache is None:
            cache = self._vectors[ranks, scales] = DeviceCache()
        return cache.get(device, torch.float32, make)

    def drop(self) -> None:
        """Frees all vectors."""
        self._vectors.clear()


class Scaling(NamedTuple):
    """The strengths of the terms at one time. Replaced as a whole: a forward of another thread sees one or the other.

    Attributes:
        scales: The factor of each entry.
        vectors: Shared by all layers whose strengths change together.
    """

    scales: tuple[float, ...]
    vectors: ScaleVectors


class JoinedLowRank:
    """Low-rank terms on one weight, joined.

    Args:
        entries: The terms. They must fit the weight (`planning.cheap.form_of` checks that).
        shape: The shape of the weight.
    """

    def __init__(self, entries: Sequence[Entry], shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._entries = tuple(entries)
        self.scaling = Scaling(self.scales_at(entry.strength for entry in entries), ScaleVectors.present())
        groups: dict[Slice | None, dict[Slice | None, list[int]]] = {}
        for number, entry in enumerate(entries):
            groups.setdefault(_side(entry.part, 1), {}).setdefault(_side(entry.part, 0), []).append(number)
        self._groups = groups
        self._blocks: DeviceCache[tuple[Block, ...]] = DeviceCache()
        self._made: tuple[tuple[Block, ...], Scaling, tuple[tuple[Block, Scale], ...]] | None = None

    @property
    def rank(self) -> int:
        """The rank of all terms together."""
        return sum(entry.factors.rank for entry in self._entries)

    @property
    def is_one_product(self) -> bool:
        """True if the terms on a matrix read the whole of its input: one `up @ down` is what they add to it, together."""
        return list(self._groups) == [None] and len(self.shape) == 2

    def scales_at(self, strengths: Iterable[float]) -> tuple[float, ...]:
        """Returns the factor of each entry at these strengths."""
        return tuple([s * entry.factors.scale for s, entry in zip(strengths, self._entries, strict=True)])

    def exchange(self, scaling: Scaling) -> None:
        """Replaces the strengths.

        Args:
            scaling: Its scales are from `scales_at`, or it is an earlier `scaling`.
        """
        self.scaling = scaling

    def share_factors_with(self, older: JoinedLowRank) -> None:
        """Takes the device copies over from a stack that differs in strengths alone."""
        if len(self._entries) == len(older._entries) and all(
            mine == theirs and (new is old or _identity(new) == _identity(old))
            for (*mine, new), (*theirs, old) in zip(self._in_order(), older._in_order(), strict=True)
        ):
            self._blocks = older._blocks

    def drop_device_copies(self) -> None:
        """Frees the copies on devices; the next call makes them again."""
        self._blocks.drop()
        self._made = None
        self.scaling.vectors.drop()

    @property
    def is_resident(self) -> bool:
        """True while copies on a device exist."""
        return len(self._blocks) > 0

    @property
    def is_ready(self) -> bool:
        """True if the next call on a device makes nothing: the copies are there, with the present strengths beside them."""
        made = self._made
        return made is not None and made[1] is self.scaling and self.is_resident

    def device_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the joined factors on a device, in `dtype`."""
        total = 0
        for factors in self._all_factors():
            kernel = 1 if factors.mid is None else product_of(factors.mid.shape[2:])
            total += factors.up.numel() + factors.rank * factors.down.shape[1] * kernel
        return total * dtype.itemsize

    def parts(self, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Block, Scale], ...]:
        """Returns the blocks and their scales on `device`."""
        # Another thread may exchange the strengths meanwhile: all of these parts have the ones of now.
        join, scaling = joins_on(device), self.scaling
        blocks = self._blocks.get(device, dtype, lambda: tuple(self._make_blocks(device, dtype, join)))
        if not join:
            # Not kept on the CPU: these may be copies of the factors in another dtype.
            return tuple(zip(blocks, self._make_scales(scaling, device, join), strict=True))
        made = self._made
        if made is None or made[0] is not blocks or made[1] is not scaling:
            parts = tuple(zip(blocks, self._make_scales(scaling, device, join), strict=True))
            made = self._made = (blocks, scaling, parts)
        return made[2]

    def known_parts(self, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Block, Scale], ...] | None:
        """Returns what `parts` would, if nothing has to be made for it; else None."""
        made = self._made
        if made is None or made[1] is not self.scaling or made[0] is not self._blocks.known(device, dtype):
            return None
        return made[2]

    def factor_tensors(self) -> list[torch.Tensor]:
        """Returns the tensors that the device copies are made from."""
        return [tensor for factors in self._all_factors() for tensor in _tensors(factors)]

    def make(self, device: torch.device, dtype: torch.dtype, there: Mapping[int, torch.Tensor]) -> None:
        """Makes the copies on a device now, from factors that are there already.

        Args:
            device: The device.
            dtype: Of the activations.
            there: What of `factor_tensors` lies on the device, by the id of the tensor.
        """
        join = joins_on(device)
        self._blocks.get(device, dtype, lambda: tuple(self._make_blocks(device, dtype, join, there)))

    def make_scales(self, device: torch.device, dtype: torch.dtype) -> None:
        """Puts the present strengths beside the copies on a device, if there are any."""
        if self._blocks.known(device, dtype) is not None:
            self.parts(device, dtype)

    def parts_in_ram(self, join: bool) -> tuple[tuple[Block, Scale], ...]:
        """Returns the blocks and their scales in RAM and in fp32. Nothing of them is kept.

        `join`: as on the device, so that the blocks correspond one to one.
        """
        cpu = torch.device("cpu")
        blocks = self._blocks.get(cpu, torch.float32, lambda: tuple(self._make_blocks(cpu, torch.float32, join)))
        return tuple(zip(blocks, self._make_scales(self.scaling, cpu, join), strict=True))

    def _make_blocks(
        self, device: torch.device, dtype: torch.dtype, join: bool, there: Mapping[int, torch.Tensor] | None = None
    ) -> Iterator[Block]:
        for in_part, outputs in self._groups.items():
            made: list[Output] = []
            downs: list[torch.Tensor] = []
            rank = 0
            for out_part, numbers in outputs.items():
                factors = [_there(self._entries[number].factors, there) for number in numbers]
                if join:
                    up, down = _joined(factors, device, dtype)
                    made.append(Output(up, rank, out_part))
                    downs.append(down)
                    rank += down.shape[0]
                else:
                    for up, down in (balanced(one, device, dtype) for one in factors):
                        yield Block(down, in_part, (Output(up, 0, out_part),))
            if join:
                yield Block(torch.cat(downs) if len(downs) > 1 else downs[0], in_part, tuple(made))

    def _make_scales(self, scaling: Scaling, device: torch.device, join: bool) -> Iterator[Scale]:
        for outputs in self._groups.values():
            entries = [entry for group in outputs.values() for entry in group]
            scales = tuple(scaling.scales[number] for number in entries)
            if not join:
                yield from (Scale(scale, None) for scale in scales)
            elif len(set(scales)) == 1:
                yield Scale(scales[0], None)
            else:
                ranks = tuple(self._entries[number].factors.rank for number in entries)
                yield Scale(1.0, scaling.vectors.get(ranks, scales, device))

    def _all_factors(self) -> Iterator[LowRank]:
        yield from (entry.factors for entry in self._entries)

    def _in_order(self) -> Iterator[tuple[Slice | None, Slice | None, LowRank]]:
        """Yields the factors in the order of the blocks, each with its parts of the input and the output."""
        for in_part, outputs in self._groups.items():
            for out_part, numbers in outputs.items():
                yield from ((in_part, out_part, self._entries[number].factors) for number in numbers)


def joins_on(device: torch.device) -> bool:
    """Returns True if terms are joined on `device`. On the CPU they are not: joining is a copy."""
    return device.type != "cpu"


def _joined(factors: Sequence[LowRank], device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `up` and `down` of several terms on `device`, in `dtype`, side by side along the rank."""
    first = factors[0]
    if len(factors) == 1:
        up, down = balanced(first, device, dtype)
        return _settled(up), _settled(down)
    stored = first.up.dtype
    if stored.itemsize > 1 and all(one.is_pair and one.up.dtype == one.down.dtype == stored for one in factors):
        # Joined before they are converted: that is a few calls of the device for a layer, and not for each term. Not every torch
        # can join fp8.
        up = torch.cat([one.up.to(device) for one in factors], 1)
        return balanced(LowRank(up, torch.cat([one.down.to(device) for one in factors]), 1.0), device, dtype)
    pairs = [balanced(one, device, dtype) for one in factors]
    return torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])


KERNELS_ALIGNMENT = 16
"""Bytes: kernels read from such places in the largest steps."""


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that begins at such a place on a device: a view of what was brought there in one piece may not."""
    return tensor.clone() if tensor.device.type != "cpu" and tensor.data_ptr() % KERNELS_ALIGNMENT else tensor


LARGEST_ACTIVATION = 3e4
"""The largest activation that a 16-bit model may have; fp16 ends at 65504 and Forge clips at 32768."""


def balanced(factors: LowRank, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `up` and `down` on `device`, in `dtype`.

    In fp16 a power of two per rank goes from `down` to `up`, so that the activation between them stays finite for inputs
    up to LARGEST_ACTIVATION. Powers of two change no bit, unless an entry of `down` becomes subnormal (an absolute error
    of 3e-8).
    """
    if dtype != torch.float16:
        return factors.dense_up(dtype, device), factors.dense_down(dtype, device)
    up, down = factors.dense_up(torch.float32, device), factors.dense_down(torch.float32, device)
    shift = shift_for_fp16(down)
    # Less if an entry of `up` would leave fp16's range: with scales near 1 such results leave it anyway.
    largest = up.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny)
    shift = torch.maximum(shift, torch.exp2((largest / torch.finfo(dtype).max).log2().ceil()).clamp(max=1.0))
    return (up / shift).to(dtype), (down * shift.unsqueeze(1)).to(dtype)


def shift_for_fp16(matrix: torch.Tensor) -> torch.Tensor:
    """Returns a power of two, at most 1, per row of `matrix` (fp32).

    With it `shift * row @ x` stays inside fp16 for every x with entries up to LARGEST_ACTIVATION.
    """
    largest = matrix.abs().sum(1).clamp_min(torch.finfo(torch.float32).tiny) * LARGEST_ACTIVATION
    return torch.exp2((torch.finfo(torch.float16).max / largest).log2().floor()).clamp(max=1.0)


def _extra(factors: LowRank) -> tuple[torch.Tensor | None, ...]:
    return factors.mid, factors.row_scale, factors.column_scale


def _tensors(factors: LowRank) -> list[torch.Tensor]:
    return [factors.up, factors.down, *(tensor for tensor in _extra(factors) if tensor is not None)]


def _there(factors: LowRank, there: Mapping[int, torch.Tensor] | None) -> LowRank:
    """Returns the factors with the tensors that lie on a device already."""
    if not there:
        return factors
    up, down = (there.get(id(own), own) for own in (factors.up, factors.down))
    others = [None if own is None else there.get(id(own), own) for own in _extra(factors)]
    return LowRank(up, down, factors.scale, *others)


def _identity(factors: LowRank) -> tuple[object, ...]:
    extra = map(id, _extra(factors))
    return factors.up.data_ptr(), factors.down.data_ptr(), factors.up.shape, factors.down.shape, *extra


def _side(part: Slice | None, dim: int) -> Slice | None:
    return part if part is not None and part.dim == dim else None
