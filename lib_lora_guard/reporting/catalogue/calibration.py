"""Corrections of memory estimates, and where they are kept."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "calibration.not_kept": (
        "what was measured cannot be written to {file} ({error}); estimates are corrected until this program ends",
        "无法将测量结果写入 {file}（{error}）；对估算值的修正仅在本次运行期间有效",
    ),
}
