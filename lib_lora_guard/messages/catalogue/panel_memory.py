"""The tab "LoRA Guard": memory, the need of a step, and other programs that hold VRAM."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "panel.label.memory": ("Memory now", "当前显存与内存"),
    "panel.label.free": ("{free} free of {total}", "剩余 {free}，共 {total}"),
    "panel.label.used_of": ("{used} of {total} in use", "已用 {used}，共 {total}"),
    "panel.label.none": ("none", "无"),
    "panel.label.numbers": ("Every number and where it comes from", "所有数值及其来源"),
    "panel.label.tip_numbers": (
        "Everything that LoRA Guard reads before it plans, for a bug report or to compare with other programs.",
        "LoRA Guard 制定计划前读取的全部数值，可用于反馈问题或与其他程序对比。",
    ),
    "panel.label.not_known": ("not known: {reason}", "未知：{reason}"),
    "panel.source": ("as told by: {sources}", "数据来源：{sources}"),
    "panel.part.ours": ("this Forge", "当前 Forge"),
    "panel.part.others": ("other programs and the driver", "其他程序和驱动"),
    "panel.part.cache": ("kept by torch, free for the next step", "torch 保留，可供下一步使用"),
    "panel.vram": ("VRAM", "显存"),
    "panel.ram": ("RAM", "内存"),
    "panel.label.tip_vram": ("The memory of the graphics card.", "显卡自带的存储器。"),
    "panel.label.tip_ram": ("The main memory of this machine.", "本机的主内存。"),
    "panel.part.rest": ("everything else", "其余程序和系统"),
    "panel.beside.swap": ("page file (swap) left", "页面文件（交换空间）剩余"),
    "panel.beside.commit": ("left with the page file, before Windows refuses", "连同页面文件，Windows 还允许分配"),
    "panel.unknown": ("memory could not be read ({error})", "无法读取显存与内存信息（{error}）"),
    "panel.label.step": ("One step of the {model} takes about {size} of VRAM:", "{model}每一步约需 {size} 显存："),
    "panel.label.swapped": (
        "The other {size} of the model have no room there: they lie in RAM and are copied in every step, which takes time.",
        "模型其余 {size} 放不下：它们留在内存中，每一步都要复制，因此会变慢。",
    ),
    "panel.label.programs": (
        "Other programs hold {size} of VRAM; closing them makes room: {programs}",
        "其他程序占用 {size} 显存，关闭它们可以腾出空间：{programs}",
    ),
    "panel.label.colon": (": ", "："),
    "panel.label.between": (", ", "、"),
    "panel.label.and_others": (", …", "……"),
    "panel.step.weights": ("the model", "模型"),
    "panel.step.factors": ("LoRAs beside it", "旁路 LoRA"),
    "panel.step.other": ("ControlNets and the like", "ControlNet 等"),
    "panel.step.compute": ("kept free for computing", "为计算预留"),
    # The tooltips of these amounts: a name `panel.X` is explained by `panel.about.X`.
    "panel.label.tip_sourced": ("{about} Source of the number: {source}.", "{about}数值来源：{source}。"),
    "panel.label.tip_missing": ("{about} Not known: {reason}.", "{about}未知：{reason}。"),
    "panel.about.part.ours": (
        "What this Forge holds: models, LoRAs and the image in work.",
        "当前 Forge 占用的部分：模型、LoRA 和正在生成的图片。",
    ),
    "panel.about.part.others": (
        "VRAM of the desktop, browsers, games and the driver itself. Closing such programs makes room.",
        "桌面、浏览器、游戏以及驱动本身占用的显存。关闭这类程序可以腾出空间。",
    ),
    "panel.about.part.cache": (
        "VRAM that torch has got from the driver and does not use now. Other programs see it as taken; the next step uses it first.",
        "torch 已从驱动取得但当前未使用的显存。其他程序会视其为已占用；下一步会优先使用。",
    ),
    "panel.about.part.rest": (
        "RAM of the system and of all other programs. What the system gives back at once counts as free.",
        "系统和其他所有程序占用的内存。系统可立即归还的部分计为空闲。",
    ),
    "panel.about.beside.swap": (
        "Space on the disk that stands in for RAM. A model that lies there is slow to read.",
        "磁盘上代替内存的空间。放在其中的模型读取很慢。",
    ),
    "panel.about.beside.commit": (
        "Windows refuses memory at its commit limit, RAM and page file together, even while RAM is free. A larger page file raises it.",
        "Windows 在达到提交上限（内存加页面文件）时拒绝分配，即使内存仍有空闲。增大页面文件可提高上限。",
    ),
    "panel.about.step.weights": (
        "The weights of the model that lie on the card in this step.",
        "这一步中放在显卡上的模型权重。",
    ),
    "panel.about.step.factors": (
        "The matrices of LoRAs that are calculated beside the layers; the model's own weights stay as they are.",
        "在层旁计算的 LoRA 矩阵；模型自身的权重保持不变。",
    ),
    "panel.about.step.other": (
        "Models that run in the same step, such as ControlNets and IP-Adapters.",
        "同一步中运行的其他模型，例如 ControlNet 和 IP-Adapter。",
    ),
    "panel.about.step.compute": (
        "Room for the results between the layers. Larger images and batches need more.",
        "留给各层中间结果的空间。图片越大、批次越大，需要越多。",
    ),
    # The fields of a snapshot.
    "panel.number.vram_total": ("VRAM", "显存总量"),
    "panel.number.vram_free": ("VRAM free, by the driver", "显存剩余（驱动）"),
    "panel.number.vram_free_nvml": ("VRAM free, by NVML", "显存剩余（NVML）"),
    "panel.number.vram_reserved": ("VRAM held by torch", "torch 持有的显存"),
    "panel.number.vram_active": ("of it in use", "其中正在使用"),
    "panel.number.vram_ours": ("VRAM of this Forge", "当前 Forge 的显存"),
    "panel.number.vram_others": ("VRAM of other programs", "其他程序的显存"),
    "panel.number.ram_total": ("RAM", "内存总量"),
    "panel.number.ram_available": ("RAM available", "可用内存"),
    "panel.number.ram_cgroup_room": ("RAM left by control groups", "控制组剩余内存"),
    "panel.number.ram_and_swap_cgroup_room": ("RAM and swap left by control groups", "控制组剩余内存和交换空间"),
    "panel.number.swap_total": ("page file (swap)", "页面文件（交换空间）"),
    "panel.number.swap_free": ("page file (swap) left", "页面文件（交换空间）剩余"),
    "panel.number.commit_limit": ("Windows' commit limit", "Windows 提交上限"),
    "panel.number.commit_charge": ("committed", "已提交"),
    "panel.number.commit_room": ("this Forge may still commit", "当前 Forge 还可提交"),
    "panel.number.pinned": ("pinned RAM", "锁页内存"),
    "panel.number.rss": ("RAM of this Forge", "当前 Forge 的内存"),
    "panel.number.rss_peak": ("the most it had", "其最高值"),
}
