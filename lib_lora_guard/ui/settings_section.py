"""The settings section: one option of the host for every field of `Settings`."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from ..memory.shares import usual_kept_files_mb
from ..messages import Message
from ..settings import LOG_LEVELS, MODE_FIELD, PREFIX, Language, LoraMode, Settings

SECTION = ("lora_guard", "LoRA Guard")
MODE_KEYS = {
    LoraMode.AUTOMATIC: "settings.mode.automatic",
    LoraMode.FP16: "settings.mode.fp16",
    LoraMode.MERGE: "settings.mode.merge",
    LoraMode.OWN: "settings.mode.own",
}
_LANGUAGE_NAMES = {Language.ENGLISH: "English", Language.CHINESE: "简体中文"}

Options = dict[str, Any]


def options(host: Any, language: str, on_change: Callable[[], object]) -> Options:
    """Returns the host's options by name.

    Args:
        host: Has Forge's `OptionInfo` and `OptionHTML`.
        language: The language of the texts.
        on_change: Called after each change.
    """
    import gradio

    def text(key: str) -> str:
        return Message(f"settings.{key}").text(language)

    def option(name: str, component: Any = None, arguments: Mapping[str, Any] | None = None) -> Any:
        default = usual_kept_files_mb() if name == "kept_files_mb" else getattr(Settings, name)
        info = host.OptionInfo(
            getattr(default, "value", default),
            text(name),
            component,
            dict(arguments) if arguments else None,
            onchange=on_change,
        )
        return info.info(html.escape(text(f"{name}.info")))

    # Radio buttons everywhere: Forge shows no explanation beside a dropdown.
    modes = [(Message(MODE_KEYS[mode]).text(language), mode.value) for mode in LoraMode]
    levels = [(text(f"level.{level}"), level) for level in LOG_LEVELS]
    languages = [(_LANGUAGE_NAMES.get(known, text("language.auto")), known.value) for known in Language]
    whole = {"precision": 0, "minimum": 0}
    made = {
        "enable": option("enable"),
        "mode": option("mode", gradio.Radio, {"choices": modes}).html(_modes(language)),
        "plan_residency": option("plan_residency"),
        "pin_swapped": option("pin_swapped"),
        "fast_kernels": option("fast_kernels"),
        "fast_host_cast": option("fast_host_cast"),
        "file_backups": option("file_backups"),
        "merge_from_file": option("merge_from_file"),
        "lora_cards": option("lora_cards"),
        "kept_files_mb": option("kept_files_mb", gradio.Number, whole),
        "log_level": option("log_level", gradio.Radio, {"choices": levels}),
        "language": option("language", gradio.Radio, {"choices": languages}),
        "allocator": host.OptionHTML(html.escape(text("allocator"))),
        "expandable_segments": option("expandable_segments"),
        "max_split_size_mb": option("max_split_size_mb", gradio.Number, whole),
        "garbage_collection_threshold": option(
            "garbage_collection_threshold", gradio.Slider, {"minimum": 0, "maximum": 0.95, "step": 0.05}
        ),
    }
    # A picture's mode, given back with "Read generation parameters" where the page has no place of its own for it.
    made["mode"].infotext = MODE_FIELD
    return {PREFIX + name: info for name, info in made.items()}


def _modes(language: str) -> str:
    """Returns a sentence for each mode, as an HTML list."""
    rows = (
        f"<li><b>{html.escape(Message(key).text(language))}</b>: {html.escape(Message(f'{key}.info').text(language))}</li>"
        for key in MODE_KEYS.values()
    )
    return f'<ul class="lora_guard_modes">{"".join(rows)}</ul>'
