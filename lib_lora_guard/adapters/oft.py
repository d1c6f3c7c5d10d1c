"""OFT: a weight turned by a block-diagonal rotation (arXiv 2306.07280), as LyCORIS, sd-scripts, peft and OneTrainer
train it.

Strength moves every factor, rotation and row scale, by that share from the identity: `I + s (F - I)`. LyCORIS
(`make_weight(scale)`) does so with the rotation but leaves its row scale whole, so that strength 0 would still change
the weight. peft has no strength for OFT.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..errors import LoraFileError, LoraMismatchError
from ..files import shown
from ..lazy_torch import torch
from .base import (
    Adapter,
    RowFunction,
    Shape,
    UnsuitedLayerError,
    channels_of,
    filled,
    is_narrower,
    mismatch,
    product_of,
)
from .boft import BoftAdapter
from .kinds import Found, Kind, register
from .rotations import (
    at_least_fp32,
    bounded,
    bounded_each,
    cayley_less_one,
    check_rows,
    check_turns,
    finish,
    scale_rows,
    series_less_one,
    skew_of,
    turn_columns,
    widened,
)

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class OftAdapter(Adapter):
    """Turns the output rows: `W' = rescale * R^T W` with `blocks` `(n, b, b)`, `n * b == out`.

    `alpha` times `out` bounds the norm of all skew blocks together; None or 0: no bound (LyCORIS `modules/diag_oft.py`;
    sd-scripts `networks/oft.py` has the same formula without `rescale` `(out, 1, ...)`). The bias is not turned.
    """

    kind: ClassVar[str] = "oft"
    blocks: torch.Tensor
    alpha: float | None = None
    rescale: torch.Tensor | None = None

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        _check_row_blocks(self.blocks, shape)
        check_rows("rescale", self.rescale, shape)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        base = widened(weight)
        # R^T is Cayley's transform of -S.
        turn = cayley_less_one(-self._skew(base))
        delta = torch.bmm(turn, base.reshape(*self.blocks.shape[:2], -1)).reshape(base.shape).mul_(strength)
        return finish(weight, base, scale_rows(base, delta, self.rescale, strength), function)

    def rows(self, start: int, length: int) -> OftAdapter | None:
        size = self.blocks.shape[1]
        if start % size or length % size:
            return None
        blocks = self.blocks
        if self.alpha:
            # The bound is the norm of all blocks, so it is worked in before some are left out: S is linear in Q.
            blocks = bounded(skew_of(at_least_fp32(blocks)), self.alpha) / 2
        rescale = None if self.rescale is None else self.rescale.flatten()[start : start + length]
        first, last = start // size, (start + length) // size
        return replace(self, blocks=blocks[first:last], alpha=None, rescale=rescale)

    def _skew(self, like: torch.Tensor) -> torch.Tensor:
        return bounded(skew_of(self.blocks.to(like)), self.alpha)


@dataclass(frozen=True, eq=False)
class ReadyOftAdapter(Adapter):
    """Turns the output rows by rotations that the file holds ready: `W' = R^T W` with `blocks` R `(n, b, b)`.

    LyCORIS of November 2023 to February 2024 saved OFT so, under `oft_diag`, its row scale multiplied in
    (`modules/diag_oft.py`, `custom_state_dict`).
    """

    kind: ClassVar[str] = "oft"
    blocks: torch.Tensor

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        _check_row_blocks(self.blocks, shape)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        base = widened(weight)
        count, size, _ = self.blocks.shape
        turn = self.blocks.to(base).mT - torch.eye(size, dtype=base.dtype, device=base.device)
        delta = torch.bmm(turn, base.reshape(count, size, -1)).reshape(base.shape).mul_(strength)
        return finish(weight, base, delta, function)

    def rows(self, start: int, length: int) -> ReadyOftAdapter | None:
        size = self.blocks.shape[1]
        if start % size or length % size:
            return None
        return replace(self, blocks=self.blocks[start // size : (start + length) // size])


@dataclass(frozen=True, eq=False)
class SplitOftAdapter(Adapter):
    """Several OFTs, one below the other, for the parts of a fused weight (query, key, value).

    sd-scripts trains Flux so: each part has blocks of its own size, and a bound by its own rows (`networks/oft_flux.py`).
    """

    kind: ClassVar[str] = "oft"
    parts: tuple[OftAdapter, ...]

    @property
    def alpha(self) -> float | None:
        """The bound that all parts share."""
        return self.parts[0].alpha

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        for part in self.parts:
            _check_row_blocks(part.blocks, (_rows_of(part), *shape[1:]))
        rows = sum(_rows_of(part) for part in self.parts)
        if not shape or rows != shape[0]:
            raise mismatch("OFT", (rows,), shape)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        if function is not None:
            # The host's function takes the delta of the whole weight.
            base = widened(weight).clone()
            return finish(weight, base, self.patch(base.clone(), strength, None) - base, function)
        start = 0
        for part in self.parts:
            rows = weight.narrow(0, start, _rows_of(part))
            patched = part.patch(rows, strength, None)
            if patched is not rows:
                rows.copy_(patched)
            start += _rows_of(part)
        return weight

    def rows(self, start: int, length: int) -> Adapter | None:
        """The adapter for rows of one part, or of several whole ones."""
        first, whole = 0, []
        for part in self.parts:
            last = first + _rows_of(part)
            if first <= start and start + length <= last:
                return part.rows(start - first, length)
            if start <= first and last <= start + length:
                whole.append(part)
            first = last
        if not whole or sum(_rows_of(part) for part in whole) != length:
            return None
        return replace(self, parts=tuple(whole))

    def tensors(self) -> Iterable[torch.Tensor]:
        for part in self.parts:
            yield from part.tensors()

    def map(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(self, parts=tuple(part.map(convert) for part in self.parts))

    def identity(self) -> tuple[object, ...]:
        return type(self), *(part.identity() for part in self.parts)


@dataclass(frozen=True, eq=False)
class PeftOftAdapter(Adapter):
    """Turns the input: `W' = f * W R^T` over the flattened input side.

    `packed` `(n, b (b - 1) / 2)` holds the upper triangle of each block, `n * b == in * kernel`; one block is shared by
    the whole input (`block_share`). peft and OneTrainer write it. Of a wider input projection the blocks turn the columns
    that they are for; the others stay as they are.

    Attributes:
        packed: the blocks.
        terms: is the length of the Neumann series that peft takes for Cayley's transform (its default is 5); None is
            the exact one. Only `adapter_config.json` says (`use_cayley_neumann`, `num_cayley_neumann_terms`), and it
            matters: the series approaches the transform of S, the exact formula is that of -S (peft
            `tuners/oft/layer.py`).
        shared: True if one block is for the whole input, False if each block has its own part; None if the file does not
            say: then a single block is shared.
        divisor: of the blocks before use (OneTrainer's scaled OFT).
        bound: each skew block is shortened to `bound / sqrt(n)` (peft's `coft`, `eps`); None for no bound.
        turns_kernels: a convolution is `W R`, as OneTrainer has it (`modules/module/LoRAModule.py`), not `W R^T`. Told by
            its header, its marker, or its flat names.
        factor: one number per row, f.
        magnitude: one number per row; f is the magnitude over the row's norm.
        initial_norm: the norms that the magnitude was trained with; those of the weight if the file does not say.
    """

    kind: ClassVar[str] = "oft"
    packed: torch.Tensor
    terms: int | None = 5
    shared: bool | None = None
    divisor: float = 1.0
    bound: float | None = None
    turns_kernels: bool = False
    factor: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    initial_norm: torch.Tensor | None = None

    @property
    def block_size(self) -> int:
        """Channels that one block turns."""
        return (1 + math.isqrt(1 + 8 * self.packed.shape[-1])) // 2

    @property
    def is_dora(self) -> bool:
        return self.magnitude is not None

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        size = self.block_size
        if self.packed.dim() != 2 or size * (size - 1) // 2 != self.packed.shape[1] or size < 2:
            found, wanted = list(self.packed.shape), "(n, b * (b - 1) / 2)"
            raise LoraMismatchError.of("lora.wrong_form", what="peft OFT", wanted=wanted, found=found)
        turned = self._turned_columns(shape)
        channels = channels_of(turned, shape, may_expand=may_expand)
        if channels is None:
            raise mismatch("peft OFT", (turned,), shape)
        if self.shared is None and self.packed.shape[0] == 1 and may_expand and is_narrower(size, shape):
            raise UnsuitedLayerError.of("lora.oft_one_block", size=size, shape=list(shape))
        check_turns(self.packed)
        check_rows("dora_multiplier", self.factor, shape)
        check_rows("dora_scale", self.magnitude, shape)
        check_rows("initial_norm", self.initial_norm, shape)
        if self.magnitude is not None and self.initial_norm is None and channels < shape[1]:
            raise UnsuitedLayerError.of("lora.narrow_dora", shape=list(shape))

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        base, size = widened(weight), self.block_size
        upper = torch.triu_indices(size, size, 1, device=base.device)
        skew = base.new_zeros(self.packed.shape[0], size, size)
        skew[:, upper[0], upper[1]] = self.packed.to(base) / self.divisor
        skew = bounded_each(skew - skew.mT, self.bound)
        if self.turns_kernels and base.dim() > 2:
            skew = -skew
        turn = cayley_less_one(skew) if self.terms is None else series_less_one(-skew, self.terms)
        known = base.flatten(1)[:, : self._turned_columns(tuple(base.shape))]
        delta = filled(turn_columns(known, turn), base.shape).mul_(strength)
        return finish(weight, base, scale_rows(base, delta, self._row_factor(base), strength), function)

    def _turned_columns(self, shape: Shape) -> int:
        """The number of flattened columns of a weight of `shape` that the blocks turn."""
        columns, own = product_of(shape[1:]), self.packed.shape[0] * self.block_size
        is_shared = self.packed.shape[0] == 1 and self.shared is not False and columns % own == 0
        return columns if is_shared else own

    def rows(self, start: int, length: int) -> PeftOftAdapter:
        """Every row is turned alike, each with its own factor."""

        def cut(numbers: torch.Tensor | None) -> torch.Tensor | None:
            return None if numbers is None else numbers.flatten()[start : start + length]

        if self.factor is None and self.magnitude is None:
            return self
        return replace(
            self, factor=cut(self.factor), magnitude=cut(self.magnitude), initial_norm=cut(self.initial_norm)
        )

    def _row_factor(self, base: torch.Tensor) -> torch.Tensor | None:
        if self.magnitude is None:
            return self.factor
        if self.initial_norm is None:
            norm = torch.linalg.vector_norm(base.flatten(1), dim=1)
        else:
            norm = self.initial_norm.to(base).flatten()
        factor: torch.Tensor = self.magnitude.to(base).flatten() / (norm + torch.finfo(torch.float32).eps)
        return factor


def _check_row_blocks(blocks: torch.Tensor, shape: Shape) -> None:
    """Raises LoraMismatchError unless `blocks` `(n, b, b)` turn the rows of a weight of `shape`."""
    count = blocks.shape
    if len(count) != 3 or count[1] != count[2]:
        raise LoraMismatchError.of("lora.wrong_form", what="OFT blocks", wanted="(n, b, b)", found=list(count))
    if len(shape) < 2 or count[0] * count[1] != shape[0]:
        raise mismatch("OFT", (count[0] * count[1],), shape)
    check_turns(blocks)


def _rows_of(part: OftAdapter) -> int:
    return part.blocks.shape[0] * part.blocks.shape[1] if part.blocks.dim() == 3 else 0


def _make(found: Found) -> Adapter:
    """LyCORIS writes OFT and BOFT under one name: a block diagonal, or several stages of it."""
    alpha = found.shared.get("alpha")
    fields = dict(found.fields)
    ready = fields.pop("ready", None)
    if ready is not None and not fields:
        return _ready(found, ready)
    parts = [fields.pop(name) for name in _PARTS if name in fields]
    if parts and "blocks" not in fields:
        if [name for name in _PARTS if name in found.fields] != list(_PARTS[: len(parts)]):
            raise KeyError("oft_blocks.0")
        if len(parts) > 1:
            return SplitOftAdapter(tuple(OftAdapter(part, alpha=alpha) for part in parts))
        fields["blocks"] = parts[0]
    if fields["blocks"].dim() == 4:
        return BoftAdapter(**fields, alpha=alpha)
    return OftAdapter(**fields, alpha=alpha)


def _ready(found: Found, blocks: torch.Tensor) -> ReadyOftAdapter:
    """The adapter of `oft_diag`. LyCORIS of October 2023 saved the difference from the identity under the same name.

    Raises:
        LoraFileError: the blocks are no rotations near the identity.
    """
    if blocks.dim() == 3 and not blocks.is_meta and float(blocks.diagonal(dim1=1, dim2=2).float().mean()) < 0.5:
        raise LoraFileError.of("lora.part_not_known", module=shown(found.module), kind="oft", part="oft_diag")
    return ReadyOftAdapter(blocks)


def _make_peft(found: Found) -> PeftOftAdapter:
    fields, settings = dict(found.fields), found.settings
    name = shown(found.module)
    for part in fields:
        if part.startswith(_UNKNOWN):
            raise LoraFileError.of(
                "lora.part_not_known", module=name, kind="oft", part=shown(part.removeprefix(_UNKNOWN))
            )
    marker, logarithm = fields.pop("scaled", None), fields.pop("log_factor", None)
    if logarithm is not None:
        fields["factor"] = torch.exp(at_least_fp32(logarithm))
    adapter = PeftOftAdapter(
        **fields,
        terms=settings.cayley_terms,
        bound=settings.oft_bound,
        shared=settings.shares_blocks,
        turns_kernels=found.settings.of_onetrainer or "scaled" in found.fields or _is_flat(found.module),
        magnitude=found.shared.get("magnitude"),
    )
    if marker is None:
        return adapter
    divisor = _divisor(marker, adapter)
    if divisor is None:
        raise LoraFileError.of("lora.oft_marker", module=name, value=float(marker))
    return replace(adapter, divisor=divisor)


def _with_shared_blocks(adapters: Mapping[tuple[str, str], Adapter]) -> Mapping[tuple[str, str], Adapter]:
    """Settles if single blocks are for the whole input, where a file does not say: OneTrainer's never do.

    They are where every layer has one, of about one size: it is the trainer's setting, moved to a divisor of the layer's
    width. One block for each layer of a network without sharing has the width of its layer.
    """
    alone = {k: a for k, a in adapters.items() if isinstance(a, PeftOftAdapter) and a.shared is None}
    if len(alone) < 2 or any(adapter.packed.shape[0] != 1 for adapter in alone.values()):
        return adapters
    usual = statistics.median(adapter.block_size for adapter in alone.values())
    near = {k: a for k, a in alone.items() if usual / 2 <= a.block_size <= usual * 2}
    return {**adapters, **{key: replace(adapter, shared=True) for key, adapter in near.items()}}


def _is_flat(module: str) -> bool:
    """True for kohya's flat names, `lora_unet_a_b`: of the trainers of this OFT only OneTrainer writes them."""
    return module.startswith("lora_") and "." not in module


def _divisor(marker: torch.Tensor, adapter: PeftOftAdapter) -> float | None:
    """The divisor that OneTrainer's marker `scaled_oft` stands for; None for a marker that is not known.

    As merged in May 2026 the marker is True, and 1 in the file's dtype where the file is saved in one. Before, it was
    the block size, and before that a whole 1 with another formula (OneTrainer `modules/module/oft_utils.py`, the
    history of pull request 1315).
    """
    size = adapter.block_size
    if size < 2:
        return None
    value, name = float(marker), _dtype_name(marker)
    if name != "bool" and not marker.is_floating_point() and value == 1.0:
        return math.sqrt(adapter.packed.shape[-1])
    # bf16 holds whole numbers up to 256 exactly.
    return 2.0 * math.sqrt(size - 1) if value == 1.0 or (size > 2 and abs(value - size) <= size / 256) else None


def _dtype_name(tensor: torch.Tensor) -> str:
    return getattr(tensor, "dtype_name", None) or str(tensor.dtype).removeprefix("torch.")


_PARTS = ("part0", "part1", "part2", "part3")
"""Query, key, value and MLP of a fused weight."""
_UNKNOWN = "unknown "


def _part_of_a_rotation(key: str, names: Container[str]) -> tuple[str, str] | None:
    """Anything else beside `oft_R.weight` belongs to a formula that is not known, such as OneTrainer's `cans_oft`."""
    module, _, part = key.rpartition(".oft_R.")
    return (module, f"{_UNKNOWN}oft_R.{part}") if module and part and f"{module}.oft_R.weight" in names else None


register(
    Kind(
        "oft",
        _make,
        keys={
            "oft_blocks": "blocks",
            "rescale": "rescale",
            "oft_diag": "ready",
            **{f"oft_blocks.{number}": name for number, name in enumerate(_PARTS)},
        },
    )
)
register(
    Kind(
        "peft_oft",
        _make_peft,
        keys={
            "oft_R.scaled_oft": "scaled",
            "initial_norm": "initial_norm",
            "dora_multiplier": "factor",
            "dora_log_multiplier": "log_factor",
        },
        peft_keys={"oft_R.weight": "packed"},
        claim=_part_of_a_rotation,
        numbers=frozenset({"scaled"}),
        settle=_with_shared_blocks,
    )
)
