"""All sentences for users, by key, in every language. One module per subject; `TEXTS` is the union.

A new language is a new column here. A test checks that the columns have the same placeholders.
"""

from __future__ import annotations

from . import (
    accordion,
    allocator,
    baking,
    calibration,
    cards,
    changes,
    commands,
    doctor,
    everyday,
    explain,
    files,
    flight,
    hosts,
    kernels,
    log,
    lora_reading,
    loras,
    memory,
    modes,
    neo,
    other_hosts,
    panel,
    panel_buttons,
    panel_curve,
    panel_fit,
    panel_log,
    panel_loras,
    panel_memory,
    plan,
    preflight,
    private_files,
    readings,
    report,
    rules,
    saving,
    schedules,
    settings,
    spill,
    why,
)

ENGLISH, CHINESE = "en", "zh"
LANGUAGES = (ENGLISH, CHINESE)

SUBJECTS = (
    accordion,
    allocator,
    baking,
    calibration,
    cards,
    changes,
    commands,
    doctor,
    everyday,
    explain,
    files,
    flight,
    hosts,
    kernels,
    log,
    lora_reading,
    loras,
    memory,
    modes,
    neo,
    other_hosts,
    panel,
    panel_buttons,
    panel_curve,
    panel_fit,
    panel_log,
    panel_loras,
    panel_memory,
    plan,
    preflight,
    private_files,
    readings,
    report,
    rules,
    saving,
    schedules,
    settings,
    spill,
    why,
)

TEXTS: dict[str, dict[str, str]] = {
    key: dict(zip(LANGUAGES, texts, strict=True)) for subject in SUBJECTS for key, texts in subject.TEXTS.items()
}
