"""Writes a picture's LoRAs into its infotext: a script that Forge runs with every image and that shows nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from modules import scripts

from ...reporting.report import ApplyReport, clean_text
from ...runtime import installed
from .types import comments_of


class LoraGuardScript(scripts.Script):  # type: ignore[misc]  # Forge's classes are not typed
    def title(self) -> str:
        return "LoRA Guard"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        takeover = installed.installed()
        if takeover is None:
            return
        objects = p.sd_model.forge_objects_after_applying_lora
        reports = takeover.image_reports(objects.unet, objects.clip.patcher)
        with takeover.words.image(id(p), *comments_of(p)):
            # Where nothing was loaded for this image, nothing has said it yet.
            takeover.words.tell_of(reports)
            takeover.tell_of_slow_layers()
        text = summary(takeover.settings.mode().value, reports, takeover.left_out())
        if text:
            p.extra_generation_params["LoRA Guard"] = text
        else:
            # The next image of a batch, or of a grid, may have no LoRA.
            p.extra_generation_params.pop("LoRA Guard", None)


def summary(mode: str, reports: list[ApplyReport], left_out: Mapping[str, str]) -> str:
    """One line: the mode, how many keys each way of applying took, and what is missing. Empty without LoRAs."""
    loras = [lora for report in reports for lora in report.loras]
    if not loras and not left_out:
        return ""
    ways: Counter[str] = Counter()
    for lora in loras:
        ways.update(lora.modes)
    missing = {clean_text(lora.label) for lora in loras if lora.refused is not None} | set(left_out)
    parts = [mode, *(f"{count} {way}" for way, count in sorted(ways.items()))]
    if missing:
        parts.append("without " + ", ".join(sorted(missing)))
    return ", ".join(parts)
