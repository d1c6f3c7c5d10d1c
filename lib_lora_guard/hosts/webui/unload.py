"""Skips the WebUI's global unload where no setting has changed.

Forge unloads every model before the next image, and forgets the prompt's conditioning, whenever a memory setting, a preset
or the checkpoint list was touched; the page itself touches them when it is opened. Sources: `modules_forge/main_entry.py`
(`refresh_memory_management_settings`, `refresh_model_loading_parameters`), `modules/processing.py`
(`manage_model_and_prompt_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from ...memory import rules
from ...memory.rules import Finding
from ...runtime.hooks import P, R, Row
from .cond_caches import SharedCaches


class ProcessingModule(Protocol):
    """`modules.processing`, as far as it is used here."""

    need_global_unload: bool


class UnloadRequests:
    """Compares the settings of an image with those of the one before."""

    def __init__(
        self,
        processing: ProcessingModule,
        settings: Callable[[], Hashable],
        tell: Callable[[Finding | None], None],
        caches: SharedCaches,
    ) -> None:
        """
        Args:
            processing: the WebUI's `modules.processing`.
            settings: returns everything that decides how models are loaded and placed, as one value to compare.
            tell: logs what a sanity rule has found.
            caches: of conditionings, which an unload empties.
        """
        self._processing, self._settings, self._tell, self._caches = processing, settings, tell, caches
        self._of_last_image: Hashable = None

    def before_image(self, original: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Stands in place of `manage_model_and_prompt_cache`."""
        last, self._of_last_image = self._of_last_image, None
        is_wished = self._processing.need_global_unload
        if is_wished:
            finding = rules.unload_request(has_changed=self._settings() != last)
            if finding is not None:
                self._processing.need_global_unload = False
                self._tell(finding)
        try:
            result = self._caches.emptied_in_place(original, *args, **kwargs)
        except BaseException:
            # What is loaded now is not known: the next image is the host's.
            self._processing.need_global_unload = is_wished
            raise
        # After the image's own overrides have been taken over.
        self._of_last_image = self._settings()
        return result


ROWS: tuple[Row[UnloadRequests], ...] = (
    Row(
        "modules.processing",
        "manage_model_and_prompt_cache",
        lambda requests: (requests.before_image,),
        is_needed=False,
    ),
)
