"""The settings section "LoRA Guard"."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "settings.enable": ("Use LoRA Guard", "启用 LoRA Guard"),
    "settings.enable.info": (
        "off: Forge's own LoRA patcher does the work, as if the extension were not there",
        "关闭后由 Forge 自带的 LoRA 补丁功能处理，如同未安装本扩展",
    ),
    "settings.mode": ("LoRA mode", "LoRA 模式"),
    "settings.mode.info": (
        "how LoRAs reach the model; a change takes effect with the next image",
        "LoRA 作用于模型的方式；更改从下一张图片起生效",
    ),
    "settings.mode.automatic": ("Automatic", "自动"),
    "settings.mode.automatic.info": (
        "the best way for each weight; never loses part of a LoRA to the rounding of a small format",
        "为每个权重选择最合适的方式；不会因低精度格式的舍入而损失 LoRA 的效果",
    ),
    "settings.mode.fp16": ("fp16 LoRA", "fp16 LoRA"),
    "settings.mode.fp16.info": (
        "LoRAs stay beside the weights, which are never changed: the quickest change of LoRAs, slightly slower steps",
        "LoRA 与权重分开存放，权重从不改变：切换 LoRA 最快，每步略慢",
    ),
    "settings.mode.merge": ("Merge", "合并"),
    "settings.mode.merge.info": (
        "LoRAs go into the weights wherever nothing of them is lost: the fastest steps, more RAM, slower changes",
        "在不损失效果的前提下将 LoRA 合并进权重：每步最快，占用内存更多，切换较慢",
    ),
    "settings.mode.own": ("Forge's own", "Forge 自带"),
    "settings.mode.own.info": (
        "Forge's code applies LoRAs, as chosen under “Diffusion in Low Bits”",
        "由 Forge 的代码应用 LoRA，遵循“Diffusion in Low Bits”中的选择",
    ),
    "settings.plan_residency": ("Plan VRAM for the whole image", "按整张图片规划显存"),
    "settings.plan_residency.info": (
        "in Forge, what stays on the card is chosen by the steps of the image and the measured speed of copying; off: the model takes all room "
        "before its steps",
        "在 Forge 中，根据图片的步数和实测的复制速度决定哪些内容留在显卡上；关闭后模型在采样前占用全部可用空间",
    ),
    "settings.pin_swapped": ("Pinned RAM for weights that do not fit on the card", "用锁页内存存放显卡放不下的权重"),
    "settings.pin_swapped.info": (
        "steps with swapped weights become faster; takes up to an eighth of RAM, on machines with 32 GB or more; off: ordinary RAM",
        "权重每一步都要复制到显卡时，速度更快；仅在内存不少于 32 GB 的电脑上使用，最多占用八分之一；关闭后使用普通内存",
    ),
    "settings.fast_kernels": ("Fast kernels (Triton)", "快速内核（Triton）"),
    "settings.fast_kernels.info": (
        "on fp8, NF4 and GGUF weights one pass makes the weight with its LoRAs in it; compiled in the background of the first image, where "
        "Triton is installed; a change takes effect with the next image",
        "一次计算即得到含 LoRA 的 fp8、NF4 和 GGUF 权重；装有 Triton 时，在生成第一张图片期间于后台编译；更改从下一张图片起生效",
    ),
    "settings.fast_host_cast": ("Fast kernels for layers without a LoRA too", "无 LoRA 的层也使用快速内核"),
    "settings.fast_host_cast.info": (
        "of models that have LoRAs; the numbers are the same as the WebUI's own; a change takes effect with the next LoRA that is added",
        "仅限使用 LoRA 的模型；数值与 WebUI 自身一致；更改从下一次添加 LoRA 起生效",
    ),
    "settings.file_backups": (
        "Merge: leave the original weights to the checkpoint file",
        "合并：由模型文件保留原始权重",
    ),
    "settings.file_backups.info": (
        "where a safetensors file has the very bytes of a 16-bit weight on the card, its original takes no RAM and is read again when a LoRA "
        "changes; the file is open meanwhile, and Windows does not let it be deleted or replaced; off: copies in RAM",
        "若 safetensors 文件中的数据与显卡上 16 位权重完全相同，则其原值不占内存，更换 LoRA 时重新读取；在此期间该文件保持打开，"
        "Windows 不允许删除或替换该文件；关闭后在内存中保留副本",
    ),
    "settings.merge_from_file": (
        "Automatic: merge where the checkpoint file has the originals",
        "自动：若模型文件中有原值则合并",
    ),
    "settings.merge_from_file.info": (
        "steps as fast as without a LoRA, changes take a second or more; a merge rounds to 16 bits, so pictures differ a little from those "
        "of a bypass, and from those of a card that has less room or another file",
        "每步与不用 LoRA 时一样快，更换 LoRA 需一秒或更久；合并会舍入到 16 位，因此图片与旁路方式略有不同，"
        "也与显存较小的显卡或使用其他文件时略有不同",
    ),
    "settings.lora_cards": ("Base model and rank on LoRA cards", "在 LoRA 卡片上显示底模与秩"),
    "settings.lora_cards.info": (
        "each card says what the file was made for and whether it fits the chosen checkpoint, read from the headers in the background; shown "
        "after Refresh",
        "每张卡片说明该文件适用的底模，以及能否用于所选的模型；信息在后台从文件头读取，刷新后显示",
    ),
    "settings.kept_files_mb": ("LoRA files kept in RAM, in MB", "内存中保留的 LoRA 文件（MB）"),
    "settings.kept_files_mb.info": (
        "a LoRA used again within this budget is not read from disk a second time; an eighth of this computer's RAM unless you set it, "
        "given back when RAM is short; 0 keeps none",
        "在此额度内再次使用的 LoRA 无需重新从磁盘读取；不设置时为本机内存的八分之一，内存不足时会自动释放；0 表示不保留",
    ),
    "settings.log_level": ("Log level", "日志级别"),
    "settings.log_level.info": (
        "how much LoRA Guard writes to the console and to its tab",
        "LoRA Guard 写入控制台及其标签页的详细程度",
    ),
    "settings.level.debug": ("debug: everything", "debug：全部"),
    "settings.level.info": ("info: every change", "info：每次更改"),
    "settings.level.warning": ("warning: only what needs attention", "warning：仅需要注意的内容"),
    "settings.level.error": ("error: only failures", "error：仅失败"),
    "settings.language": ("Language", "语言"),
    "settings.language.info": (
        "of the log, the tab and this page; this page follows with Reload UI",
        "日志、标签页和本页面的语言；本页面在 Reload UI 后更新",
    ),
    "settings.language.auto": ("like the WebUI or the browser", "跟随 WebUI 或浏览器"),
    "settings.allocator": (
        "The CUDA allocator: how torch divides the memory of an NVIDIA GPU. The tab “LoRA Guard” shows what is in force.",
        "CUDA 分配器：torch 如何划分 NVIDIA 显卡的显存。当前生效的设置见“LoRA Guard”标签页。",
    ),
    "settings.expandable_segments": ("Expandable segments", "可扩展显存段（expandable segments）"),
    "settings.expandable_segments.info": (
        "memory grows in place instead of in blocks of fixed size, so that less of it is lost to gaps",
        "显存段可原地增长，而非固定大小的块，从而减少碎片造成的浪费",
    ),
    "settings.max_split_size_mb": (
        "Largest block that may be split, in MB",
        "允许拆分的最大块（MB，max split size）",
    ),
    "settings.max_split_size_mb.info": (
        "larger blocks stay whole, which helps against fragments; 0 leaves it to torch",
        "更大的块保持完整，有助于减少碎片；0 表示由 torch 决定",
    ),
    "settings.garbage_collection_threshold": ("Garbage collection threshold", "垃圾回收阈值"),
    "settings.garbage_collection_threshold.info": (
        "share of the GPU's memory above which torch gives unused blocks back by itself; 0 leaves it to torch",
        "显存占用超过此比例时 torch 主动释放未使用的块；0 表示由 torch 决定",
    ),
}
