"""The sanity rules of `memory.rules`."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "rule.line": ("{rule}: {says}", "{rule}：{says}"),
    "rule.everything": (
        "Forge asks to unload everything. Older versions print this as 953674316406250018963456.00 MB: a marker, not a "
        "size, and nothing is wrong",
        "Forge 要求卸载全部模型。旧版本会显示为 953674316406250018963456.00 MB：这只是一个标记而不是大小，并没有出错",
    ),
    "rule.not_a_number": (
        "Forge was asked for an amount of memory that is not a number; it counts as nothing. An extension that estimates "
        "memory may be the reason",
        "有代码请求的显存量不是数字，按 0 处理。原因可能是某个估算显存的扩展",
    ),
    "rule.negative": (
        "Forge was asked for {asked_mb:.0f} MB of memory; less than nothing counts as nothing. An extension that estimates "
        "memory may be the reason",
        "有代码请求了 {asked_mb:.0f} MB 显存，负数按 0 处理。原因可能是某个估算显存的扩展",
    ),
    "rule.above_total": (
        "{asked_mb:.0f} MB were to be freed on a card of {total_mb:.0f} MB; no more is asked for than the card has",
        "要求在 {total_mb:.0f} MB 的显卡上释放 {asked_mb:.0f} MB；请求不会超过显卡的容量",
    ),
    "rule.slider_above": (
        "'GPU Weights' is at {set_mb:.0f} MB on a card of {total_mb:.0f} MB, which leaves {left_mb:.0f} MB for computing; it "
        "counts as {total_mb:.0f} MB. Set 'GPU Weights' at least 1024 MB below the card's memory",
        "“GPU Weights”为 {set_mb:.0f} MB，而显卡只有 {total_mb:.0f} MB，留给计算的是 {left_mb:.0f} MB；现按 {total_mb:.0f} MB 处理。"
        "请将“GPU Weights”设为比显存至少小 1024 MB",
    ),
    "rule.slider_below": (
        "'GPU Weights' is at {set_mb:.0f} MB, which would keep {left_mb:.0f} MB of a card of {total_mb:.0f} MB for computing; it "
        "counts as 0 MB. Raise 'GPU Weights', or every layer is copied to the card in every step",
        "“GPU Weights”为 {set_mb:.0f} MB，会在 {total_mb:.0f} MB 的显卡上为计算保留 {left_mb:.0f} MB；现按 0 MB 处理。"
        "请调高“GPU Weights”，否则每一步都要把所有层复制到显卡",
    ),
    "rule.slider_not_a_number": (
        "'GPU Weights' is not a number; 1024 MB of the card's {total_mb:.0f} MB are kept for computing. Set 'GPU Weights' anew",
        "“GPU Weights”不是数字；将从显卡的 {total_mb:.0f} MB 中为计算保留 1024 MB。请重新设置“GPU Weights”",
    ),
    "rule.step": (
        "{model} needs about {needed_mb:.0f} MB for a step of this size and 'GPU Weights' leaves {left_mb:.0f} MB: "
        "{needed_mb:.0f} MB are kept free. For larger pictures lower 'GPU Weights'",
        "{model} 在此尺寸下每步约需 {needed_mb:.0f} MB，而“GPU Weights”只留下 {left_mb:.0f} MB：现保留 {needed_mb:.0f} MB。"
        "生成更大的图片时请调低“GPU Weights”",
    ),
    "rule.factors": (
        "the LoRAs take {size_mb:.0f} MB of VRAM, which is reserved for them",
        "LoRA 占用 {size_mb:.0f} MB 显存，已为其预留",
    ),
    "rule.disagreement": (
        "torch says that {torch_mb:.0f} MB of VRAM are free, the driver (NVML) {nvml_mb:.0f} MB: other programs hold the rest. "
        "The lower number counts. Close browsers and games that use the card",
        "torch 认为有 {torch_mb:.0f} MB 空闲显存，驱动（NVML）认为只有 {nvml_mb:.0f} MB：其余被其他程序占用。"
        "以较小的数字为准。请关闭正在使用显卡的浏览器和游戏",
    ),
    "rule.ram_slow": (
        "{what} needs {needed_mb:.0f} MB of RAM and {fast_mb:.0f} MB are free: the page file would be used, which takes minutes",
        "{what}需要 {needed_mb:.0f} MB 内存，而空闲的只有 {fast_mb:.0f} MB：将会使用页面文件，可能耗时数分钟",
    ),
    "rule.ram_refused": (
        "{what} needs {needed_mb:.0f} MB of RAM; with the page file there are {alive_mb:.0f} MB, and the system would end Forge. "
        "Make the page file at least {more_gb} GB larger, close other programs, or use a smaller model file",
        "{what}需要 {needed_mb:.0f} MB 内存；连同页面文件只有 {alive_mb:.0f} MB，系统会终止 Forge。"
        "请将页面文件（虚拟内存）至少增大 {more_gb} GB、关闭其他程序，或使用更小的模型文件",
    ),
    "rule.shrinking": (
        "{before_mb:.0f} MB of {model} were on the card and {after_mb:.0f} MB are there now, though nothing needed the room",
        "{model} 在显卡上的部分从 {before_mb:.0f} MB 减少到 {after_mb:.0f} MB，而并没有别的模型需要这些空间",
    ),
    "rule.nothing_changed": (
        "a page was opened or a setting touched, and Forge was about to unload all models for it; nothing has changed, so they "
        "stay where they are",
        "打开页面或点击设置后，Forge 原本要卸载全部模型；但设置没有变化，模型保持原位",
    ),
}
