"""The tab "LoRA Guard": its buttons and what came of them."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "panel.label.buttons": ("Do something", "操作"),
    "panel.label.free_vram": ("Free VRAM", "释放显存"),
    "panel.label.tip_free_vram": (
        "Moves every model from the card into RAM. The next image brings them back, which takes some seconds.",
        "将所有模型从显卡移入内存。生成下一张图片时会移回，需要数秒。",
    ),
    "panel.label.free_ram": ("Free RAM", "释放内存"),
    "panel.label.tip_free_ram": (
        "Gives back LoRA files, prompts and copies that LoRA Guard keeps to be faster. Nothing of the loaded model.",
        "释放 LoRA Guard 为加速而保留的 LoRA 文件、提示词和副本，不影响已加载的模型。",
    ),
    "panel.label.forget": ("Forget corrections", "清除修正值"),
    "panel.label.tip_forget": (
        "LoRA Guard measures what images take on this machine and corrects its estimates. After a new driver or card, begin anew.",
        "LoRA Guard 会测量本机生成图片的实际占用，并据此修正估算值。更换驱动或显卡后可重新开始。",
    ),
    "panel.label.report": ("Copy for a bug report", "复制反馈信息"),
    "panel.label.tip_report": (
        "Versions, card, settings and the log, without prompts, names of files or paths.",
        "版本、显卡、设置和日志，不含提示词、文件名或路径。",
    ),
    "panel.label.not_done": ("The server did not carry it out ({error})", "服务器未能执行（{error}）"),
    "panel.done.free_vram": (
        "{mb:.0f} MB of VRAM freed, {free_gb:.1f} GB are free now",
        "已释放 {mb:.0f} MB 显存，现有 {free_gb:.1f} GB 空闲",
    ),
    "panel.done.no_card": (
        "models were moved away; there is no card whose VRAM could be read",
        "模型已移出；没有能读取显存的显卡",
    ),
    "panel.done.free_ram": (
        "{mb:.0f} MB of kept files and copies given back",
        "已释放 {mb:.0f} MB 的缓存文件和副本",
    ),
    "panel.done.forget": ("corrections forgotten: {count}", "已清除 {count} 个修正值"),
    "panel.done.busy": (
        "an image is being made; try again when it is done",
        "正在生成图片，请在完成后重试",
    ),
    "panel.done.off": ("LoRA Guard is not at work", "LoRA Guard 未在运行"),
    "panel.done.failed": ("it failed ({error}); the log has more", "操作失败（{error}），详见日志"),
}
