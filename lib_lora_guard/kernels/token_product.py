"""Launches the two kernels of a product with one token: a layer's output in one call, with the LoRAs in it."""

from __future__ import annotations

from typing import Any

import torch

from .factors import Factors
from .launch import ALIGNED_BYTES, Handle, handle_of, interprets, kernels_of, tensors_of, typed
from .recipes import ONE_TOKEN, TokenTile, recipe_of
from .stored import Stored


class _Change:
    """The arguments for some factors.

    Args:
        up, down, strengths: Contiguous. Where the kernel reads no strengths any other stands in their place.
        rows: The rows of the weight.
        alpha: The factor on their product.
    """

    def __init__(self, up: torch.Tensor, down: torch.Tensor, strengths: torch.Tensor, rows: int, alpha: float) -> None:
        self.up, self.down, self.strengths = up, down, strengths
        self.rank, columns = down.shape
        self.shape, self.alpha = (rows, columns), alpha
        self.addresses = up.data_ptr(), down.data_ptr(), strengths.data_ptr()


class TokenProduct:
    """The product of one kind of weight and one token.

    Args:
        kind: ONE_TOKEN and `Stored.kind`.
        dtype: The layer's, of the token and of the factors.
        per_rank: True for factors with a strength for each rank.
        tile: To measure another one.

    Raises:
        ImportError: As `launch.kernels_of` says.
        ValueError: The kind has no such kernel.
    """

    def __init__(self, kind: str, dtype: torch.dtype, per_rank: bool, tile: TokenTile | None = None) -> None:
        module, recipe = kernels_of("token_kernels"), recipe_of(kind)
        if recipe is None or recipe.form != ONE_TOKEN:
            raise ValueError(f"no kernel for {kind}")
        self.kind, self.dtype, self.has_per_rank = kind, dtype, per_rank
        self.tile = tile or TokenTile()
        self.function: Any = getattr(module, f"{recipe.function}_token")
        self.constants: dict[str, Any] = {
            "BLOCK": recipe.constants["BLOCK"],
            "NESTED": recipe.constants["NESTED"],
            "ASM": not interprets(),
            "FP16": dtype == torch.float16,
            "HAS_PER_RANK": per_rank,
            "BO": self.tile.rows,
            "WORDS": self.tile.words,
        }
        # Nothing here has to round as the host does.
        self.options: dict[str, Any] = {"num_warps": self.tile.warps, "enable_fp_fusion": True}
        self.down_function: Any = module.down_of_token
        self.down_constants: dict[str, Any] = {"BI": self.tile.columns}
        self.down_options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
        self._down_handle: Handle | None = None
        self._handle: Handle | None = None

    def __call__(
        self, stored: Stored, factors: Factors, token: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Returns the layer's output for one token, `(..., out)`.

        Args:
            stored: The weight.
            factors: One pair of factors, whose rows are not scaled.
            token: `(..., in)`, all other sizes 1.
            bias: `(out,)` in the token's dtype; None for none.

        Returns:
            None where the kernel cannot take the token or the bias, or a tensor begins at an address that it cannot take.

        Raises:
            ValueError: The factors are not for this kernel, or not for this weight.
        """
        rows, columns = stored.shape
        if token.dtype is not self.dtype or token.numel() != columns or not token.is_contiguous():
            return None
        if bias is not None and (bias.dtype is not self.dtype or bias.shape != (rows,) or not bias.is_contiguous()):
            return None
        # Of a layer they are the same ones in each call: looked at once.
        known = factors.known.get(self)
        change = known if known and known.shape == (rows, columns) else self._change(factors, rows, columns)
        out = torch.empty((*token.shape[:-1], rows), dtype=self.dtype, device=token.device)
        low = torch.empty(change.rank, dtype=torch.float32, device=token.device)
        mine, _ = tensors_of(stored, low)
        given = (*mine, token, out if bias is None else bias, low)
        addresses = [one.data_ptr() for one in given]
        (up, down, strengths), result = change.addresses, out.data_ptr()
        joined = up | down | strengths | result
        for address in addresses:
            joined |= address
        if joined % ALIGNED_BYTES:
            return None
        numbers = (rows, columns, change.rank, 0 if bias is None else rows, change.alpha)
        grid, down_grid = (-(-rows // self.tile.rows), 1, 1), (change.rank, 1, 1)
        if self._handle is None or self._down_handle is None:
            self._launch_first(stored, given, change, out, numbers, grid, down_grid)
        else:
            self._down_handle(down_grid, (addresses[-3], down, addresses[-1], columns))
            self._handle(grid, (*addresses, up, strengths, result, *numbers))
        return out

    def _change(self, factors: Factors, rows: int, columns: int) -> _Change:
        """Returns the arguments for some factors on a weight of so many rows and columns.

        Raises:
            ValueError: They are not for this kernel, or not for this weight.
        """
        up, down, per_rank = factors.up, factors.down, factors.per_rank
        if (
            factors.form
            or up.shape != (rows, down.shape[0])
            or down.shape[1] != columns
            or {up.dtype, down.dtype} != {self.dtype}
            or (per_rank is not None) != self.has_per_rank
        ):
            raise ValueError(
                f"{self.kind}: expected one pair of factors of {rows} x rank and rank x {columns} in {self.dtype}, found "
                f"{list(up.shape)} {up.dtype} and {list(down.shape)} {down.dtype}"
            )
        own = up.contiguous(), down.contiguous(), down if per_rank is None else per_rank.float().contiguous()
        change = _Change(*own, rows, float(factors.alpha))
        if own[0] is up and own[1] is down and (per_rank is None or own[2] is per_rank):
            # No copies, which would be kept with them.
            factors.known[self] = change
        return change

    def _launch_first(
        self,
        stored: Stored,
        given: tuple[torch.Tensor, ...],
        change: _Change,
        out: torch.Tensor,
        numbers: tuple[Any, ...],
        grid: tuple[int, int, int],
        down_grid: tuple[int, int, int],
    ) -> None:
        """Compiles both kernels if Triton has not, launches them and keeps what it compiled."""
        data, levels, absmax, code, scales, offset, token, bias, low = typed(stored, given)
        made = self.down_function[down_grid](
            token, change.down, low, numbers[1], **self.down_constants, **self.down_options
        )
        self._down_handle = handle_of(made, self.down_function, self.down_constants)
        words = token.reshape(-1).view(torch.int32)
        made = self.function[grid](
            data, levels, absmax, code, scales, offset, words, bias, low, change.up, change.strengths, out,
            *numbers, **self.constants, **self.options,
        )  # fmt: skip
        self._handle = handle_of(made, self.function, self.constants)
