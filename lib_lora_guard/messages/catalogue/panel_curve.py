"""The tab "LoRA Guard": the curve of the memory over the last images."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "panel.label.curve": ("Memory over the last images", "最近几张图片的显存与内存变化"),
    "panel.label.curve_empty": (
        "The curve begins with the first image.",
        "生成第一张图片后，此处开始显示曲线。",
    ),
    "panel.label.phase_load": ("load", "加载"),
    "panel.label.phase_encode": ("encode", "编码"),
    "panel.label.phase_steps": ("steps", "采样"),
    "panel.label.phase_decode": ("decode", "解码"),
    "panel.label.phase_other": ("other", "其他"),
    "panel.label.phase_": ("between", "间隔"),
    "panel.label.tip_load": (
        "A checkpoint is read, models move to the card or away, LoRAs are applied.",
        "读取模型、将模型移入或移出显卡、应用 LoRA。",
    ),
    "panel.label.tip_encode": ("The text encoder reads the prompt.", "文本编码器读取提示词。"),
    "panel.label.tip_steps": ("The image model works on the image.", "图像模型逐步生成图片。"),
    "panel.label.tip_decode": ("The VAE makes pixels of the result.", "VAE 将结果转换为像素。"),
    "panel.label.tip_other": ("Something else of an image.", "图片的其他处理。"),
    "panel.label.promised": ("promised", "预计"),
    "panel.label.tip_promised": (
        "The most VRAM that the plan allows until the next model is loaded.",
        "按计划在加载下一个模型之前最多使用的显存。",
    ),
    "panel.label.measured": ("measured", "实测"),
    "panel.label.tip_measured": (
        "VRAM in use by all programs, with what torch keeps for itself.",
        "所有程序占用的显存，包括 torch 保留的部分。",
    ),
    "panel.label.limit_vram": (
        "{used} of {total}, the limit of the card (red line)",
        "{used}，显卡上限 {total}（红线）",
    ),
    "panel.label.limit_ram": (
        "{used} of {total}, all that this machine has (red line)",
        "{used}，本机共 {total}（红线）",
    ),
    "panel.label.name_vram": ("VRAM", "显存"),
    "panel.label.name_ram": ("RAM", "内存"),
    "panel.label.point": (
        "{time}, image {image}, {phase}: {name} {used} of {total}",
        "{time}，第 {image} 张图片，{phase}：{name} {used}，共 {total}",
    ),
    "panel.label.point_promised": ("{promised} promised", "预计 {promised}"),
    "panel.label.peak": (
        "Image {image}: {peak} measured at most, of {total}",
        "第 {image} 张图片：实测最高 {peak}，共 {total}",
    ),
    "panel.label.peak_promised": (
        "Image {image}: {peak} measured at most, {promised} promised, of {total}",
        "第 {image} 张图片：实测最高 {peak}，预计 {promised}，共 {total}",
    ),
}
