"""LoRA and LoCon: `delta = alpha / rank * up @ down` (arXiv 2106.09685); convolutions may have a Tucker core."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..errors import LoraMismatchError
from ..lazy_torch import torch
from .base import (
    PatchCost,
    RowFunction,
    Shape,
    UnsuitedLayerError,
    add_scaled,
    check_rank,
    is_narrower,
    mismatch,
    product_of,
)
from .dora import is_by_row
from .forms import Decomposed, LowRank
from .kinds import Found, HostTuple, Kind, Size, register
from .ranked import RankedAdapter, make_ranked, rank_along
from .whole import WIDEST, DiffAdapter


@dataclass(frozen=True, eq=False)
class LoraAdapter(RankedAdapter):
    """`up` `(out, rank, ...)`, `down` `(rank, in, ...)`; with `mid` `(rank, rank, *kernel)` both outer ones are 1x1."""

    kind: ClassVar[str] = "lora"
    up: torch.Tensor
    down: torch.Tensor
    mid: torch.Tensor | None = None
    reshaped: bool = field(default=False, kw_only=True, metadata={"beside_the_host": True})
    """The file says that the weight changes its size (`reshape_weight`, FLUX tools)."""

    @property
    def rank(self) -> int | None:
        """The rank of `down`, as the host counts it."""
        return rank_along(self.down)

    def patch_cost(self) -> PatchCost:
        # One product, added in place: a read and a write.
        return PatchCost(passes=2, copies=0) if self.magnitude is None else super().patch_cost()

    def forge_patch_cost(self) -> PatchCost:
        # Product (1), times alpha (2), added (3).
        return PatchCost(passes=6, copies=2) if self.magnitude is None else super().forge_patch_cost()

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        # Asked of each layer in each change: sizes and their slices are objects that torch makes.
        of_up, of_down = tuple(self.up.shape), tuple(self.down.shape)
        if len(of_up) < 2 or len(of_down) < 2 or not all(of_up) or not all(of_down):
            raise LoraMismatchError.of("lora.no_pair", up=list(of_up), down=list(of_down))
        inner_up, inner_down = product_of(of_up[1:]), of_down[0]
        if self.mid is None:
            pairs = inner_up == inner_down
        else:
            pairs = self.mid.dim() > 2 and inner_up == self.mid.shape[0] and self.mid.shape[1] == inner_down
        if not pairs:
            self._check_groups(inner_up, shape)
            core = "" if self.mid is None else f" over mid {list(self.mid.shape)}"
            raise LoraMismatchError.of("lora.up_down", up=list(of_up), down=list(of_down), core=core)
        check_rank(max(inner_up, inner_down), shape)
        kernel = of_down[2:] if self.mid is None else tuple(self.mid.shape[2:])
        columns = product_of(of_down[1:]) * (1 if self.mid is None else product_of(kernel))
        rows = of_up[0]
        wanted = (shape[0], product_of(shape[1:]))
        if self.reshaped and may_expand and rows > wanted[0]:
            raise UnsuitedLayerError.of("lora.grows_rows", rows=rows, wanted=wanted[0])
        # Without a kernel of its own, the flattened factor has that of the weight.
        same_kernel = not kernel or kernel == tuple(shape[2:])
        widens = len(shape) == 2 and columns <= WIDEST * shape[1]
        fills = same_kernel and is_narrower(columns, shape)
        if rows != wanted[0] or (columns != wanted[1] and not (may_expand and (widens or fills))):
            raise mismatch("up @ down", (rows, columns), shape)
        # Widened, an input projection has the columns of the LoRA.
        self.check_magnitude(shape if columns <= wanted[1] else (rows, columns), is_narrow=columns < wanted[1])

    def _check_groups(self, inner_up: int, shape: Shape) -> None:
        """Raises UnsuitedLayerError for PEFT's LoRA on a convolution with groups.

        Its `down` sees all input channels, and each group of `up` a share of the ranks (`lora_B` has the groups of the
        layer). The sum is a convolution without groups, which the layer's weight has no room for; PEFT merges it neither.
        """
        groups, rest = divmod(self.down.shape[0], inner_up)
        channels = self.down.shape[1]
        if self.mid is None and len(shape) > 2 and groups > 1 and not rest and channels == groups * shape[1]:
            raise UnsuitedLayerError.of("lora.grouped", groups=groups)

    def rows(self, start: int, length: int) -> LoraAdapter | None:
        magnitude = self.magnitude
        if magnitude is not None:
            if not is_by_row(magnitude, (self.up.shape[0],)):
                return None
            magnitude = magnitude.narrow(0, start, length)
        return replace(self, up=self.up.narrow(0, start, length), magnitude=magnitude)

    def cheap_forward(self) -> LowRank | Decomposed:
        delta = LowRank(up=self.up.flatten(1), down=self.down.flatten(1), scale=self.scale, mid=self.mid)
        if self.magnitude is None:
            return delta
        by_row = is_by_row(self.magnitude, (self.up.shape[0],))
        return Decomposed(delta, self.magnitude.flatten(), by_row, patched_norm=not by_row or self.as_trained)

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        dtype, device = weight.dtype, weight.device
        up = self.up.flatten(1).to(device=device, dtype=dtype)
        down = LowRank(self.up, self.down.flatten(1), 1.0, self.mid).dense_down(dtype, device)
        weight, down = _widen(weight, down)
        if self.magnitude is not None:
            return self.add(weight, up @ down, self.scale, strength, function)
        factor = strength * self.scale
        if function is not None:
            return weight.add_(function((up @ down).mul_(factor).reshape(weight.shape)))
        if weight.dim() == 2:
            return weight.addmm_(up, down, alpha=factor)
        return add_scaled(weight, (up @ down).reshape(weight.shape), factor)


@dataclass(frozen=True, eq=False)
class BdLoraAdapter(RankedAdapter):
    """A LoRA of which one factor is block-diagonal and stored as its blocks (PEFT `tuners/lora/variants.py`, BD-LoRA).

    `blocks` blocks lie below one another: of `down` `(rank, in / blocks)` or, with `splits_up`, of `up`
    `(out, rank / blocks)`.
    """

    kind: ClassVar[str] = "lora"
    up: torch.Tensor
    down: torch.Tensor
    blocks: int
    splits_up: bool

    @property
    def rank(self) -> int | None:
        return rank_along(self.down)

    def check(self, shape: Shape, *, may_expand: bool) -> None:
        split = self.up if self.splits_up else self.down
        if split.dim() != 2 or split.shape[0] % self.blocks:
            wanted = f"({self.blocks} n, m)"
            raise LoraMismatchError.of("lora.wrong_form", what="BD-LoRA", wanted=wanted, found=list(split.shape))
        self.map(lambda tensor: tensor.to("meta"))._whole().check(shape, may_expand=may_expand)

    def rows(self, start: int, length: int) -> LoraAdapter | None:
        return self._whole().rows(start, length)

    def cheap_forward(self) -> LowRank | Decomposed:
        return self._whole().cheap_forward()

    def patch(self, weight: torch.Tensor, strength: float, function: RowFunction | None) -> torch.Tensor:
        return self._whole().patch(weight, strength, function)

    def _whole(self) -> LoraAdapter:
        """The same with both factors whole. Made when needed: a file of some kilobytes must not fill the RAM."""
        up = _block_diagonal(self.up, self.blocks) if self.splits_up else self.up
        down = self.down if self.splits_up else _block_diagonal(self.down, self.blocks)
        return LoraAdapter(up, down, alpha=self.alpha, magnitude=self.magnitude, as_trained=self.as_trained)


def _block_diagonal(stacked: torch.Tensor, count: int) -> torch.Tensor:
    """The block diagonal of `count` blocks that lie below one another in `stacked`."""
    rows, columns = stacked.shape[0] // count, stacked.shape[1]
    whole = stacked.new_zeros(count * rows, count * columns)
    for n in range(count):
        block = slice(n * rows, (n + 1) * rows)
        whole[block, n * columns : (n + 1) * columns] = stacked[block]
    return whole


def _widen(weight: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads the narrower of a 2-D weight and a low-rank input side with zeros (FLUX-tools input channels)."""
    missing = down.shape[1] - (weight.numel() // weight.shape[0])
    if missing > 0:
        weight = torch.nn.functional.pad(weight, (0, missing))
    elif missing < 0:
        down = torch.nn.functional.pad(down, (0, -missing))
    return weight, down


_ATTACHED = re.compile(r"^(?P<module>.+_lora[12]?)\.(?P<field>up|down)\.weight$")


def _attached(key: str, names: Container[str]) -> tuple[str, str] | None:
    """Attention processors of old diffusers and XLabs: `...to_q_lora.up.weight`, `...qkv_lora1.down.weight`."""
    found = _ATTACHED.match(key)
    return None if found is None else (found["module"], found["field"])


def _make(found: Found) -> LoraAdapter | BdLoraAdapter:
    blocks = _blocks_of(found)
    if blocks is not None:
        count, splits_up = blocks
        fields = {**found.fields, "blocks": count, "splits_up": splits_up}
        return make_ranked(BdLoraAdapter, replace(found, fields=fields))
    if "reshape" in found.fields:
        fields = {name: value for name, value in found.fields.items() if name != "reshape"}
        adapter = replace(make_ranked(LoraAdapter, replace(found, fields=fields)), reshaped=True)
    else:
        adapter = make_ranked(LoraAdapter, found)
    if adapter.alpha is not None and adapter.rank == 0:
        up, down = list(adapter.up.shape), list(adapter.down.shape)
        raise LoraMismatchError.of("lora.no_pair", up=up, down=down)
    return adapter


def _make_embedding(found: Found) -> LoraAdapter | BdLoraAdapter:
    """PEFT's LoRA on an embedding: `first` `(rank, entries)`, `second` `(width, rank)`; the delta is `(B A)^T`."""
    first, second = found.fields["first"], found.fields["second"]
    if "magnitude" in found.shared:
        raise LoraMismatchError.of("lora.embedding_dora")
    if not first.dim() or not second.dim():
        raise LoraMismatchError.of("lora.single_number")
    return _make(replace(found, fields={"up": first.mT, "down": second.mT}))


def _blocks_of(found: Found) -> tuple[int, bool] | None:
    """The number of blocks of a BD-LoRA, and True if `up` has them; None for other LoRAs.

    PEFT looks for the patterns in the last part of the module's name.
    """
    settings = found.settings.entries.get("use_bdlora")
    if not isinstance(settings, dict):
        return None
    count, name = settings.get("nblocks", 1), found.module.rpartition(".")[2]
    if not isinstance(count, int) or not 1 < count < 1_000_000:
        return None
    for key, splits_up in (("target_modules_bd_a", False), ("target_modules_bd_b", True)):
        patterns = settings.get(key)
        if isinstance(patterns, list) and any(isinstance(p, str) and p in name for p in patterns):
            return count, splits_up
    return None


def _make_bias(found: Found) -> DiffAdapter:
    """The bias that PEFT trains beside the factors (`lora_bias=True`); alpha / rank scales it too."""
    scale = found.weight.scale if isinstance(found.weight, (LoraAdapter, BdLoraAdapter)) else 1.0
    return DiffAdapter(**found.fields, scale=scale)


def _size(shapes: Mapping[str, Shape]) -> Size:
    up, down = shapes.get("up", ()), shapes.get("down", ())
    return (up[0] if up else None), (down[1] if len(down) > 1 else None)


register(
    Kind(
        "lora",
        _make,
        keys={
            "lora_up.weight": "up",
            "lora_down.weight": "down",
            "lora.up.weight": "up",
            "lora.down.weight": "down",
            "lora_linear_layer.up.weight": "up",
            "lora_linear_layer.down.weight": "down",
            "lora_mid.weight": "mid",
            "reshape_weight": "reshape",
        },
        peft_keys={"lora_B.weight": "up", "lora_A.weight": "down", "lora_B": "up", "lora_A": "down"},
        claim=_attached,
        integers=frozenset({"reshape"}),
        host=HostTuple(LoraAdapter, ("up", "down", "alpha"), ("mid", "magnitude")),
        size=_size,
    )
)
register(Kind("lora_embedding", _make_embedding, peft_keys={"lora_embedding_A": "first", "lora_embedding_B": "second"}))
register(Kind("lora_bias", _make_bias, peft_keys={"lora_B.bias": "diff"}, parameter="bias"))
