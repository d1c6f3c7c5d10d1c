"""What the merges of one change do together instead of one by one: each question to the card makes it wait, and its link.

- A weight that is restored from its file is merged again before the checksums of what was read are known. The merged value
  that it had is held meanwhile. Where a checksum is wrong it is put back, and that weight is done again as it would have been
  alone: read three times at most, and left as it was.
- Whether merged values are finite is asked for all of them. Where one is not, the change ends as if it had been asked at once.

The change counts as done when the last answer is known. Whatever ends it before is undone: held values need neither the file
nor memory for it. Until then another thread may see a weight that is still to be refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from ..inference_mode import outside_inference
from ..units import MB
from .file_backup import FileBackup
from .merge_factors import FactorsAhead, Terms
from .merging import are_finite
from .transaction import Replaceable

SWITCH = "LORA_GUARD_MERGE_TOGETHER"
"""0 in the environment: each merge brings its own factors, and waits for its own answers."""
MOST_HELD_BYTES = 64 * MB
"""Of VRAM: merged values that are held until the checksums of their originals are known. More where more is free."""
LARGEST_HELD_BYTES = 32 * MB
"""Of one. The link needs longer for a larger one than the question does."""
SHARE_OF_FREE = 1 / 4
MOST_OF_FREE_BYTES = 512 * MB
"""Four of Flux's largest weights (126 MB)."""
SHARE_OF_ONE = 1 / 4
"""Of all that may be held: one alone may have so much."""


class Merge(Replaceable, Protocol):
    """A merge, as `merge_attachment.MergeAttachment` is one. `compute_device` is where it is computed."""

    together: MergingTogether[Any] | None
    compute_device: torch.device

    @property
    def terms(self) -> Terms:
        """The stack."""

    def is_beside(self, other: Any) -> bool:
        """Returns True if `other` is on the same parameter."""

    def let_go(self) -> None:
        """Frees what is held."""

    def refuse_if_it_overflows(self) -> None:
        """Raises UnusableTermsError for a merged value that is not finite, where its original is."""


M = TypeVar("M", bound=Merge)


class MergingTogether(Generic[M]):
    """The merges of one change, made by one thread.

    Args:
        leaving: Those that are taken off.
        coming: Those that are put on, in order.
    """

    def __init__(self, leaving: Iterable[M], coming: Sequence[M]) -> None:
        self.is_open = False
        """False: each one asks for itself."""
        self._factors: FactorsAhead | None = None
        if coming and os.environ.get(SWITCH) != "0":
            self._factors = FactorsAhead([one.terms for one in coming], coming[0].compute_device)
        self._restored: list[tuple[M, FileBackup, torch.Tensor]] = []
        """With the checksums of what was read for them, where it was read to."""
        self._merged: list[tuple[M, torch.Tensor | None]] = []
        """With the merged values, where they are still to be looked at."""
        self._held_bytes = 0
        all_merges = (*leaving, *coming)
        self.spare_bytes = spare_bytes(_free_bytes(all_merges[0].compute_device)) if all_merges else 0
        """Of VRAM: what the change may hold to wait less, beyond what it may hold in any case."""
        for one in all_merges:
            one.together = self

    def open(self) -> None:
        """Makes the merges ask together. To be called when whoever undoes the change can find this object to close it."""
        self.is_open = os.environ.get(SWITCH) != "0"

    def terms_of(self, merge: M) -> Terms:
        """Returns the stack of a merge, with its factors on the card if they go there ahead."""
        return merge.terms if self._factors is None else self._factors.of(merge.terms)

    def may_hold(self, size_bytes: int) -> bool:
        """Returns True if a merged value may be held. Those that are held already make room for it first."""
        if size_bytes > max(LARGEST_HELD_BYTES, self.spare_bytes * SHARE_OF_ONE):
            # It waits for its own answer, and is what needs the most room.
            self.settle()
            return False
        if self._held_bytes + size_bytes > max(MOST_HELD_BYTES, self.spare_bytes):
            self.settle()
        return True

    def restored(self, merge: M, backup: FileBackup, sums: torch.Tensor) -> None:
        """Notes that a merge holds its merged value, and is about to put in place what was read.

        Args:
            merge: The merge.
            backup: Its backup.
            sums: The checksums of what was read.
        """
        self._restored.append((merge, backup, sums))
        self._held_bytes += backup.bytes

    def merged(self, merge: M, unseen: torch.Tensor | None) -> None:
        """Notes that a merge is about to put its merged value in place.

        Args:
            merge: The merge.
            unseen: The values, on a card; None if they are known to be usable.
        """
        self._merged.append((merge, unseen))

    @outside_inference
    def settle(self) -> bool:
        """Waits for the answers to all questions, and frees what was held for them.

        Returns:
            False if there was nothing to ask.

        Raises:
            RestoreError: A file no longer has the bits of a weight, which has the merged value that it had.
            UnusableTermsError: A merged value is not finite, and its original was.
        """
        restored, coming = self._restored, [new for new, _ in self._merged]
        if not restored and not coming:
            return False
        infinite, wrong = _infinite(self._merged), _wrong(restored)
        if wrong:
            # Alone, each waits for its own answers.
            self.is_open = False
            for old in wrong:
                _do_again(old, next((new for new in coming if new.is_beside(old)), None))
            self.is_open = True
        for new in infinite:
            if not any(new.is_beside(old) for old in wrong):
                new.refuse_if_it_overflows()
        for old, _, _ in restored:
            old.let_go()
        self._restored, self._merged, self._held_bytes = [], [], 0
        return True

    def finish(self) -> None:
        """Settles, and lets go of everything. Raises what `settle` does."""
        self.settle()
        self.close()

    def close(self) -> None:
        """Makes each merge of the change ask for itself from now on, as an undo needs it. Idempotent."""
        self.is_open = False
        self._factors = None
        self._restored, self._merged, self._held_bytes = [], [], 0


def spare_bytes(free_bytes: int) -> int:
    """Returns how much of the free VRAM a change may hold merged values in.

    Args:
        free_bytes: Of the card, before the change.
    """
    return min(MOST_OF_FREE_BYTES, int(free_bytes * SHARE_OF_FREE))


def _free_bytes(device: torch.device) -> int:
    """Returns what is free of a card; 0 for another device, or where the driver does not say."""
    if device.type != "cuda":
        return 0
    try:
        return int(torch.cuda.mem_get_info(device)[0])
    except RuntimeError:
        return 0


def _wrong(restored: Sequence[tuple[M, FileBackup, torch.Tensor]]) -> list[M]:
    if not restored:
        return []
    # A model may lie on two cards.
    device = restored[0][2].device
    found = torch.cat([sums.to(device) for _, _, sums in restored]).cpu()
    own = torch.cat([backup.sums for _, backup, _ in restored])
    if torch.equal(found, own):
        return []
    parts = torch.split(found, [sums.numel() for _, _, sums in restored])
    return [old for (old, backup, _), part in zip(restored, parts, strict=True) if not torch.equal(part, backup.sums)]


def _infinite(merged: list[tuple[M, torch.Tensor | None]]) -> list[M]:
    """Returns those whose values are not finite. `merged` is empty afterwards, however this ends: an error's traceback holds the lists of
    all functions on its way, and an undo needs the room of what is in them."""
    asked = [new for new, values in merged if values is not None]
    values = [one for _, one in merged if one is not None]
    merged.clear()
    try:
        fine = are_finite(values)
    finally:
        values.clear()
    return [new for new, is_fine in zip(asked, fine, strict=True) if not is_fine]


def _do_again(old: M, new: M | None) -> None:
    """Puts the merged value back that `old` holds, and does what was done, alone."""
    if new is None:
        old.attach()
        old.detach()
    else:
        old.replace(new)
        new.replace(old)
