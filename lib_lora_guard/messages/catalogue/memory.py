"""Backups of original weights, and out-of-memory situations."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "memory.no_backup_place": (
        "no place for a backup of {size_mb:.1f} MB: spare are {spare}; free RAM or disk space, or use LoRA mode 'auto'",
        "没有地方存放 {size_mb:.1f} MB 的备份：可用空间为 {spare}；请释放内存或磁盘空间，或使用 LoRA 模式“自动”",
    ),
    "memory.shrunk": (
        "{size_mb:.0f} MB of {model} leave the card for what comes; the rest of it stays",
        "{model} 的 {size_mb:.0f} MB 为后续模型让出显存，其余部分保留",
    ),
    "memory.grown": ("{size_mb:.0f} MB of {model} are back on the card", "{model} 的 {size_mb:.0f} MB 已回到显卡"),
    "memory.chosen": (
        "{model}, calls: {calls}; {comes_mb:.0f} MB of it come to the card, {left_mb:.0f} MB of others leave, {swapped_mb:.0f} MB are "
        "copied in each call; {seconds:.1f} s of copying until the next image, another way {other_seconds:.1f} s "
        "({to_card:.1f} GB/s to the card, {to_ram:.1f} to RAM)",
        "{model}，{calls} 次运行：{comes_mb:.0f} MB 移到显卡，其他模型让出 {left_mb:.0f} MB，每次运行复制 {swapped_mb:.0f} MB；"
        "到下一张图片为止复制共需 {seconds:.1f} 秒，另一种方式需 {other_seconds:.1f} 秒（到显卡 {to_card:.1f} GB/s，到内存 {to_ram:.1f} GB/s）",
    ),
    "memory.pinned": (
        "{size_mb:.0f} MB of {model} now lie in pinned RAM, for faster steps; {total_mb:.0f} MB in all",
        "{model} 的 {size_mb:.0f} MB 已放入锁页内存以加快每步速度，共 {total_mb:.0f} MB",
    ),
    "memory.unpinned": (
        "{size_mb:.0f} MB of pinned RAM are ordinary RAM again; swapped weights go to the card from there",
        "{size_mb:.0f} MB 锁页内存已恢复为普通内存；放不下的权重改由普通内存送往显卡",
    ),
    "memory.left": ("{model} leaves the card, {size_mb:.0f} MB", "{model} 已移出显卡，{size_mb:.0f} MB"),
    "memory.swapped": (
        "{model} comes for a short while (calls: {passes}); {size_mb:.0f} MB of it stay in RAM and are copied in each call, which "
        "moves less than making room would",
        "{model} 只运行 {passes} 次：其中 {size_mb:.0f} MB 留在内存并在每次运行时复制，这比腾出显存所移动的数据更少",
    ),
    "memory.not_moved": (
        "{model} could not leave the card for lack of RAM ({error}); it stays, and what comes is placed beside it",
        "内存不足，{model} 无法移出显卡（{error}）；它留在原处，后续模型使用剩余空间",
    ),
    "memory.ram_room": (
        "{size_mb:.0f} MB would have to go into RAM, where {room_mb:.0f} MB are left with the page file",
        "需要移入内存 {size_mb:.0f} MB，而连同页面文件只剩 {room_mb:.0f} MB",
    ),
    "memory.spare": ("{size_mb:.1f} MB {place}", "{place} {size_mb:.1f} MB"),
    "memory.vram": ("VRAM", "显存"),
    "memory.ram": ("RAM", "内存"),
    "memory.disk": ("disk", "磁盘"),
    "memory.spool": (
        "its {size_mb:.1f} MB cannot be backed up in {folder} ({error}); free disk space, name another folder, or use LoRA "
        "mode 'auto'",
        "其 {size_mb:.1f} MB 无法备份到 {folder}（{error}）；请释放磁盘空间、指定其他文件夹，或使用 LoRA 模式“自动”",
    ),
    "memory.spool_limit": ("{spare_mb:.1f} MB may be used there", "该处只允许使用 {spare_mb:.1f} MB"),
    "memory.spool_lost": (
        "its backup in {path} cannot be read ({error}); reload the checkpoint",
        "其位于 {path} 的备份无法读取（{error}）；请重新加载模型",
    ),
    "memory.file_used": (
        "{model}: the originals of {count} merged weights ({size_mb:.0f} MB) take no RAM: {name} has the same bytes "
        "(compared in {seconds:.2f} s); leave the file in place while LoRAs are merged",
        "{model}：{count} 个已合并权重（{size_mb:.0f} MB）的原值不占内存：{name} 中的数据与其相同（比较用时 {seconds:.2f} 秒）；"
        "LoRA 合并期间请勿移动该文件",
    ),
    "memory.file_unused": (
        "{model}: originals of merged weights are copied, not left to the checkpoint file: {why}",
        "{model}：已合并权重的原值将被复制，而不依赖模型文件：{why}",
    ),
    "memory.file_unfit": ("{name}: {why}", "{name}：{why}"),
    "memory.file_differs": (
        "the first {count} weights that were compared have other bytes than the model",
        "最先比较的 {count} 个权重与模型中的数据不同",
    ),
    "memory.file_slow": (
        "it is read at {rate:.0f} MB/s, and {least:.0f} MB/s are needed; a local SSD is faster",
        "其读取速度为 {rate:.0f} MB/s，至少需要 {least:.0f} MB/s；请改用本地固态硬盘",
    ),
    "memory.file_lost": (
        "{path} no longer has the bytes that it was loaded from ({error}); reload the checkpoint",
        "{path} 中已没有加载时的数据（{error}）；请重新加载模型",
    ),
    "memory.backup_released": ("its backup was released; reload the checkpoint", "其备份已释放；请重新加载模型"),
    "memory.not_restored": (
        "a weight could not be restored ({error}); reload the checkpoint",
        "有权重无法恢复（{error}）；请重新加载模型",
    ),
    "memory.not_restored_at_all": (
        "a weight could not be restored; reload the checkpoint",
        "有权重无法恢复；请重新加载模型",
    ),
    "memory.key_not_restored": ("{key} could not be restored", "{key} 无法恢复"),
    "memory.undo_failed": (
        "an undo step failed; the remaining ones go on",
        "有一个撤销步骤失败；其余步骤继续执行",
    ),
    "memory.merge_slices": (
        "no memory left to patch a weight of {shape}, not even in slices on the CPU",
        "内存不足，无法修改大小为 {shape} 的权重，即使在 CPU 上分片也不行",
    ),
    "memory.merge_whole": (
        "no memory left to patch a weight of {shape}, not even on the CPU",
        "内存不足，无法修改大小为 {shape} 的权重，即使在 CPU 上也不行",
    ),
    "memory.merge_result": (
        "no memory left for a patched weight of {shape}, not even in RAM",
        "没有空间存放修改后大小为 {shape} 的权重，内存中也不够",
    ),
    "memory.slices": (
        "no memory left for the LoRA even in slices of {tokens} tokens. Make the picture smaller, or lower 'GPU Weights' by 500 MB",
        "即使按 {tokens} 个 token 分片，显存仍不足以计算 LoRA。请缩小图片，或将“GPU Weights”降低 500 MB",
    ),
    "memory.layer": (
        "no memory left for the LoRA of this layer. Make the picture smaller, or lower 'GPU Weights' by 500 MB",
        "显存不足以计算此层的 LoRA。请缩小图片，或将“GPU Weights”降低 500 MB",
    ),
    "memory.convolution": (
        "no memory left for the LoRA of this convolution. Make the picture smaller, or lower 'GPU Weights' by 500 MB",
        "显存不足以计算此卷积层的 LoRA。请缩小图片，或将“GPU Weights”降低 500 MB",
    ),
    "memory.on_the_cpu": (
        "{key}: no VRAM left for its LoRA, so this layer's share of it is calculated on the CPU. The picture is as it should "
        "be, but slower; a smaller picture, or 'GPU Weights' lower by 500 MB, avoids this",
        "{key}：显存不足以计算其 LoRA，因此该层的 LoRA 部分改由 CPU 计算。图片不受影响，只是更慢；缩小图片或将“GPU Weights”降低 500 MB 可避免",
    ),
    "memory.layers_on_the_cpu": (
        "{model}: no VRAM left for the LoRAs of {count} layers, so their share is calculated on the CPU. The picture is as it "
        "should be, but slower; a smaller picture, or 'GPU Weights' lower by 500 MB, avoids this",
        "{model}：显存不足以计算 {count} 个层的 LoRA，因此这些层的 LoRA 部分改由 CPU 计算。图片不受影响，只是更慢；"
        "缩小图片或将“GPU Weights”降低 500 MB 可避免",
    ),
    "memory.factors": (
        "no memory left for {size_mb:.1f} MB of LoRA factors. Use fewer LoRAs, or lower 'GPU Weights' by 500 MB",
        "显存不足以存放 {size_mb:.1f} MB 的 LoRA 因子。请减少 LoRA 数量，或将“GPU Weights”降低 500 MB",
    ),
}
