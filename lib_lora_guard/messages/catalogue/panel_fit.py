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
    "panel.label.tip_checkpoint": (
        "The model file to calculate with. It need not be the loaded one.",
        "用于计算的模型文件，不必是已加载的模型。",
    ),
    "panel.label.fit_loras": ("LoRAs (several with Ctrl)", "LoRA（按住 Ctrl 可多选）"),
    "panel.label.tip_fit_loras": (
        "The LoRAs to calculate with; none is a choice too.",
        "用于计算的 LoRA，也可以不选。",
    ),
    "panel.label.ask": ("Calculate", "计算"),
    "panel.label.tip_ask": (
        "Answers for one image of 1024x1024 with these files on this machine.",
        "计算在本机使用这些文件生成一张 1024x1024 图片的结果。",
    ),
    "panel.label.asking": ("Calculating…", "正在计算……"),
    "panel.fit.open": (
        "Open: {vram:.1f} GB of VRAM and {ram:.1f} GB of RAM with the system's {system:.0f} GB without {parts}, whose size is not "
        "known; choose the file under “VAE / Text Encoder” at the top of the page",
        "暂时无法确定：需要 {vram:.1f} GB 显存和 {ram:.1f} GB 内存（含系统的 {system:.0f} GB），其中未计入{parts}，因为大小未知；"
        "请在页面顶部的“VAE / Text Encoder”中选择该文件",
    ),
    "panel.fit.assumed": (
        "Counted beside the model file: {parts}. What is assumed is what most people load; your own files count once they are chosen "
        "under “VAE / Text Encoder” at the top of the page.",
        "模型文件之外计入的部分：{parts}。“假定”是指多数人使用的文件；在页面顶部的“VAE / Text Encoder”中选择后，会计入您自己的文件。",
    ),
    "panel.fit.unknown": ("Cannot be calculated: {why}", "无法计算：{why}"),
    "panel.fit.not_listed": (
        "{name} is in no list of the WebUI; refresh the list and choose again",
        "{name} 不在 WebUI 的列表中；请刷新列表后重新选择",
    ),
    "panel.fit.no_card": (
        "This machine's card or RAM cannot be read, so there is nothing to compare with",
        "无法读取本机的显卡或内存，因此无从比较",
    ),
}
