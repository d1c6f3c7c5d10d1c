"""Explanations of lines of the log, by the key of the line after "why."; they get the line's own facts."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "why.memory.chosen": (
        "{model} does not fit beside everything else. Of the ways to place it (calls: {calls}), this one copies for {seconds:.1f} s; "
        "another would copy for {other_seconds:.1f} s. A smaller picture, a smaller model file or fewer LoRAs make more of it fit.",
        "{model} 与其余内容无法同时放入显存。在运行 {calls} 次的各种放置方式中，此方式复制用时 {seconds:.1f} 秒，另一种需要 "
        "{other_seconds:.1f} 秒。缩小图片、使用更小的模型文件或减少 LoRA，可以让更多部分放入显存。",
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
        "其他程序或比计划更大的图片占用了 {key} 的 LoRA 所需的显存。",
    ),
    "why.memory.swapped": (
        "{model} runs for a short while (calls: {passes}) and is then not needed. Making room for all of it would move more than the "
        "{size_mb:.0f} MB that are copied to the card as they are used.",
        "{model} 只运行 {passes} 次，之后暂时不再需要。为整个模型腾出空间所移动的数据，比使用时复制到显卡的 {size_mb:.0f} MB 更多。",
    ),
    "why.rule.step": (
        "A step works with numbers beside the weights of {model}: about {needed_mb:.0f} MB at this picture size. With only {left_mb:.0f} MB "
        "free for them the step would fail, or the driver would move VRAM into RAM, so that much more is kept free of weights.",
        "除权重外，{model} 的每一步还需要中间结果：在此图片尺寸下约 {needed_mb:.0f} MB。如果只留 {left_mb:.0f} MB，这一步会失败，或者驱动会把显存"
        "移到内存中，因此要多留出一些空间，不放权重。",
    ),
    "why.rule.factors": (
        "LoRAs lie beside the model on the card, {size_mb:.0f} MB here. Weights are placed so that this room stays.",
        "LoRA 与模型一起放在显卡上，此处占用 {size_mb:.0f} MB。放置权重时会留出这部分空间。",
    ),
    "why.everyday.not_merged": (
        "The weights are stored as {format}, which has too few values for the small changes of a LoRA: rounding would spoil "
        "{count} weights. So the LoRA is calculated beside them, and nothing of it is lost.",
        "权重以 {format} 格式存储，可取的数值太少，无法表示 LoRA 的细微修改：{count} 个权重会因舍入而受损。因此 LoRA 在权重之外计算，不会丢失任何内容。",
    ),
    "why.host.left_out": (
        "The image was made without {name}; everything else is in it. Reason: {why}",
        "这张图片没有应用 {name}，其余内容均已应用。原因：{why}",
    ),
    "why.report.line": (
        "The LoRAs of {model} have changed, which took {milliseconds:.0f} ms. They lie beside the model and take {device_mb:.1f} MB "
        "on {device} and {ram_mb:.1f} MB of RAM; the weights stay as they are unless a part says “merge”.",
        "{model} 的 LoRA 已更改，用时 {milliseconds:.0f} 毫秒。它们位于模型之外，在 {device} 上占用 {device_mb:.1f} MB，占用内存 {ram_mb:.1f} MB；"
        "除非注明“合并”，否则权重保持不变。",
    ),
}
