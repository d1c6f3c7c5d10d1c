"""The script that the WebUI runs with every image: shows the accordion and carries out its mode, writes a picture's LoRAs and
their mode into its infotext, and multiplies strengths for the X/Y/Z plot."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from modules import scripts, shared

from ...messages import Joined, say
from ...planning.prompt_strengths import NETWORKS
from ...reporting.report import ApplyReport, clean_text
from ...runtime import installed
from ...settings import AS_SET, MODE_FIELD, MODE_OPTION, LoraMode, Settings, read
from ...ui.accordion import build
from ...ui.language import reader_language
from .accordion import state
from .infotext import SUMMARY_FIELD, mode_named, mode_to_write
from .types import MadeRequest, comments_of, give_mode, own_options
from .xyz_axes import Request, restore_prompts, scale_batch

log = logging.getLogger(__name__)


class LoraGuardScript(scripts.Script):  # type: ignore[misc]  # Forge's classes are not typed
    def title(self) -> str:
        return "LoRA Guard"

    def show(self, is_img2img: bool) -> object:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """Builds the accordion. The list is that of the arguments over the API (docs/hosts.md): never reorder it."""
        tab = "img2img" if is_img2img else "txt2img"
        mode = build(tab, _language(), lambda: state(_language(), _options()[0].mode))
        self.infotext_fields, self.paste_field_names = [(mode, MODE_FIELD)], [MODE_FIELD]
        return [mode]

    def before_process(self, p: Request, mode: str | None = AS_SET, *args: str) -> None:
        """Called before the WebUI makes the images of a request."""
        if not mode:
            return
        wanted = mode_named(str(mode))
        if wanted is None:
            known = Joined((mode.value for mode in LoraMode), "list.names")
            say(log, logging.WARNING, "accordion.no_such_mode", mode=clean_text(repr(mode)), modes=known)
        elif MODE_OPTION not in own_options(p):
            # Else the request has one from an axis of the X/Y/Z plot, or from options given over the API.
            give_mode(p, wanted.value)

    def before_process_batch(self, p: Request, *args: str, batch_number: int = 0, **kwargs: Any) -> None:
        """Called before the prompts of a batch are read."""
        scale_batch(p, batch_number)

    def postprocess(self, p: Request, *args: Any) -> None:
        """Called when all images of a request are made."""
        restore_prompts(p)

    def postprocess_batch(self, p: MadeRequest, *args: str, **kwargs: Any) -> None:
        """Called when the images of a batch are decoded, before their infotexts are written."""
        takeover = installed.installed()
        if takeover is None:
            return
        objects = p.sd_model.forge_objects_after_applying_lora
        reports = takeover.image_reports(objects.unet, objects.clip.patcher)
        with takeover.words.image(id(p), *comments_of(p)):
            # Where nothing was loaded for this image, nothing has said it yet.
            takeover.words.tell_of(reports)
            takeover.tell_of_slow_layers()
        mode = takeover.settings.mode()
        text = summary(mode.value, reports, takeover.left_out())
        fields = {MODE_FIELD: mode_to_write(mode, bool(text) or has_loras(p)), SUMMARY_FIELD: text}
        for name, value in fields.items():
            if value:
                p.extra_generation_params[name] = value
            else:
                # The next image of a batch, or of a grid, may have no LoRA.
                p.extra_generation_params.pop(name, None)


def _options() -> tuple[Settings, str | None]:
    """Returns the settings, and the name of the WebUI's own localization."""
    options = dict(shared.opts.data)
    localization = options.get("localization")
    return read(options)[0], None if localization is None else str(localization)


def _language() -> str:
    settings, localization = _options()
    return reader_language(settings.language, localization)


def has_loras(p: MadeRequest) -> bool:
    """True if the prompt of the present batch has LoRA tags."""
    tags = vars(p).get("extra_network_data") or {}
    return any(tags.get(name) for name in NETWORKS)


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
