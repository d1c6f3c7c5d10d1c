"""The mode of an image in its infotext, and what a pasted infotext says of it."""

from __future__ import annotations

from collections.abc import MutableMapping

from ...settings import AS_SET, MODE_FIELD, LoraMode

SUMMARY_FIELD = "LoRA Guard"
"""What was done in words; it begins with the mode."""


def mode_named(text: str) -> LoraMode | None:
    """Returns the mode of that name, in whatever case; None if there is none."""
    name = text.strip().casefold()
    return next((mode for mode in LoraMode if mode.value.casefold() == name), None)


def mode_to_write(mode: LoraMode, has_loras: bool) -> str | None:
    """Returns the mode as an infotext tells it; None if it tells none."""
    return mode.value if has_loras and mode is not LoraMode.AUTOMATIC else None


def fill_in_mode(fields: MutableMapping[str, object], as_set: LoraMode) -> None:
    """Completes the fields of a pasted infotext: a picture without the field was made in the usual mode, or has no LoRAs.

    Args:
        fields: By name. A mode that is unknown here counts as none.
        as_set: The mode of the settings page, which needs no mention.
    """
    summary = str(fields.get(SUMMARY_FIELD, "")).partition(",")[0]
    mode = mode_named(str(fields.get(MODE_FIELD, summary)))
    fields[MODE_FIELD] = AS_SET if mode is None or mode is as_set else mode.value
