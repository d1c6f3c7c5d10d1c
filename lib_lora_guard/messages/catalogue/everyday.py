"""Names in a prompt, and settings that change while Forge runs."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "everyday.no_such_lora": (
        "there is no LoRA of that name; check the name in the prompt or refresh the list",
        "没有这个名称的 LoRA；请检查提示词中的名称或刷新列表",
    ),
    "everyday.partly_fits": (
        "a part of Forge is left alone, since it is not as expected: {reason}",
        "Forge 的一部分与预期不符，保持原样：{reason}",
    ),
    "everyday.bad_option": (
        "the option {name} has the value {value}, which makes no sense; its default is used",
        "选项 {name} 的值 {value} 无效；将使用默认值",
    ),
    "everyday.switched_on": (
        "switched on: LoRAs are applied by LoRA Guard from the next image on",
        "已启用：从下一张图片起由 LoRA Guard 应用 LoRA",
    ),
    "everyday.switched_off": (
        "switched off: Forge's own LoRA patcher is back in place",
        "已停用：已恢复 Forge 自带的 LoRA 补丁功能",
    ),
    "everyday.switch_waits": (
        "an image is being made; the setting takes effect when it is finished",
        "正在生成图片；设置将在完成后生效",
    ),
    "everyday.not_carried_out": ("the setting could not be carried out", "设置未能生效"),
    "everyday.not_merged": (
        "{model}: merging was asked for, but its {count} weights stored as {format} would round a part of the LoRA away (cosine {cosine:.2f} between what would be left and the whole, measured on {weight}); there the LoRA is added while the layers run, whole",
        "{model}：要求合并，但其 {count} 个以 {format} 存储的权重会因舍入损失部分 LoRA 效果（在 {weight} 上测得，保留部分与完整效果的余弦相似度为 {cosine:.2f}）；这些权重改为在各层运行时完整地加上 LoRA",
    ),
    "everyday.cannot_be_merged": (
        "{model}: merging was asked for, but its {count} weights stored as {format} cannot be written back in that format; there the LoRA is added while the layers run, whole",
        "{model}：要求合并，但其 {count} 个以 {format} 存储的权重无法以该格式写回；这些权重改为在各层运行时完整地加上 LoRA",
    ),
    "everyday.allocator": ("CUDA allocator: {state}", "CUDA 分配器：{state}"),
    "everyday.allocator_failed": (
        "the CUDA allocator's options could not be set; images are made without them",
        "无法设置 CUDA 分配器选项；将不使用这些选项继续生成图片",
    ),
    "everyday.no_tab": (
        "the settings and the tab could not be added to this WebUI; LoRAs are applied all the same",
        "无法向此 WebUI 添加设置和标签页；LoRA 仍会正常应用",
    ),
}
