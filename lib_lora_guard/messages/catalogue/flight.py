"""The flight recorder's report after a crash, and the precautions of the next run."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "flight.line": ("{line}", "{line}"),
    "flight.not_kept": (
        "no flight record can be kept in {folder} ({error}); if this program is killed, the next start cannot say why",
        "无法在 {folder} 中保存运行记录（{error}）；如果程序被强行终止，下次启动时将无法说明原因",
    ),
    "flight.damaged": (
        "flight records that are damaged, so that they cannot say why a program was killed: {count} ({first}); they are "
        "deleted",
        "有 {count} 个运行记录已损坏（{first}），无法说明程序为何被强行终止；已将其删除",
    ),
    "flight.given_up": (
        "the flight record can no longer be written ({error}); images are made all the same",
        "无法继续写入运行记录（{error}）；图片仍会照常生成",
    ),
    "flight.died": (
        "the last run was cut off while {phase} (last sign of life: {when})",
        "上次运行在{phase}时中断（最后一次记录：{when}）",
    ),
    "flight.phase_load_checkpoint": ("a checkpoint was being loaded", "加载模型（checkpoint）"),
    "flight.phase_load_text_encoder": ("a text encoder was being loaded", "加载文本编码器"),
    "flight.phase_move_to_gpu": ("a model was being moved to the GPU", "将模型移入显存"),
    "flight.phase_apply_lora": ("LoRAs were being applied", "应用 LoRA"),
    "flight.phase_merge": ("LoRAs were being merged into the model", "将 LoRA 合并进模型"),
    "flight.phase_backup": ("original weights were being backed up", "备份原始权重"),
    "flight.phase_restore": ("original weights were being put back", "恢复原始权重"),
    "flight.phase_encode_prompt": ("the prompt was being encoded", "编码提示词"),
    "flight.phase_sampling_step": ("the image was being sampled", "采样生成图片"),
    "flight.phase_vae_encode": ("the VAE was encoding an image", "VAE 编码图片"),
    "flight.phase_vae_decode": ("the VAE was decoding the image", "VAE 解码图片"),
    "flight.phase_unload": ("a model was being moved from the GPU to RAM", "将模型从显存移到内存"),
    "flight.phase_other": ("something else was being done", "执行其他操作"),
    "flight.model": ("in use then: model {model}", "当时使用的模型：{model}"),
    "flight.loras": ("in use then: {count} LoRA(s): {names}", "当时使用了 {count} 个 LoRA：{names}"),
    "flight.memory": ("last measured: {numbers}", "最后一次测量：{numbers}"),
    "flight.ram_free": ("RAM {gb:.1f} GB available", "可用内存 {gb:.1f} GB"),
    "flight.ram_free_of": (
        "RAM {gb:.1f} of {total_gb:.1f} GB available",
        "可用内存 {gb:.1f} GB（共 {total_gb:.1f} GB）",
    ),
    "flight.swap_free": ("page file {gb:.1f} GB free", "页面文件剩余 {gb:.1f} GB"),
    "flight.swap_free_of": (
        "page file {gb:.1f} of {total_gb:.1f} GB free",
        "页面文件剩余 {gb:.1f} GB（共 {total_gb:.1f} GB）",
    ),
    "flight.vram_free": ("VRAM {gb:.1f} GB free", "空闲显存 {gb:.1f} GB"),
    "flight.vram_free_of": ("VRAM {gb:.1f} of {total_gb:.1f} GB free", "空闲显存 {gb:.1f} GB（共 {total_gb:.1f} GB）"),
    "flight.rss": ("{gb:.1f} GB of RAM used by this program", "本程序占用内存 {gb:.1f} GB"),
    "flight.plan": ("what it was doing was to take {numbers}", "该操作预计需要：{numbers}"),
    "flight.ram": ("{gb:.1f} GB of RAM", "内存 {gb:.1f} GB"),
    "flight.vram": ("{gb:.1f} GB of VRAM", "显存 {gb:.1f} GB"),
    "flight.reason_ram": (
        "likely reason: the system ran out of memory; {need_gb:.1f} GB of RAM were needed and {alive_gb:.1f} GB were left, page file included",
        "可能的原因：系统内存耗尽；需要 {need_gb:.1f} GB 内存，而包括页面文件在内只剩 {alive_gb:.1f} GB",
    ),
    "flight.reason_little": (
        "likely reason: the system ran out of memory; {alive_gb:.1f} GB were left, page file included",
        "可能的原因：系统内存耗尽；包括页面文件在内只剩 {alive_gb:.1f} GB",
    ),
    "flight.reason_enough": (
        "reason unknown: by these numbers there was enough memory; perhaps the program was closed by hand",
        "原因不明：从这些数字看内存足够；程序可能是被手动关闭的",
    ),
    "flight.reason_unknown": (
        "reason unknown; perhaps the program was closed by hand",
        "原因不明；程序可能是被手动关闭的",
    ),
    "flight.page_file": (
        "set the page file to {size_gb} GB or more (Windows: System > About > Advanced system settings > Performance > Advanced > Virtual memory), on a disk with that much space",
        "请将页面文件（虚拟内存）设为 {size_gb} GB 或更大（Windows：系统 > 关于 > 高级系统设置 > 性能 > 高级 > 虚拟内存），并确保所在磁盘有足够空间",
    ),
    "flight.swap_file": ("make the swap space {size_gb} GB or larger", "请将交换空间（swap）设为 {size_gb} GB 或更大"),
    "flight.fewer_loras": (
        "use fewer LoRAs at once ({count} were in use)",
        "请减少同时使用的 LoRA（当时使用了 {count} 个）",
    ),
    "flight.smaller_format": (
        "use the model in a smaller file format: {formats}",
        "请使用更小文件格式的模型：{formats}",
    ),
    "flight.avoid_no_merge": (
        "after the last crash: LoRAs are not merged into this model this time, so that no backup of its weights is needed",
        "鉴于上次中断：本次不将 LoRA 合并进此模型，从而无需备份其权重",
    ),
    "flight.avoid_partial_unload": (
        "after the last crash: only as much of a model is moved to RAM as the next step needs",
        "鉴于上次中断：只把下一步所需的那部分模型移到内存",
    ),
    "flight.avoid_tiled_vae": (
        "after the last crash: the VAE decodes in tiles this time",
        "鉴于上次中断：本次 VAE 以分块方式解码",
    ),
    "flight.avoid_tiled_encode": (
        "after the last crash: the VAE encodes in tiles this time",
        "鉴于上次中断：本次 VAE 以分块方式编码",
    ),
    "flight.avoid_drop_caches": (
        "after the last crash: caches of LoRA files are released before something large is loaded",
        "鉴于上次中断：加载大型文件之前，先释放 LoRA 文件缓存",
    ),
}
