"""Applying LoRAs in Forge."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    # At the start.
    "host.in_place": ("{version} in place of Forge's LoRA patcher", "{version} 已接管 Forge 的 LoRA 补丁功能"),
    "host.switched_off": (
        "{version} is switched off by --lora-guard-off; Forge's own LoRA patcher is in place",
        "{version} 已由 --lora-guard-off 关闭；使用 Forge 自带的 LoRA 补丁功能",
    ),
    "host.does_not_fit": (
        "{version} does not fit this program, so nothing is changed: {why}",
        "{version} 与此程序不兼容，未做任何更改：{why}",
    ),
    "host.could_not_start": (
        "{version} could not start, so nothing is changed",
        "{version} 无法启动，未做任何更改",
    ),
    "host.second_copy": (
        "another copy of LoRA Guard is installed already; keep one folder in extensions/",
        "已安装另一份 LoRA Guard；请在 extensions/ 中只保留一个文件夹",
    ),
    "host.updated": (
        "LoRA Guard was updated; restart Forge to use the new version ({version} is still running)",
        "LoRA Guard 已更新；请重启 Forge 以使用新版本（当前运行的仍是 {version}）",
    ),
    # Reading files.
    "host.left_out": ("{name} NOT applied: {why} (LG-L01)", "{name} 未应用：{why}（LG-L01）"),
    "host.left_out_of_model": (
        "{name} NOT applied to {model}: {why} (LG-L01)",
        "{name} 未应用到 {model}：{why}（LG-L01）",
    ),
    "host.left_out_of_all": ("{name} ({why})", "{name}（{why}）"),
    "host.still_without": ("still without {loras}", "仍未应用：{loras}"),
    "host.guard_could_not_read": (
        "{name}: the guard could not read it; Forge's own reader is used",
        "{name}：LoRA Guard 无法读取；改用 Forge 自带的读取方式",
    ),
    "host.installed_twice": (
        "LoRA Guard is installed twice; the copy in {first} is at work, delete the one in {second} or the other way round, and restart",
        "LoRA Guard 安装了两份；正在使用的是 {first} 中的一份，请删除 {second} 中的一份（或反过来），然后重启",
    ),
    "host.keys_for": ("{name}: {count} keys for the {side}", "{name}：{count} 个键用于{side}"),
    "host.unet": ("U-Net", " U-Net"),
    "host.text_encoder": ("text encoder", "文本编码器"),
    "host.no_module_here": (
        "none of its {count} modules is in this model (it has {first}); use a LoRA made for this model",
        "其 {count} 个模块在当前模型中都不存在（例如 {first}）；请使用适用于此模型的 LoRA",
    ),
    "host.nothing": ("nothing", "无"),
    "host.in_part": (
        "{name}: {what}; that is {percent} of the file, the rest is applied (LG-L02)",
        "{name}：{what}；占该文件的 {percent}，其余部分已应用（LG-L02）",
    ),
    "host.in_small_part": (
        "{name}: {what}; that is {percent} of the file, so the picture lacks a good part of it: use a version of this LoRA that was made for this model (LG-L02)",
        "{name}：{what}；占该文件的 {percent}，图片会缺少相当一部分效果：请使用适用于此模型的版本（LG-L02）",
    ),
    "host.keys_without_place": (
        "{count} of its keys have no place in this model and are left out (first: {first})",
        "有 {count} 个键在当前模型中没有对应位置，已忽略（第一个：{first}）",
    ),
    "host.keys_lost": (
        "{count} keys cannot be applied to this model: {first}",
        "有 {count} 个键无法应用到当前模型：{first}",
    ),
    "host.lost_on_model": (
        "{name}: {count} of its weights are left out of {model}: {first} (LG-L02)",
        "{name}：有 {count} 个权重未应用到 {model}：{first}（LG-L02）",
    ),
    # Applying.
    "host.apply_failed": ("{model}: applying LoRAs failed", "{model}：应用 LoRA 失败"),
    "host.model_still_without": ("{model}: still without {loras}", "{model}：仍未应用 {loras}"),
    "host.not_restored": (
        "{model}: some weights could not be restored; reload the checkpoint",
        "{model}：有权重无法恢复；请重新加载模型",
    ),
    "host.not_restored_next_image": (
        "{model}: some weights could not be restored; reload the checkpoint before you trust the next image",
        "{model}：有权重无法恢复；请先重新加载模型，否则下一张图片可能不正确",
    ),
    "host.not_lifted": (
        "{model}: originals could not be put back before it is moved",
        "{model}：移动模型之前无法恢复原始权重",
    ),
    "host.own_patcher_failed": ("{model}: Forge's own patcher failed", "{model}：Forge 自带的补丁功能失败"),
    "host.fell_back": (
        "{model}: {why}; applied by {way} instead: {loras}",
        "{model}：{why}；改由{way}应用：{loras}",
    ),
    "host.fp16_path": ("Forge's fp16-LoRA path", " Forge 的 fp16 LoRA 方式"),
    "host.merge_path": ("Forge's merge", " Forge 的合并方式"),
    "host.without": (
        "{model}: this image is made WITHOUT the LoRAs {loras}: {why} (LG-L05)",
        "{model}：这张图片没有应用以下 LoRA：{loras}。原因：{why}（LG-L05）",
    ),
}
