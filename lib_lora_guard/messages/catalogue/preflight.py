"""Checks before something large is read or moved."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "preflight.reading": ("reading {files}", "读取 {files} "),
    "preflight.moving": ("moving {model} off the card", "将 {model} 移出显卡"),
    "preflight.dropped": (
        "RAM is short: {size_mb:.0f} MB of LoRA files and remembered prompts are given back",
        "内存不足：已释放 {size_mb:.0f} MB 的 LoRA 文件和提示词缓存",
    ),
    "preflight.decoding": (
        "decoding {count} picture(s) of {width}x{height}",
        "解码 {count} 张 {width}x{height} 的图片",
    ),
    "preflight.encoding": (
        "encoding {count} picture(s) of {width}x{height}",
        "编码 {count} 张 {width}x{height} 的图片",
    ),
    "preflight.tiles_in_vram": (
        "{what} takes about {need_mb:.0f} MB of VRAM for each and {free_mb:.0f} MB are free: the VAE works in tiles, which take "
        "about {tile_mb:.0f} MB. A smaller picture, or 'VAE in 16 bit' where it is 32, avoids this",
        "{what}时每张约需 {need_mb:.0f} MB 显存，而空闲的只有 {free_mb:.0f} MB：VAE 将分块处理，约需 {tile_mb:.0f} MB。"
        "缩小图片，或将 32 位的 VAE 改为 16 位，可避免分块",
    ),
    "preflight.tiles_in_ram": (
        "{what} at once takes about {need_mb:.0f} MB of RAM and {free_mb:.0f} MB are free: the VAE works in tiles, which take about "
        "{tile_mb:.0f} MB",
        "{what}若一次完成约需 {need_mb:.0f} MB 内存，而空闲的只有 {free_mb:.0f} MB：VAE 将分块处理，约需 {tile_mb:.0f} MB",
    ),
    "preflight.singly_in_ram": (
        "{what} at once takes about {need_mb:.0f} MB of RAM and {free_mb:.0f} MB are free: the VAE takes one picture after the other",
        "{what}若一次完成约需 {need_mb:.0f} MB 内存，而空闲的只有 {free_mb:.0f} MB：VAE 将逐张处理",
    ),
    "preflight.not_merged": (
        "{model}: to merge into {of} of its weights takes {need_mb:.0f} MB of RAM and {free_mb:.0f} MB are free: {count} of them "
        "keep their LoRA beside the weight. The picture has all of it; a step takes a little longer",
        "{model}：合并其中 {of} 个权重需要 {need_mb:.0f} MB 内存，而空闲的只有 {free_mb:.0f} MB：其中 {count} 个权重改为在旁路计算 LoRA。"
        "图片效果完整，只是每步稍慢",
    ),
    "preflight.merge_ended": (
        "{model}: memory ended while LoRAs were merged ({why}); they lie beside the weights instead. The picture has all of "
        "them; a step takes a little longer",
        "{model}：合并 LoRA 时内存耗尽（{why}）；改为在权重旁路计算。图片效果完整，只是每步稍慢",
    ),
    # Advice.
    "preflight.refused": ("{why}. What would help: {advice}", "{why}。可行的办法：{advice}"),
    "preflight.helps": ("memory ended. What would help: {advice}", "内存或显存耗尽。可行的办法：{advice}"),
    "preflight.format": ("{format} needs {need_gb:.1f} GB", "{format} 需要 {need_gb:.1f} GB"),
    "preflight.formats": (
        "the model in another format, of your {total_gb:.1f} GB: {formats}",
        "改用其他格式的模型（共有 {total_gb:.1f} GB）：{formats}",
    ),
    "preflight.smaller_picture": (
        "a picture of {width}x{height} needs {saved_gb:.1f} GB less",
        "{width}x{height} 的图片可少用 {saved_gb:.1f} GB",
    ),
    "preflight.one_picture": ("one picture at a time needs {need_gb:.1f} GB", "每次只生成一张需要 {need_gb:.1f} GB"),
    "preflight.leave_out": ("leaving out {names} saves {saved_gb:.1f} GB", "去掉 {names} 可节省 {saved_gb:.1f} GB"),
    "preflight.others_hold": (
        "closing other programs, which hold {size_mb:.0f} MB of VRAM: {names}",
        "关闭占用 {size_mb:.0f} MB 显存的其他程序：{names}",
    ),
    "preflight.others_use": ("closing other programs that use the card: {names}", "关闭使用显卡的其他程序：{names}"),
}
