"""What the accordion in txt2img and img2img says once it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...messages import Joined, Message
from ...reporting.report import ApplyReport, clean_text
from ...runtime import installed
from ...settings import LoraMode
from ...ui.accordion import place
from ...ui.settings_section import MODE_KEYS


def state(language: str, mode: LoraMode) -> str:
    """Returns what is seen in the opened accordion, as HTML.

    Args:
        language: Of the reader.
        mode: That of the settings page.
    """
    takeover = installed.installed()
    if takeover is None:
        return place(language, [Message("accordion.off").text(language)], is_off=True)
    said = [Message("accordion.set", {"mode": Message(MODE_KEYS[mode])})]
    said += applied(takeover.reports(), takeover.left_out())
    return place(language, [sentence.text(language) for sentence in said])


def applied(reports: Sequence[ApplyReport], left_out: Mapping[str, str]) -> list[Message]:
    """Returns sentences on the LoRAs of the loaded models, each once."""
    loras = [lora for report in reports for lora in report.loras]
    at_work = dict.fromkeys(clean_text(lora.label) for lora in loras if lora.used and lora.refused is None)
    missing = {lora.label: lora.refused for lora in loras if lora.refused is not None} | dict(left_out)
    first = (
        Message("accordion.active", {"names": Joined(at_work, "list.names")})
        if at_work
        else Message("accordion.nothing")
    )
    return [
        first,
        *(
            Message("accordion.left_out", {"name": clean_text(name), "why": clean_text(why)})
            for name, why in missing.items()
        ),
    ]
