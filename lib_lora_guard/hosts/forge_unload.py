"""An event that changed nothing unloads nothing.

Forge unloads every model before the next image, and forgets the prompt's conditioning, whenever a memory setting, a preset
or the checkpoint list was touched; the page itself touches them when it is opened. Sources: `modules_forge/main_entry.py`
(`refresh_memory_management_settings`, `refresh_model_loading_parameters`), `modules/processing.py`
(`manage_model_and_prompt_cache`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..memory import rules
from ..memory.rules import Finding


class UnloadRequests:
    def __init__(
        self,
        processing: Any,
        settings: Callable[[], object],
        tell: Callable[[Finding | None], None],
    ) -> None:
        """`processing`: Forge's module. `settings`: everything that decides how models are loaded and placed, as one value to compare."""
        self._processing, self._settings, self._tell = processing, settings, tell
        self._of_last_image: object = None

    def before_image(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of `manage_model_and_prompt_cache`."""
        if self._processing.need_global_unload:
            finding = rules.unload_request(has_changed=self._settings() != self._of_last_image)
            if finding is not None:
                self._processing.need_global_unload = False
                self._tell(finding)
        result = original(*args, **kwargs)
        # After the image's own overrides have been taken over, and where loading has not failed.
        self._of_last_image = self._settings()
        return result
