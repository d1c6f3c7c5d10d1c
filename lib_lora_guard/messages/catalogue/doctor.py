"""The report of `lora-guard doctor` about this machine."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "doctor.versions": (
        "LoRA Guard {guard}, Python {python}, torch {torch}, {system}",
        "版本：LoRA Guard {guard}，Python {python}，torch {torch}，{system}",
    ),
    "doctor.card": ("Card: {name}", "显卡：{name}"),
    "doctor.no_card": ("Card: none that torch can use for CUDA", "显卡：没有可供 torch 使用的 CUDA 显卡"),
    "doctor.not_started": ("Card: CUDA does not start ({error})", "显卡：CUDA 无法启动（{error}）"),
    "doctor.memory": ("Memory now", "当前内存与显存"),
    "doctor.reading": ("{name}: {gb:.2f} GB ({source})", "{name}：{gb:.2f} GB（{source}）"),
    "doctor.missing": ("{names}: not known ({why})", "{names}：未知（{why}）"),
    "doctor.usable_vram": (
        "VRAM that models can still take: {gb:.2f} GB",
        "模型仍可使用的显存：{gb:.2f} GB",
    ),
    "doctor.alive_ram": (
        "RAM and page file until the system refuses: {gb:.2f} GB",
        "系统拒绝分配之前可用的内存与页面文件：{gb:.2f} GB",
    ),
    "doctor.reading_vram_total": ("VRAM", "显存总量"),
    "doctor.reading_vram_free": ("VRAM free", "空闲显存"),
    "doctor.reading_vram_free_nvml": ("VRAM free, second opinion", "空闲显存（另一来源）"),
    "doctor.reading_vram_reserved": ("VRAM held by torch", "torch 保留的显存"),
    "doctor.reading_vram_active": ("VRAM used by torch", "torch 使用中的显存"),
    "doctor.reading_vram_ours": ("VRAM of this process", "本进程的显存"),
    "doctor.reading_vram_others": ("VRAM of other programs", "其他程序的显存"),
    "doctor.reading_ram_total": ("RAM", "内存总量"),
    "doctor.reading_ram_available": ("RAM available", "可用内存"),
    "doctor.reading_ram_cgroup_room": ("RAM that control groups leave", "控制组剩余的内存"),
    "doctor.reading_ram_and_swap_cgroup_room": (
        "RAM and swap that control groups leave",
        "控制组剩余的内存与交换空间",
    ),
    "doctor.reading_swap_total": ("page file (swap)", "页面文件（swap）总量"),
    "doctor.reading_swap_free": ("page file (swap) free", "页面文件（swap）剩余"),
    "doctor.reading_commit_limit": ("commit limit", "提交上限"),
    "doctor.reading_commit_charge": ("committed", "已提交"),
    "doctor.reading_commit_room": ("room to commit", "剩余可提交"),
    "doctor.reading_pinned": ("pinned RAM", "锁页内存"),
    "doctor.reading_rss": ("RAM of this process", "本进程的内存"),
    "doctor.reading_rss_peak": ("RAM of this process at its peak", "本进程的内存峰值"),
    "doctor.allocator": (
        "CUDA allocator: {backend}; {variable} in this console: {text}",
        "CUDA 分配器：{backend}；此控制台中的 {variable}：{text}",
    ),
    "doctor.option": ("{names}: can be set", "{names}：可以设置"),
    "doctor.option_missing": ("{names}: {why}", "{names}：{why}"),
    "doctor.unset": ("not set", "未设置"),
    "doctor.data": ("What the guard keeps: {folder}", "LoRA Guard 保存的数据：{folder}"),
    "doctor.no_data": (
        "What the guard keeps: nothing yet in {folder}",
        "LoRA Guard 保存的数据：{folder} 中尚无内容",
    ),
    "doctor.no_corrections": (
        "No memory estimate is corrected: nothing was measured yet",
        "尚无对显存与内存估算值的修正：还没有测量过",
    ),
    "doctor.corrections": (
        "{count} memory estimates were measured; the largest corrections:",
        "已测量 {count} 项显存与内存估算值，其中最大的修正：",
    ),
    "doctor.all_right": (
        "{count} memory estimates were measured; none needs a correction",
        "已测量 {count} 项显存与内存估算值，均无需修正",
    ),
    "doctor.crash": ("The last process that died", "上一个异常终止的进程"),
    "doctor.no_crash": (
        "No earlier process died while it was at work, as far as is known",
        "据目前所知，之前没有进程在工作时异常终止",
    ),
    "doctor.forgotten": (
        "{count} corrections of memory estimates forgotten ({file})",
        "已清除 {count} 项对显存与内存估算值的修正（{file}）",
    ),
    "doctor.links_forgotten": (
        "speeds between RAM and the card forgotten for {count} cards ({file}); a WebUI that runs measures them again after its restart",
        "已清除 {count} 张显卡与内存之间的速度（{file}）；正在运行的 WebUI 将在重启后重新测量",
    ),
}
