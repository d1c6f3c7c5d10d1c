"""The server's part of the tab: an empty element that `javascript/lora_guard.js` fills while the tab is visible."""

from __future__ import annotations

from typing import Any

TITLE = "LoRA Guard"
ELEMENT = "lora_guard"
PLACE = '<div id="lora_guard_panel"><noscript>LoRA Guard needs JavaScript here. LoRA Guard 需要 JavaScript。</noscript></div>'


def build() -> list[tuple[Any, str, str]]:
    """Returns gradio's blocks, the title and the element id, as `on_ui_tabs` expects them."""
    import gradio

    with gradio.Blocks(analytics_enabled=False) as blocks:
        gradio.HTML(PLACE)
    return [(blocks, TITLE, ELEMENT)]
