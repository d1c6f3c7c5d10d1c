"""The WebUI's own caches of conditionings: one place for the prompt and one for the negative prompt, which all images share.

What is kept beside them follows them: it is asked for an image that uses the shared places, and forgotten where they are emptied.
`LORA_GUARD_PROMPTS=0` in the environment leaves conditionings to the WebUI, for bug reports.
Sources: `cached_c`, `cached_uc`, `cached_hr_c`, `cached_hr_uc`, `clear_prompt_cache` in the WebUI's `modules/processing.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from ...runtime.hooks import P, R
from .types import CondCache

_PLACES = (
    ("StableDiffusionProcessing", "cached_c"),
    ("StableDiffusionProcessing", "cached_uc"),
    ("StableDiffusionProcessingTxt2Img", "cached_hr_c"),
    ("StableDiffusionProcessingTxt2Img", "cached_hr_uc"),
)
"""The class that holds a cache for all images, and the name of it there and in each image."""


class SharedCaches:
    """The caches of one `modules.processing`, and which of them were filled when they were last looked at."""

    def __init__(self, processing: ModuleType) -> None:
        """
        Args:
            processing: the WebUI's `modules.processing`.
        """
        self._processing = processing
        self.is_used = os.environ.get("LORA_GUARD_PROMPTS") != "0"
        """False: conditionings are left to the WebUI."""
        self._filled: frozenset[str] = frozenset()

    def are_shared(self, caches: Sequence[CondCache]) -> bool:
        """False for caches that a pass got for itself, as a detailer's has them: they neither give to other images nor take.

        An extension that encodes in a way of its own gives its image such caches as well.
        """
        shared = {id(cache) for _, _, cache in self._caches()}
        return all(id(cache) in shared for cache in caches)

    def look(self) -> bool:
        """Returns True if a cache was emptied since the last look: all is to be encoded anew.

        A cache that was never filled says nothing of the kind, such as the negative prompt's while CFG is 1.
        """
        before = self._filled
        self._filled = frozenset(name for _, name, cache in self._caches() if cache[0] is not None)
        return not before <= self._filled

    def emptied_in_place(self, original: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls what empties the caches before an image, `manage_model_and_prompt_cache`, and lets that image fill the shared ones.

        The host puts two new lists in the place of each: one for this image, another one for all after it. The next image would
        find nothing, and encode the same prompt again. Those of a hires pass are emptied too, which the host forgets.
        """
        before = list(self._caches())
        images = (*args, *kwargs.values())
        sharing = [
            (image, name, cache) for image in images for _, name, cache in before if getattr(image, name, None) is cache
        ]
        result = original(*args, **kwargs)
        if self.is_used and any(getattr(owner, name, None) is not cache for owner, name, cache in before):
            for owner, name, cache in before:
                cache[:] = [None] * len(cache)
                setattr(owner, name, cache)
            for image, name, cache in sharing:
                setattr(image, name, cache)
        return result

    def _caches(self) -> Iterator[tuple[type, str, CondCache]]:
        for kind, name in _PLACES:
            owner = getattr(self._processing, kind, None)
            cache: CondCache | None = getattr(owner, name, None)
            if owner is not None and cache:
                yield owner, name, cache
