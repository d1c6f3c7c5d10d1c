"""The tab "LoRA Guard": labels (sent to the browser without their prefix) and sentences."""

from __future__ import annotations

LABELS = "panel.label."
"""Prefix of the keys of all texts that the browser inserts itself. The browser fills in their `{...}`."""

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "panel.label.in_force": ("Settings in force", "当前生效的设置"),
    "panel.label.mode": ("LoRA mode", "LoRA 模式"),
    "panel.label.tip_mode": (
        "How LoRAs reach the model. Change it under Settings, LoRA Guard.",
        "LoRA 作用于模型的方式。可在“设置”的“LoRA Guard”中更改。",
    ),
    "panel.label.allocator": ("CUDA allocator", "CUDA 分配器"),
    "panel.label.tip_allocator": (
        "The part of torch that hands out VRAM. Its options can help against fragments; they are under Settings, LoRA Guard.",
        "torch 中负责分配显存的部分。其选项有助于减少碎片，可在“设置”的“LoRA Guard”中更改。",
    ),
    "panel.label.waiting": ("no answer, trying again", "没有响应，正在重试"),
    "panel.label.gone": (
        "The server has not answered since {time}. All numbers below are from then; the page goes on when it is back.",
        "自 {time} 起服务器没有响应。下方均为当时的数据；恢复后页面会自动继续。",
    ),
    "panel.label.log_in": ("not logged in; reload the page", "未登录，请刷新页面"),
    "panel.label.refused": (
        "the server answers pages of this machine only; to open it to others, start the WebUI with --listen or --server-name",
        "服务器只接受本机的页面；若要从其他设备访问，请使用 --listen 或 --server-name 启动 WebUI",
    ),
    "panel.label.restarted": ("Forge was started again", "Forge 已重新启动"),
    "panel.label.close": ("Close this message", "关闭此消息"),
    "panel.mode": ("{name}: {what}", "{name}：{what}"),
    "panel.mode.low_bits": (
        "{name}, as chosen under “Diffusion in Low Bits”: {what}",
        "{name}（由“Diffusion in Low Bits”选定）：{what}",
    ),
    "panel.mode.off": (
        "switched off; Forge's own LoRA patcher is at work",
        "已关闭；由 Forge 自带的 LoRA 补丁功能处理",
    ),
    "panel.not_in_place": (
        "LoRA Guard is not in place here; the console says why.",
        "LoRA Guard 在此处未生效，原因请见控制台。",
    ),
    "panel.allocator.option": ("{name}: {state}", "{name}：{state}"),
    # The strip.
    "panel.headline.the_model": ("The model", "模型"),
    "panel.headline.ready": (
        "Ready. No model is loaded yet; the first image loads it.",
        "就绪。尚未加载模型，生成第一张图片时会加载。",
    ),
    "panel.headline.loaded": ("{model} is loaded, LoRAs on it: {count}", "已加载 {model}，使用 LoRA：{count} 个"),
    "panel.headline.loaded_and_last": (
        "{model} is loaded, LoRAs on it: {count}; the last image took {seconds:.1f} s",
        "已加载 {model}，使用 LoRA：{count} 个；上一张图片用时 {seconds:.1f} 秒",
    ),
    "panel.headline.off": (
        "LoRA Guard is switched off; Forge's own LoRA patcher is at work. Settings, LoRA Guard, switches it on.",
        "LoRA Guard 已关闭，由 Forge 自带的 LoRA 补丁功能处理。可在“设置”的“LoRA Guard”中启用。",
    ),
    "panel.headline.load": ("{model}: loading and making room", "{model}：正在加载并腾出空间"),
    "panel.headline.encode": ("{model}: encoding", "{model}：正在编码"),
    "panel.headline.decode": ("{model}: decoding the image", "{model}：正在解码图片"),
    "panel.headline.other": ("{model}: an image is being made", "{model}：正在生成图片"),
    "panel.headline.sampling": ("{model}: making the image", "{model}：正在采样"),
    "panel.headline.step": ("{model}: step {step} of {of}", "{model}：第 {step} 步，共 {of} 步"),
    "panel.headline.step_timed": (
        "{model}: step {step} of {of}, {seconds:.1f} s each",
        "{model}：第 {step} 步，共 {of} 步，每步 {seconds:.1f} 秒",
    ),
    "panel.headline.left_out": ("{name} was left out: {why}", "{name} 未应用：{why}"),
}
