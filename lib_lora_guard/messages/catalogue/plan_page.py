"""The page of `lora-guard plan` below its answer: the model, the LoRAs, and the table of predictions."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    # The model.
    "plan.model": ("{name}: {architecture}, {container}, {size}", "{name}：{architecture}，{container}，{size}"),
    "plan.unknown_architecture": ("architecture not known", "未知架构"),
    "plan.parts": ("  {parts}", "  {parts}"),
    "plan.parts_missing": (
        "  {parts}; {missing} not or not all in this file",
        "  {parts}；此文件中没有或不全：{missing}",
    ),
    "plan.part_size": ("{part} {size}", "{part} {size}"),
    "plan.part.denoiser": ("U-Net or transformer", "U-Net 或 transformer"),
    "plan.part.text_encoders": ("text encoders", "文本编码器"),
    "plan.part.vae": ("VAE", "VAE"),
    "plan.part.other": ("other", "其他"),
    "plan.kind.language_model": ("language model", "语言模型"),
    "plan.kind.text_encoder": ("text encoder", "文本编码器"),
    "plan.stored": ("  stored as {shares}", "  存储格式：{shares}"),
    "plan.stored_scaled": ("  stored as {shares} (scaled)", "  存储格式：{shares}（带缩放）"),
    "plan.grown": ("{stored}, {size} larger once Forge has loaded it", "{stored}，由 Forge 加载后增大 {size}"),
    "plan.step": (
        "  a step needs {size} beside weights (Forge's own estimate: {forge}, of which its placement sees {seen})",
        "  除权重外，每步需要 {size}（Forge 自己的估算：{forge}，放置模型时只计入 {seen}）",
    ),
    # A LoRA.
    "plan.lora": ("{name}, strength {strength}: {made_for}, {size}", "{name}，强度 {strength}：{made_for}，{size}"),
    "plan.made_for": ("made for {architecture}", "适用于 {architecture}"),
    "plan.made_for_unknown": (
        "made for an architecture that it does not show",
        "看不出适用的架构",
    ),
    "plan.kinds": ("  {facts}, {size} of tensors", "  {facts}，张量共 {size}"),
    "plan.rank": ("rank {ranks}", "秩 {ranks}"),
    "plan.dora": ("DoRA on {count}", "其中 {count} 个为 DoRA"),
    "plan.refused": ("  CANNOT BE USED: {why}", "  无法使用：{why}"),
    "plan.used": (
        "  {used} modules used, {skipped} keys skipped, {lost} lost",
        "  使用 {used} 个模块，跳过 {skipped} 个键，无法应用 {lost} 个键",
    ),
    "plan.first_skipped": ("  first skipped: {key}", "  跳过的第一个：{key}"),
    "plan.first_lost": ("  first lost: {key}", "  无法应用的第一个：{key}"),
    "plan.left_out": ("  left out: {modules} of {of} modules", "  未应用：{of} 个模块中的 {modules} 个"),
    "plan.mode": ("  {mode} on {count} weights ({reasons}): {size}", "  {mode}：{count} 个权重（{reasons}），{size}"),
    "plan.no_strength": (
        "  strength 0: it changes nothing in the picture",
        "  强度为 0：对图片没有任何影响",
    ),
    # The table.
    "plan.predicted": (
        "Predicted for {card}, {vram} VRAM free, {ram} RAM; {width}x{height}, batch {batch}",
        "预测：{card}，空闲显存 {vram}，内存 {ram}；{width}x{height}，每批 {batch} 张",
    ),
    "plan.row.head": ("predicted", "预测"),
    "plan.row.vram": ("VRAM peak while sampling", "采样时的显存峰值"),
    "plan.row.on_gpu": ("model on the GPU", "显卡上的模型"),
    "plan.row.swapped": ("model swapped to RAM", "换出到内存的模型"),
    "plan.row.lora": ("LoRA on the GPU", "显卡上的 LoRA"),
    "plan.row.ram": ("RAM peak", "内存峰值"),
    "plan.row.backups": ("of it backups", "其中权重副本"),
    "plan.row.apply": ("time to apply", "应用 LoRA 用时"),
    "plan.row.change": ("time to change a strength", "更改强度用时"),
    "plan.row.step": ("extra time per step", "每步增加的时间"),
    "plan.row.left": ("of the LoRA is left", "LoRA 的保留程度"),
    "plan.row.fits": ("fits", "放得下"),
    "plan.effect.whole": ("whole", "完整"),
    "plan.effect.nearly_whole": ("nearly whole", "几乎完整"),
    "plan.effect.mostly_lost": ("mostly lost", "大部分丢失"),
    "plan.effect.none": ("none", "无"),
    "plan.fits.yes": ("yes", "是"),
    "plan.fits.no": ("NO", "否"),
    "plan.fits.open": ("open", "待定"),
    "plan.seconds": ("{seconds} s", "{seconds} 秒"),
    # Below the table.
    "plan.not_counted": (
        "Not counted, because nothing is known of it: {parts}. Whether all of it fits is open.",
        "大小未知、因而未计入：{parts}。是否全部放得下，尚不能确定。",
    ),
    "plan.assumed": (
        "Assumed for {card}: memory {stream:.0f} GB/s, 16-bit matrices {tflops:.0f} TFLOPS of which {percent:.0f} % are reached, PCIe "
        "{pinned:.0f} GB/s pinned, {to_gpu:.1f} from and {to_ram:.1f} to ordinary RAM, {merged:g} G weights/s merged on the CPU. GB are 2^30 "
        "bytes except in rates. Times are good to a factor of 2 or 3, and know no page file.",
        "对 {card} 的假定：显存带宽 {stream:.0f} GB/s，16 位矩阵运算 {tflops:.0f} TFLOPS（实际达到 {percent:.0f} %），PCIe 锁页内存 "
        "{pinned:.0f} GB/s，普通内存读取 {to_gpu:.1f}、写入 {to_ram:.1f} GB/s，CPU 合并每秒 {merged:g} G 个权重。除速率外，1 GB 指 2^30 字节。"
        "时间的误差在 2 至 3 倍以内，且未考虑页面文件（虚拟内存）。",
    ),
    "plan.advice": ("- {line}", "- {line}"),
    "plan.asked_mode": (
        "LoRA Guard was asked for mode {mode}; nothing is asked of Forge.",
        "LoRA Guard 按要求使用 {mode} 模式；对 Forge 没有要求。",
    ),
}
