"""The tab as the server makes it: one empty place, which `javascript/lora_guard.js` fills while somebody looks."""

from __future__ import annotations

from typing import Any

TITLE = "LoRA Guard"
ELEMENT = "lora_guard"
PLACE = '<div id="lora_guard_panel"><noscript>LoRA Guard needs JavaScript here. LoRA Guard 需要 JavaScript。</noscript></div>'


def build() -> list[tuple[Any, str, str]]:
    """What `on_ui_tabs` wants: gradio blocks, title, element id."""
    import gradio

    with gradio.Blocks(analytics_enabled=False) as blocks:
        gradio.HTML(PLACE)
    return [(blocks, TITLE, ELEMENT)]
