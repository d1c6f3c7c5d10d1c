"""Explanations of lines of the log, by the key of the line after "why."; they get the line's own facts."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "why.memory.chosen": (
        "{model} does not fit beside everything else. Of the ways to place it for {calls} calls, this one copies for {seconds:.1f} s; "
        "another would copy for {other_seconds:.1f} s. A smaller picture, a smaller model file or fewer LoRAs make more of it fit.",
        "{model} 与其余内容无法同时放入显存。在运行 {calls} 次的各种放置方式中，此方式复制用时 {seconds:.1f} 秒，另一种需要 "
        "{other_seconds:.1f} 秒。缩小图像、使用更小的模型文件或减少 LoRA，可以让更多部分放入显存。",
    ),
    "why.memory.shrunk": (
        "What comes next needs room, and moving {size_mb:.0f} MB of {model} takes less time than moving all of it.",
        "后续内容需要空间，而移动 {model} 的 {size_mb:.0f} MB 比移动整个模型更快。",
    ),
    "why.memory.pinned": (
        "{size_mb:.0f} MB of {model} are copied to the card in every step. From pinned RAM that is several times as fast, but "
        "other programs cannot use this RAM meanwhile. A switch under Settings, LoRA Guard, turns it off.",
        "{model} 的 {size_mb:.0f} MB 每一步都要复制到显卡。放在锁页内存中会快数倍，但其他程序此时无法使用这部分内存。可在“设置”的“LoRA "
        "Guard”中关闭。",
    ),
    "why.memory.on_the_cpu": (
        "Another program, or a larger picture than planned, took the VRAM that the LoRA of {key} needed.",
        "其他程序或比计划更大的图像占用了 {key} 的 LoRA 所需的显存。",
    ),
    "why.everyday.not_merged": (
        "The weights are stored as {format}, which has too few values for the small changes of a LoRA: rounding would spoil "
        "{count} weights. So the LoRA is calculated beside them, and nothing of it is lost.",
        "权重以 {format} 格式存储，可取的数值太少，无法表示 LoRA 的细微修改：{count} 个权重会因取整而受损。因此 LoRA 在权重之外计算，不会丢失任何内容。",
    ),
    "why.host.left_out": (
        "The image was made without {name}; everything else is in it. Reason: {why}",
        "图像在没有 {name} 的情况下生成，其余内容均已应用。原因：{why}",
    ),
    "why.report.line": (
        "The LoRAs of {model} have changed, which took {milliseconds:.0f} ms. They lie beside the model and take {device_mb:.1f} MB "
        "on {device} and {ram_mb:.1f} MB of RAM; the weights stay as they are unless a part says “merge”.",
        "{model} 的 LoRA 已更改，用时 {milliseconds:.0f} 毫秒。它们位于模型之外，在 {device} 上占用 {device_mb:.1f} MB，占用内存 {ram_mb:.1f} MB；"
        "除非注明“合并”，否则权重保持不变。",
    ),
}
