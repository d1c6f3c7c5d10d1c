"""The guard's settings inside Forge: read from Forge's options, carried out when they change.

The mode is read when an image begins, because a request over the API may bring options of its own for one image; see
`runtime.live_settings`. The panel shows that of the next image.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...memory.allocator import AllocatorState
from ...memory.allocator import apply as apply_allocator
from ...memory.allocator_text import AllocatorWish
from ...messages import say
from ...messages.languages import language_of, system_locale
from ...reporting import log as reporting_log
from ...runtime import installed
from ...runtime.live_settings import mode_of
from ...runtime.status import allocator_lines
from ...settings import LoraMode, Settings, read

log = logging.getLogger(__name__)

CPU = torch.device("cpu")


class GuardOptions:
    """Carries the settings out. `options` is Forge's live mapping; `lock` is held by Forge while an image is made; `device`
    is where images are made."""

    def __init__(
        self,
        options: Mapping[str, Any],
        lock: Any,
        device: torch.device = CPU,
        log_level_flag: str | None = None,
    ) -> None:
        self._options, self._lock, self._device, self._log_level_flag = options, lock, device, log_level_flag
        self.settings = Settings()
        self.allocator: AllocatorState | None = None

    def mode(self) -> LoraMode:
        return mode_of(self._options)

    def apply(self) -> Settings:
        """Brings everything to what the options say now. Called when Forge runs the extension's scripts, and after every
        change on the settings page."""
        self.settings, wrong = read(self._options)
        localization = self._options.get("localization")
        language = language_of(self.settings.language.value, localization, system_locale())
        reporting_log.set_up(self._log_level_flag or self.settings.log_level, language)
        for name in wrong:
            say(log, logging.WARNING, "everyday.bad_option", name=name, value=repr(self._options[name]))
        if self._is_switch_due():
            self._when_idle(self._switch)
        self._connect()
        self._set_allocator()
        return self.settings

    def _set_allocator(self) -> None:
        settings = self.settings
        wish = AllocatorWish(
            settings.expandable_segments, settings.max_split_size_mb, settings.garbage_collection_threshold
        )
        before = self.allocator
        try:
            self.allocator = apply_allocator(wish, os.environ, self._device, before)
        except Exception:
            # A new torch may know other names; images are made all the same.
            say(log, logging.ERROR, "everyday.allocator_failed", exc_info=True)
            return
        wished = wish.expandable_segments or wish.max_split_size_mb or wish.garbage_collection_threshold
        is_new = before is None or before.options() != self.allocator.options()
        if is_new and (wished or before is not None):
            for line in allocator_lines(self.allocator):
                say(log, logging.INFO, "everyday.allocator", state=line)

    def _is_switch_due(self) -> bool:
        return self.settings.enable is not (installed.installed() is not None)

    def _connect(self) -> None:
        takeover = installed.installed()
        if takeover is not None:
            takeover.settings.options = self._options
            takeover.settings_changed()
            if takeover.copies.are_unwanted:
                self._when_idle(self._give_back_copies)

    def _give_back_copies(self) -> None:
        takeover = installed.installed()
        # Switched on again while this waited, the copies stay.
        if takeover is not None and takeover.copies.are_unwanted:
            takeover.copies.give_back()

    def _switch(self) -> None:
        if not self._is_switch_due():
            # Switched back while this waited.
            return
        if self.settings.enable:
            for misfit in installed.install().install_in_webui():
                say(log, logging.WARNING, "everyday.partly_fits", reason=misfit)
            self._connect()
        else:
            installed.uninstall()
        say(log, logging.INFO, "everyday.switched_on" if self.settings.enable else "everyday.switched_off")

    def _when_idle(self, work: Callable[[], None]) -> None:
        """Does `work` while no image is made: now, or in a thread of its own once the running one is finished."""

        def locked() -> None:
            try:
                work()
            except Exception:
                say(log, logging.ERROR, "everyday.not_carried_out", exc_info=True)
            finally:
                self._lock.release()

        if self._lock.acquire(blocking=False):
            locked()
            return

        def wait() -> None:
            self._lock.acquire()
            locked()

        say(log, logging.INFO, "everyday.switch_waits")
        threading.Thread(target=wait, name="lora-guard-switch", daemon=True).start()
