"""Corrections of memory estimates, and their file."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "calibration.not_kept": (
        "what was measured cannot be written to {file} ({error}); estimates are corrected until this program ends",
        "无法将测量结果写入 {file}（{error}）；对估算值的修正仅在本次运行期间有效",
    ),
    "calibration.begun_anew": (
        "{file} is damaged or of another version, so it is begun anew; the old one is kept beside it as {kept}",
        "{file} 已损坏或属于其他版本，现已重新开始记录；旧文件以 {kept} 之名保留在旁边",
    ),
    "calibration.line": (
        "{what}, on {card}: predicted {predicted_mb:.0f} MB, measured {measured_mb:.0f} MB; the next prediction is changed by {correction_mb:+.0f} MB",
        "{what}，{card}：预测 {predicted_mb:.0f} MB，实测 {measured_mb:.0f} MB；下次预测调整 {correction_mb:+.0f} MB",
    ),
    "calibration.load": ("loading {model} ({storage})", "加载 {model}（{storage}）"),
    "calibration.apply": ("LoRA factors for {model} ({storage})", "{model}（{storage}）的 LoRA 参数"),
    "calibration.step": (
        "a step of {model} ({storage}) with {rows} rows of up to {megapixels:.2f} megapixels",
        "{model}（{storage}）的一步采样，{rows} 行，每行至多 {megapixels:.2f} 百万像素",
    ),
    "calibration.step_with_loras": (
        "a step of {model} ({storage}) with LoRAs and {rows} rows of up to {megapixels:.2f} megapixels",
        "{model}（{storage}）带 LoRA 的一步采样，{rows} 行，每行至多 {megapixels:.2f} 百万像素",
    ),
    "calibration.decode": (
        "decoding up to {megapixels:.2f} megapixels with {model} ({storage})",
        "用 {model}（{storage}）解码至多 {megapixels:.2f} 百万像素",
    ),
    "calibration.other": ("something of another version", "其他版本记录的内容"),
}
