"""Steps that became slow because the driver moved VRAM to system memory."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "spill.image": ("slower than usual: {what}", "比平常慢：{what}"),
    "spill.slow": (
        "a step took {seconds:.1f} s, {factor:.1f} times the usual {median:.2f} s (median of {steps} steps of the same kind)",
        "一个采样步用了 {seconds:.1f} 秒，是平常 {median:.2f} 秒（{steps} 个同类步的中位数）的 {factor:.1f} 倍",
    ),
    "spill.at_once": (
        "VRAM did not last for this picture from its first steps on: a step takes {seconds:.1f} s",
        "从最初几步起显存就不够用：一个采样步用了 {seconds:.1f} 秒",
    ),
    "spill.spilled": (
        "VRAM is too full: the graphics driver moved a part of it into system memory (shared GPU memory went from {before_mb:.0f} to {now_mb:.0f} MB)",
        "显存已满：显卡驱动把一部分显存内容移到了系统内存（共享 GPU 内存从 {before_mb:.0f} MB 变为 {now_mb:.0f} MB）",
    ),
    "spill.likely": (
        "likely VRAM is too full, and the graphics driver moved a part of it into system memory (see 'Shared GPU memory' in the task manager)",
        "很可能是显存已满，显卡驱动把一部分显存内容移到了系统内存（可在任务管理器的“共享 GPU 内存”中查看）",
    ),
    "spill.not_grown": (
        "the driver did not move VRAM into system memory (shared GPU memory went from {before_mb:.0f} to {now_mb:.0f} MB); another program may be using the GPU, or the card is throttled",
        "显卡驱动并未把显存内容移到系统内存（共享 GPU 内存从 {before_mb:.0f} MB 变为 {now_mb:.0f} MB）；可能有其他程序在使用 GPU，或显卡降频",
    ),
    "spill.other": (
        "another program may be using the GPU, RAM may be full, or the card is throttled",
        "可能有其他程序在使用 GPU、内存已满，或显卡降频",
    ),
    "spill.setting": (
        "to prevent it: NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy > Prefer No Sysmem Fallback, then start Forge again; what does not fit is then reported and handled instead of becoming slow",
        "避免方法：NVIDIA 控制面板 > 管理 3D 设置 > CUDA - 系统内存回退策略（CUDA - Sysmem Fallback Policy）> 首选无系统内存回退（Prefer No Sysmem Fallback），然后重新启动 Forge；之后显存不足时会得到提示和处理，而不是变慢",
    ),
    "spill.lower": (
        "or lower 'GPU Weights' by {lower_mb} MB",
        "或将“GPU Weights”降低 {lower_mb} MB",
    ),
}
