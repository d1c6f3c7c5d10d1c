"""The tab "LoRA Guard": the question "will it fit?"."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "panel.label.fit": ("Will it fit?", "放得下吗？"),
    "panel.label.tip_fit": (
        "Reads the headers of the files and calculates what an image of 1024x1024 takes on this machine. Loads nothing.",
        "读取文件头，计算在本机生成 1024x1024 图片所需的资源，不加载任何内容。",
    ),
    "panel.label.checkpoint": ("Checkpoint", "模型"),
    "panel.label.fit_loras": ("LoRAs (several with Ctrl)", "LoRA（按住 Ctrl 可多选）"),
    "panel.label.ask": ("Calculate", "计算"),
    "panel.label.asking": ("Calculating…", "正在计算……"),
    "panel.fit.yes": (
        "Fits: an image takes {vram:.1f} GB of VRAM, of {vram_there:.1f} GB there, and {ram:.1f} GB of RAM with the system's share, of "
        "{ram_there:.1f} GB",
        "放得下：生成图片需要 {vram:.1f} GB 显存（共 {vram_there:.1f} GB），以及 {ram:.1f} GB 内存（含系统，共 {ram_there:.1f} GB）",
    ),
    "panel.fit.slowly": (
        "Fits, but slowly: {gb:.1f} GB of the model lie in RAM and are copied to the card in every step; it takes {vram:.1f} GB of VRAM, "
        "of {vram_there:.1f} GB there, and {ram:.1f} GB of RAM with the system's share, of {ram_there:.1f} GB",
        "放得下，但较慢：模型有 {gb:.1f} GB 位于内存中，每一步都要复制到显卡；需要 {vram:.1f} GB 显存（共 {vram_there:.1f} GB），"
        "以及 {ram:.1f} GB 内存（含系统，共 {ram_there:.1f} GB）",
    ),
    "panel.fit.no": (
        "Does not fit: an image takes {vram:.1f} GB of VRAM, of {vram_there:.1f} GB there, and {ram:.1f} GB of RAM with the system's "
        "share, of {ram_there:.1f} GB; take a smaller model file, such as NF4 or a smaller GGUF",
        "放不下：生成图片需要 {vram:.1f} GB 显存（共 {vram_there:.1f} GB），以及 {ram:.1f} GB 内存（含系统，共 {ram_there:.1f} GB）；"
        "请使用更小的模型文件，例如 NF4 或更小的 GGUF",
    ),
    "panel.fit.open": (
        "Open: without {parts}, which are not in this file, an image takes {vram:.1f} GB of VRAM, of {vram_there:.1f} GB there, and "
        "{ram:.1f} GB of RAM with the system's share, of {ram_there:.1f} GB; add their size to the RAM",
        "未定：此文件不含 {parts}；不计入它们时，生成图片需要 {vram:.1f} GB 显存（共 {vram_there:.1f} GB），以及 {ram:.1f} GB "
        "内存（含系统，共 {ram_there:.1f} GB）；请将其大小计入内存",
    ),
    "panel.fit.refused": ("None of the LoRAs can be used: {why}", "所选 LoRA 均无法使用：{why}"),
    "panel.fit.unknown": ("Cannot be calculated: {why}", "无法计算：{why}"),
    "panel.fit.not_listed": (
        "{name} is in no list of the WebUI; refresh the list and choose again",
        "{name} 不在 WebUI 的列表中；请刷新列表后重新选择",
    ),
    "panel.fit.no_lora": ("Choose at least one LoRA", "请至少选择一个 LoRA"),
    "panel.fit.no_card": (
        "This machine's card or RAM cannot be read, so there is nothing to compare with",
        "无法读取本机的显卡或内存，因此无从比较",
    ),
}
