"""Makes ready what the first LoRA of a checkpoint would wait for, while the checkpoint is loaded and its first image is made.

That is: kernels for the storage of its image model, the names of its layers, and the operators for torch.compile.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

import torch

from ...patching.access import ModelAccess
from ...patching.fused_choice import CHOICE
from ...patching.operators import define_operators
from ...runtime.hooks import P
from .lora_files import LoraFiles
from .types import Processing, SdModel

log = logging.getLogger(__name__)


class FirstLora:
    def __init__(self, access: Callable[[torch.nn.Module], ModelAccess], files: LoraFiles) -> None:
        """
        Args:
            access: Returns a model as the engine sees it.
            files: Knows the names of models.
        """
        self._access, self._files = access, files
        self._coming: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        """Models whose weights get their form when they are placed: those that are quantised to four bits then."""

    def after_reading(self, original: Callable[P, SdModel], *args: P.args, **kwargs: P.kwargs) -> SdModel:
        """Stands in place of `forge_loader`, which returns the checkpoint."""
        checkpoint = original(*args, **kwargs)
        try:
            objects = checkpoint.forge_objects
            models = objects.unet.model, objects.clip.cond_stage_model
            names = [self._files.expect(model) for model in models]
            self._expect_kernels(models[0], objects.unet.load_device)
        except Exception:
            # The first LoRA waits for it then.
            log.debug("nothing is made ready for LoRAs", exc_info=True)
            return checkpoint

        def work() -> None:
            try:
                define_operators()
                for find in names:
                    find()
            except Exception:
                log.debug("not all is ready for LoRAs", exc_info=True)

        threading.Thread(target=work, name="lora-guard-first-lora", daemon=True).start()
        return checkpoint

    def after_image(self, request: Processing) -> None:
        """Looks again at a model that has been placed meanwhile."""
        if not self._coming:
            return
        try:
            patcher = request.sd_model.forge_objects.unet
            if patcher.model in self._coming:
                self._coming.discard(patcher.model)
                self._expect_kernels(patcher.model, patcher.load_device)
        except Exception:
            log.debug("no kernels are made ready", exc_info=True)

    def _expect_kernels(self, model: torch.nn.Module, device: torch.device) -> None:
        access, kinds, is_coming = self._access(model), dict[str, None](), False
        for layer, raw in access.raw_weights():
            stored = raw.stored(layer, is_laid_out=False)
            if stored is None:
                is_coming = True
            else:
                kinds[stored.kind] = None
        if is_coming and not kinds:
            self._coming.add(model)
        CHOICE.expect(kinds, device, access.compute_dtype())
