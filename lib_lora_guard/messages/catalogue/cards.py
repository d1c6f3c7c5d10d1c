"""The line on a LoRA card."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "card.unreadable": ("cannot be used: damaged, or no LoRA", "无法使用：文件已损坏，或不是 LoRA"),
    "card.unknown_model": ("base model not known", "底模未知"),
    "card.kind_and_rank": ("{kind} of rank {rank}", "{kind}，秩 {rank}"),
    "card.fits": ("fits {model}", "适合 {model}"),
    "card.misfit": ("does not fit {model}", "不适合 {model}"),
}
