"""Saving models."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "saving.waiting": (
        "{name} is saved as soon as what is running now has finished",
        "当前任务结束后将立即保存 {name}",
    ),
    "saving.done": (
        "{name} saved, {gigabytes:.2f} GB, with LoRAs in {count} of its weights",
        "已保存 {name}（{gigabytes:.2f} GB），其中 {count} 个权重包含 LoRA",
    ),
    "saving.rounded": (
        "{name}: {count} weights are stored as {format}, and rounding to that loses most of a LoRA; to keep it, save from "
        "the 16-bit model, or make the file with 'lora-guard bake'",
        "{name}：有 {count} 个权重以 {format} 存储，舍入到该格式会丢失 LoRA 的大部分效果；若要保留，请改用 16 位模型保存，"
        "或用 “lora-guard bake” 生成文件",
    ),
    "saving.left_out": (
        "{name}: {count} weights stored as {format} are saved as they are, WITHOUT their LoRAs; to keep them, save from the "
        "16-bit model, or make the file with 'lora-guard bake'",
        "{name}：有 {count} 个以 {format} 存储的权重将按原样保存，不含 LoRA；若要保留，请改用 16 位模型保存，"
        "或用 “lora-guard bake” 生成文件",
    ),
    "saving.failed": (
        "{name} was not saved, and a file of that name is as it was: {reason}",
        "未能保存 {name}，原有的同名文件保持不变：{reason}",
    ),
    "saving.interrupted": (
        "saving was interrupted",
        "保存已被中断",
    ),
    "saving.overflow": (
        "with its LoRAs {key} does not fit into {dtype}; take the LoRAs off, or lower their strengths",
        "{key} 应用 LoRA 后的数值超出 {dtype} 的范围；请移除 LoRA 或降低其强度",
    ),
    "saving.unpatched": (
        "Save UNet and Save Checkpoint will write the model WITHOUT its LoRAs, since this Forge saves in a way that LoRA Guard "
        "does not know: {reason}",
        "由于此版本 Forge 的保存方式不受 LoRA Guard 支持，“Save UNet” 和 “Save Checkpoint” 保存的模型将不含 LoRA：{reason}",
    ),
    "saving.in_memory": (
        "saving a model will take as much memory as it does in Forge itself: {reason}",
        "保存模型时的内存占用将与 Forge 自身相同：{reason}",
    ),
    "saving.control_unpatched": (
        "a ControlLora will see the model without its LoRAs: {reason}",
        "ControlLora 将使用不含 LoRA 的模型：{reason}",
    ),
}
