"""The accordion "LoRA Guard" in txt2img and img2img: a LoRA mode for the images made there, and a badge on its name.

Closed it costs nothing: `javascript/lora_guard_accordion.js` reads the badge off the infotext that the page has anyway. When
it is opened, and after each image while it is open, the browser presses a hidden button, which asks the server once.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from typing import Any

from ..messages import Message
from ..settings import AS_SET, LoraMode
from .settings_section import MODE_KEYS

BADGES = ("active", "left_out", "otherwise", "off")
"""What the badge may say; the browser chooses."""


def build(tab: str, language: str, answer: Callable[[], str]) -> Any:
    """Builds the accordion.

    Args:
        tab: "txt2img" or "img2img".
        language: Of the reader.
        answer: Returns what is to be seen once it is opened.

    Returns:
        The component with the mode.
    """
    import gradio

    def text(key: str) -> str:
        return Message(key).text(language)

    choices = [(text("accordion.as_set"), AS_SET), *((text(MODE_KEYS[mode]), mode.value) for mode in LoraMode)]
    with gradio.Accordion("LoRA Guard", open=False, elem_id=f"lora_guard_{tab}"):
        mode = gradio.Radio(
            choices,
            value=AS_SET,
            label=text("accordion.mode"),
            info=text("accordion.mode.info"),
            elem_id=f"lora_guard_{tab}_mode",
        )
        opened = gradio.Button("", visible=False, elem_id=f"lora_guard_{tab}_opened")
        told = gradio.HTML(place(language), elem_id=f"lora_guard_{tab}_state")
    # The usual mode has its place on the settings page: a second one in ui-config.json would hide what that says.
    mode.do_not_save_to_config = opened.do_not_save_to_config = True
    opened.click(answer, inputs=[], outputs=[told], queue=False, show_progress="hidden")
    return mode


def place(language: str, sentences: Sequence[str] = (), is_off: bool = False) -> str:
    """Returns the HTML of the accordion's text. Names come from files of unknown authors: all is text.

    Args:
        language: Of the badge's words, which go with it.
        sentences: One a line.
        is_off: True if the guard is not at work.
    """
    words = {badge: Message(f"accordion.badge.{badge}").text(language) for badge in BADGES}
    lines = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    off = " data-off" if is_off else ""
    return f'<div class="lora_guard_state"{off} data-words="{html.escape(json.dumps(words))}">{lines}</div>'
