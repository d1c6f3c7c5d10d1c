"""Replaces what the hosts of the A1111 family have in common: how prompts, LoRA tags and requests are worked off.

A WebUI loads these modules long after preload.py has run, and loads some of them again at "Reload UI".
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import HostError
from ...patching.fused_choice import CHOICE, always, never
from ...recorder.flight_recorder import Phase
from ...runtime.advice import Advice
from ...runtime.hooks import HookSet, lay
from ...runtime.host import HostStacks, StepStrengths
from ...runtime.jobs import Jobs
from ...runtime.journal import Journal
from ...runtime.live_settings import LiveSettings
from ...runtime.prompt_cache import PromptCache
from ...runtime.rule_log import RuleLog
from . import conditioning, images, lora_cards, networks, schedules, unload, xyz_axes
from .cond_caches import SharedCaches
from .lora_files import LoraFiles
from .probe import check_networks, check_processing
from .prompt_tokens import PromptTokens
from .types import Processing

log = logging.getLogger(__name__)

HOOKS = (*networks.ROWS, *schedules.ROWS, *conditioning.ROWS, *images.ROWS, *unload.ROWS, *lora_cards.ROWS)
"""Every function of the WebUI that is replaced."""


class WebTakeover:
    """One part after the other: where one does not fit, the others work without it."""

    def __init__(
        self,
        settings: LiveSettings,
        files: LoraFiles,
        stacks: HostStacks[Any],
        strengths: StepStrengths[Any],
        journal: Journal,
        rule_log: RuleLog,
        advice: Advice,
        memory_settings: Callable[[Mapping[str, ModuleType]], Hashable],
        jobs: Jobs | None = None,
        is_left_to_host: Callable[[], bool] = lambda: False,
        folder: Callable[[], Path | None] = lambda: None,
        after_image: Callable[[Processing], None] = lambda request: None,
    ) -> None:
        """
        Args:
            settings: the user's.
            files: reads LoRA files.
            stacks: of LoRAs, on the host's models.
            strengths: changes them between two steps.
            journal: of the process.
            rule_log: of the takeover.
            advice: for images that end.
            memory_settings: returns everything that decides how models are loaded and placed, as one value to compare.
            jobs: is told of each request.
            after_image: is told each request whose images have been made.
            is_left_to_host: True where the host's encoding of the next prompt does more than encode it.
            folder: of the guard's own files; None until it is known.
        """
        self._is_left_to_host = is_left_to_host
        self._settings, self._files, self._stacks, self._journal = settings, files, stacks, journal
        self._rule_log, self._images, self._memory_settings = (
            rule_log,
            images.Images(advice, files.words, settings, jobs, journal.image, after_image),
            memory_settings,
        )
        self.cards = lora_cards.LoraCards(settings, sys.modules, folder)
        self.prompts = PromptCache()
        self.schedules = schedules.Schedules(strengths, files.words)

    def install(self, hooks: HookSet, modules: Mapping[str, ModuleType]) -> list[HostError]:
        """Replaces what of the WebUI is loaded and not replaced yet.

        Args:
            hooks: gets the hooks that were laid.
            modules: the loaded modules by name.

        Returns:
            What does not fit.
        """
        CHOICE.is_on, CHOICE.casts_too = self._settings.uses_kernels, self._settings.uses_kernels_without_loras
        misfits = []
        for install in (self._install_files, self._install_schedules, self._install_conditioning):
            try:
                install(hooks, modules)
            except HostError as error:
                misfits.append(error)
        lay(lora_cards.ROWS, self.cards, modules, hooks)
        processing, sd_models = modules.get("modules.processing"), modules.get("modules.sd_models")
        if processing is not None and sd_models is not None:
            requests = unload.UnloadRequests(
                processing, lambda: self._memory_settings(modules), self._rule_log.tell, SharedCaches(processing)
            )
            lay(unload.ROWS, requests, modules, hooks)
            lay(images.ROWS, self._images, modules, hooks)
        xyz_axes.add(modules)
        return misfits

    def app_started(self) -> None:
        """Begins what may be done ahead once the WebUI is up: the headers of LoRA files are read for their cards."""
        if "networks" in sys.modules:
            self.cards.look_ahead([file.filename for file in list(sys.modules["networks"].available_networks.values())])

    def uninstall(self) -> None:
        """Gives running strengths back, and takes the axes out of the X/Y/Z plot."""
        CHOICE.is_on, CHOICE.casts_too = always, never
        self.schedules.forget()
        xyz_axes.remove(sys.modules)

    def _install_files(self, hooks: HookSet, modules: Mapping[str, ModuleType]) -> None:
        """Takes over how the WebUI's LoRA extension reads files."""
        if "networks" not in modules:
            log.debug("the host's LoRA extension is not loaded; LoRA files stay with whatever reads them")
            return
        check_networks(modules["networks"])
        stack = networks.LoraStack(modules["networks"], self._files, self._stacks.invalidate_all)
        lay(networks.ROWS, stack, modules, hooks)

    def _install_schedules(self, hooks: HookSet, modules: Mapping[str, ModuleType]) -> None:
        """Lets strengths change over the steps."""
        if "networks" in modules and "extra_networks_lora" in modules:
            schedules.install(self.schedules, hooks, schedules.probe())

    def _install_conditioning(self, hooks: HookSet, modules: Mapping[str, ModuleType]) -> None:
        """Lets the host encode a prompt anew only where something that the text encoder sees has changed."""
        if "modules.processing" not in modules:
            return
        check_processing(modules["modules.processing"])
        shared, parser = modules["modules.shared"], modules.get("modules.prompt_parser")
        models = modules.get("modules.sd_models")
        conditions = conditioning.Conditioning(
            shared,
            SharedCaches(modules["modules.processing"]),
            lambda: (self._settings.mode(), self._settings.as_trained),
            self._stacks.is_current,
            lambda: self._journal.phase(Phase.ENCODE_PROMPT),
            self.prompts,
            self._files.patchers,
            None if parser is None else PromptTokens(parser, shared),
            self._is_left_to_host,
            lambda: None if models is None else models.model_data.forge_hash,
        )
        lay(conditioning.ROWS, conditions, modules, hooks)
