"""Answers "will it fit?" for files that the WebUI lists, on the machine that it runs on. Reads headers only.

Files are named as in the WebUI's lists; a name that is in none of them is no path.

Sources: `modules/sd_models.py` (`checkpoints_list`), the WebUI's LoRA extension (`networks.available_networks`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from ...checkpoints.part_files import read_parts
from ...commands.answer import answer, fits
from ...commands.plan import PlanRequest, PlanResult, make_plan
from ...errors import LoraGuardError, reason
from ...files import shown
from ...messages import Joined, Message, in_language
from ...planning.rates import DEFAULT_GPU, GpuRates, nearest_rates, rates_of
from ...planning.tokens import Picture
from ...runtime.installed import Takeover
from ...ui.route import FitAnswer
from ...units import GB

log = logging.getLogger(__name__)

MOST_NAMES = 2000
"""Names in one list. More are not shown; they can still be asked for by the API."""
PICTURE = Picture(1024, 1024)
_NAME_CHARACTERS = 300


class ListedFile(Protocol):
    """A checkpoint or a LoRA in the WebUI's lists."""

    filename: str


class Networks(Protocol):
    """The WebUI's LoRA extension."""

    available_networks: Mapping[str, ListedFile]


class SdModels(Protocol):
    """The module `modules.sd_models`."""

    checkpoints_list: Mapping[str, ListedFile]


def lists() -> dict[str, list[str]]:
    """Returns the names of checkpoints and LoRAs."""
    checkpoints, loras = _checkpoints(), _loras()
    return {"checkpoints": sorted(checkpoints)[:MOST_NAMES], "loras": sorted(loras)[:MOST_NAMES]}


def will_it_fit(takeover: Takeover | None, checkpoint: str, loras: list[str], language: str) -> FitAnswer:
    """Returns the answer in words.

    Args:
        takeover: Reads this machine's memory.
        checkpoint: Its name in the list.
        loras: Their names in the list.
        language: Of the answer.

    Returns:
        `fits` (None if it is not known) and `lines`, the answer first.
    """
    try:
        does, lines = _answer(takeover, checkpoint, loras)
    except (LoraGuardError, ValueError) as error:
        does, lines = None, [Message("panel.fit.unknown", {"why": reason(error)})]
    return {"fits": does, "lines": [shown(str(in_language(line, language)), 1200) for line in lines]}


def _answer(takeover: Takeover | None, checkpoint: str, loras: list[str]) -> tuple[bool | None, list[str]]:
    models, networks = _checkpoints(), _loras()
    for name, known in [(checkpoint, models), *((lora, networks) for lora in loras)]:
        if name not in known:
            return None, [Message("panel.fit.not_listed", {"name": shown(name, _NAME_CHARACTERS)})]
    if takeover is None:
        return None, [Message("panel.done.off")]
    snapshot = takeover.snapshot()
    total, ram = snapshot.vram_total.bytes, snapshot.ram_total.bytes
    if total is None or ram is None:
        return None, [Message("panel.fit.no_card")]
    # What this WebUI holds leaves for another checkpoint; what others hold does not.
    vram = total - (snapshot.vram_others.bytes or 0)
    files = [(Path(networks[name]), 1.0) for name in loras]
    return words(
        make_plan(PlanRequest(Path(models[checkpoint]), files, vram, ram, PICTURE, _rates(), beside=_chosen_parts()))
    )


def words(result: PlanResult) -> tuple[bool | None, list[str]]:
    """Returns whether a plan fits, and the answer in sentences, without the flags of the command line."""
    lines: list[str] = [_without_flags(answer(result))]
    if result.predictions:
        # Else the answer names them.
        lines += [
            Message("report.refused", {"name": lora.facts.name, "why": lora.fit.refused})
            for lora in result.stack.loras
            if lora.fit.refused
        ]
    if not result.beside:
        return fits(result), lines
    keys = {True: "plan.part_assumed", False: "plan.part_given"}
    parts = Joined(
        (Message(keys[part.is_assumed], {"name": part.name, "gb": part.bytes / GB}) for part in result.beside),
        "list.names",
    )
    is_assumed = any(part.is_assumed for part in result.beside)
    return fits(result), [*lines, Message("panel.fit.assumed" if is_assumed else "plan.beside", {"parts": parts})]


def _without_flags(said: str) -> str:
    if isinstance(said, Joined):
        return Joined(map(_without_flags, said.parts), said.between)
    if isinstance(said, Message) and said.key == "plan.open":
        return Message("panel.fit.open", said.facts)
    return said


def _rates() -> GpuRates:
    try:
        return nearest_rates(torch.cuda.get_device_name())
    except Exception:
        # Another card than those known, or none: times alone depend on it.
        return rates_of(DEFAULT_GPU)


def _chosen_parts() -> list[Path]:
    """Returns the files that the user has chosen under "VAE / Text Encoder"."""
    try:
        from modules import sd_models

        chosen: list[str] = sd_models.model_data.forge_loading_parameters["additional_modules"]
    except (ImportError, AttributeError, KeyError):
        return []
    return [path for name in chosen if _is_readable(path := Path(name))]


def _is_readable(path: Path) -> bool:
    try:
        return bool(read_parts(path, 2))
    except LoraGuardError:
        # What is assumed takes its place.
        log.debug("%s is no text encoder or VAE that can be counted", path.name, exc_info=True)
        return False


def _checkpoints() -> dict[str, str]:
    try:
        from modules import sd_models

        module: SdModels = sd_models
        return {str(name): str(info.filename) for name, info in module.checkpoints_list.items()}
    except (ImportError, AttributeError):
        return {}


def _loras() -> dict[str, str]:
    module: Networks | None = sys.modules.get("networks")
    try:
        return {} if module is None else {str(n): str(one.filename) for n, one in module.available_networks.items()}
    except AttributeError:
        log.debug("the host's LoRA extension has no list", exc_info=True)
        return {}
