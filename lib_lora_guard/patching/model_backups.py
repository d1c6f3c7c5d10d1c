"""The backups of one model's merges, each from where it takes the least room.

An earlier merge of the same weight has its backup already; the checkpoint file may be proven to have the bytes; the host may
have left its copy in RAM; else the weight is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..planning.mode import Mode
from .access import Site
from .attachment import Attachment
from .backup import Backup, BackupStore, Budget
from .file_backup import FileBackups
from .merge_attachment import MergeAttachment, is_merged
from .plan import Plan


class ModelBackups(BackupStore):
    """Those of one engine.

    Args:
        weight_files: Returns the files that the model may have been loaded from, the likeliest first.
    """

    def __init__(self, weight_files: Callable[[], Sequence[Path]]) -> None:
        self.budget = Budget()
        super().__init__(self.budget)
        self._files = FileBackups(weight_files)
        self.host_copies: Mapping[str, torch.Tensor] = {}
        """Parameters in RAM, by name, as they were before the host moved them to its device."""

    @contextlib.contextmanager
    def offloaded(self, copies: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Makes merges inside the block keep the host's `copies` as their backups, instead of copying."""
        self.host_copies = copies
        try:
            yield
        finally:
            self.host_copies = {}

    def prove(
        self, plan: Plan, attached: Mapping[str, Attachment], known: Mapping[str, Backup], model: str
    ) -> dict[str, Backup]:
        """Returns the backups of weights that the file of the model is proven to have, where they are merged anew.

        Args:
            plan: The weights of the next stack.
            attached: The attachments of the present stack, by name.
            known: Those that were proven in this change already, by name. They are not asked for again.
            model: The model's name, for the log.
        """
        new = {
            key: one.site.parameter
            for key, one in plan.items()
            if one.mode is Mode.MERGE and key not in known and not is_merged(attached.get(key), one.site)
        }
        proven: dict[str, Backup] = {}
        if new:
            for key, backup in self._files.prove(new, model).items():
                self.add(backup)
                proven[key] = backup
        return proven

    def of(self, site: Site, old: Attachment | None, in_files: Mapping[str, Backup]) -> Backup:
        """Returns the backup for a weight that is about to be merged; a copy is made where there is none.

        Args:
            site: The weight.
            old: The attachment that is on it now.
            in_files: The backups that `prove` has returned, by name.

        Raises:
            ModeError: There is no room for a copy anywhere.
        """
        if is_merged(old, site):
            return old.backup
        if site.key in in_files:
            return in_files[site.key]
        backup = self.keep(site.key, site.parameter, self.host_copies.get(site.key))
        self.budget.take(backup)
        return backup

    def expect(self, merges: Iterable[MergeAttachment]) -> None:
        """Begins to read ahead the originals in files that a change will ask for, in this order."""
        self._files.expect(one.backup for one in merges)
