"""The report of `lora-guard bake`."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "bake.written": (
        "{name}: {size} written; LoRAs baked into {baked} tensors ({formats}), {copied} copied bit for bit, {converted} "
        "converted",
        "{name}：已写入 {size}；{baked} 个张量合并了 LoRA（{formats}），{copied} 个原样复制，{converted} 个转换了精度",
    ),
    "bake.needs_suffix": (
        "expected a name that ends in {suffix}, by which programs know what to read",
        "文件名应以 {suffix} 结尾，其他程序据此识别文件格式",
    ),
    "bake.is_read": (
        "is one of the files that are read; give the new file another name",
        "这是要读取的文件之一；请为新文件另取名称",
    ),
    "bake.is_there": (
        "is there already; give another name, or --force to replace it",
        "文件已存在；请另取名称，或加 --force 替换它",
    ),
    "bake.lora_gone": ("cannot be read any more ({error}); try again", "已无法读取（{error}）；请重试"),
    "bake.nothing_fits": (
        "none of its {count} modules can be applied (first: {first}); use a LoRA made for this model, and a checkpoint that has the parts it "
        "changes",
        "其 {count} 个模块都无法应用（第一个：{first}）；请使用适用于此模型的 LoRA，以及包含其所修改部分的模型文件",
    ),
    "bake.removed_unfinished": (
        "removed what bakes that were killed have left here: {count} files, {size}",
        "已删除此处被强行终止的合并任务留下的 {count} 个文件，共 {size}",
    ),
    "bake.lora": (
        "{name}, strength {strength}: {used} modules used, {skipped} keys skipped, {lost} lost",
        "{name}，强度 {strength}：使用 {used} 个模块，跳过 {skipped} 个键，无法应用 {lost} 个键",
    ),
    "bake.skipped": ("skipped: {key}", "跳过：{key}"),
    "bake.lost": ("LOST: {key}", "无法应用：{key}"),
    "bake.more": ("and {count} more; --json lists them all", "另有 {count} 个；加 --json 可列出全部"),
    "bake.effect": (
        "what is left of the LoRAs after rounding: cosine with the exact change {cosine}; 1 is all of it, 0 is noise",
        "舍入后保留的 LoRA 效果：与精确改动的余弦相似度 {cosine}；1 为完全保留，0 为只剩噪声",
    ),
    "bake.no_effect": (
        "the LoRAs change nothing at these strengths: the new file has the values of the model",
        "在这些强度下 LoRA 没有带来任何改动：新文件的数值与原模型相同",
    ),
    "bake.too_coarse_fp8": (
        "fp8 is too coarse for these LoRAs: bake with --dtype bf16, or keep the LoRA in a file of its own and let LoRA "
        "Guard apply it beside the fp8 weights without loss",
        "fp8 精度过低，无法承载这些 LoRA：请用 --dtype bf16 合并，或保留独立的 LoRA 文件，由 LoRA Guard 在 fp8 权重之外无损应用",
    ),
    "bake.too_coarse": (
        "16 bits are coarse for LoRAs as weak as these: --dtype fp32 holds all of them, and so does a LoRA in a file of "
        "its own",
        "对于效果如此微弱的 LoRA，16 位精度偏低：用 --dtype fp32 或保留独立的 LoRA 文件都能完整保留效果",
    ),
    "bake.beyond": (
        "{count} values lie beyond the range of the new dtype and became its largest number; another --dtype holds them",
        "有 {count} 个数值超出新精度的范围，已取其最大值；换用其他 --dtype 可完整保留",
    ),
    "bake.cost": (
        "{seconds} s, RAM peak {peak} above the start; the largest weight takes {largest} in fp32, the LoRAs {factors}",
        "用时 {seconds} 秒，内存峰值比开始时高 {peak}；最大的权重以 fp32 计为 {largest}，LoRA 为 {factors}",
    ),
}
