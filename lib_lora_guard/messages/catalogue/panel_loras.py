"""The tab "LoRA Guard": one row for each LoRA file, and its details."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "panel.label.loras": ("LoRAs in use", "正在使用的 LoRA"),
    "panel.label.nothing": (
        "No LoRA has been applied yet. Put one into the prompt and generate an image.",
        "尚未应用任何 LoRA。在提示词中加入 LoRA 并生成一张图片即可。",
    ),
    "panel.label.lora": ("LoRA", "LoRA"),
    "panel.label.tip_lora": (
        "A file of the last prompt. Press its name for details.",
        "上一次提示词中的文件。点击名称可查看详情。",
    ),
    "panel.label.base": ("Made for", "适用底模"),
    "panel.label.tip_base": (
        "The kind of model that the file was trained for, as its tensors show it.",
        "训练该文件时所用的底模类型，根据其中的张量判断。",
    ),
    "panel.label.rank": ("Rank", "秩"),
    "panel.label.tip_rank": (
        "The inner width of a LoRA: a larger rank holds more and takes more memory.",
        "LoRA 的内部宽度：秩越大，容量越大，占用的显存和内存也越多。",
    ),
    "panel.label.size": ("Size", "大小"),
    "panel.label.tip_size": ("What the file's tensors take.", "文件中张量的大小。"),
    "panel.label.strength": ("Strength", "强度"),
    "panel.label.tip_strength": (
        "The number behind the name in the prompt. Two numbers: image model and text encoder differ.",
        "提示词中名称后的数字。若有两个数字，则图像模型与文本编码器不同。",
    ),
    "panel.label.share": ("Applied", "已应用"),
    "panel.label.tip_share": (
        "The share of the file that the loaded checkpoint has a place for.",
        "该文件中当前模型能够使用的比例。",
    ),
    "panel.label.cost": ("Cost", "开销"),
    "panel.label.tip_cost": (
        "Memory that the LoRA takes beside the model, and its part of the time that the last change of LoRAs took.",
        "该 LoRA 在模型之外占用的显存和内存，以及上次更改 LoRA 所用时间中属于它的部分。",
    ),
    "panel.label.details": ("Details", "详细信息"),
    "panel.label.kind": ("Kind", "类型"),
    "panel.label.tip_kind": (
        "How the trainer stored the change: LoRA, LoHa, LoKr, DoRA and others.",
        "训练器保存修改的形式：LoRA、LoHa、LoKr、DoRA 等。",
    ),
    "panel.label.on_model": ("{model}, strength {strength}", "{model}，强度 {strength}"),
    "panel.label.used": ("{used} weights changed", "已修改 {used} 个权重"),
    "panel.label.skipped": ("{skipped} keys without a place", "{skipped} 个键没有对应位置"),
    "panel.label.not_applied": ("not applied: {reason}", "未应用：{reason}"),
    "panel.label.lost": ("{count} keys of the model could not be patched", "模型中有 {count} 个键无法应用"),
    "panel.label.last_change": (
        "{model}: LoRAs take {device_mb} on {device} and {ram_mb} of RAM; the last change took {ms}",
        "{model}：LoRA 在 {device} 上占用 {device_mb}，占用内存 {ram_mb}；上次更改用时 {ms}",
    ),
    "panel.label.tip_way_bypass": (
        "Bypass: the LoRA is calculated beside the layer and added to its result. The weights stay as they are.",
        "旁路：在层之外计算 LoRA，再加到结果上。权重保持不变。",
    ),
    "panel.label.tip_way_on_the_fly": (
        "On the fly: each step changes a copy of the weight that lives for that moment only.",
        "即时计算：每一步只修改权重的临时副本，用完即弃。",
    ),
    "panel.label.tip_way_merge": (
        "Merge: the LoRA is written into the weight, and the original is kept to go back to.",
        "合并：将 LoRA 写入权重，并保留原始权重以便恢复。",
    ),
    "panel.way.bypass": ("beside the layer (bypass)", "层旁计算（旁路）"),
    "panel.way.bypass_fused": ("beside the layer, fused (bypass)", "层旁计算，融合（旁路）"),
    "panel.way.bypass_partly_fused": (
        "beside the layer, {fused} of them fused (bypass)",
        "层旁计算，其中 {fused} 个融合（旁路）",
    ),
    "panel.way.on_the_fly": ("on a temporary weight (on the fly)", "临时权重（即时计算）"),
    "panel.way.on_the_fly_fused": ("on a temporary weight, fused (on the fly)", "临时权重，融合（即时计算）"),
    "panel.way.on_the_fly_partly_fused": (
        "on a temporary weight, {fused} of them fused (on the fly)",
        "临时权重，其中 {fused} 个融合（即时计算）",
    ),
    "panel.way.merge": ("written into the weight (merge)", "写入权重（合并）"),
    "panel.weights": ("{count} {mode}", "{mode} {count}"),
    "panel.model.image": ("image model", "图像模型"),
    "panel.model.text_encoder": ("text encoder", "文本编码器"),
}
