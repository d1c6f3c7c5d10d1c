"""The answer of `lora-guard plan`, and of `inspect --model`, in one line."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "plan.fits": (
        "Fits: needs {vram:.1f} GB of VRAM, {vram_there:.1f} GB free, and {ram:.1f} GB of RAM with the system's {system:.0f} GB, "
        "{ram_there:.1f} GB there",
        "放得下：需要 {vram:.1f} GB 显存（空闲 {vram_there:.1f} GB），以及 {ram:.1f} GB 内存（含系统的 {system:.0f} GB，"
        "共有 {ram_there:.1f} GB）",
    ),
    "plan.fits_slowly": (
        "Fits, but slowly: {gb:.1f} GB of the model lie in RAM and are copied to the card in every step; needs {ram:.1f} GB of RAM "
        "with the system's {system:.0f} GB, {ram_there:.1f} GB there",
        "放得下，但较慢：模型有 {gb:.1f} GB 放在内存中，每一步都要复制到显卡；需要 {ram:.1f} GB 内存（含系统的 {system:.0f} GB，"
        "共有 {ram_there:.1f} GB）",
    ),
    "plan.misfit": ("Does not fit: {why}", "放不下：{why}"),
    "plan.unusable": ("Does not fit: {why}", "不适用：{why}"),
    "plan.without": (
        "Cannot be used on this model: {names} (why: below)",
        "无法用于此模型：{names}（原因见下）",
    ),
    "plan.misfit_open": (
        "Does not fit, even without {parts}: {why}",
        "放不下（还未计入{parts}）：{why}",
    ),
    "plan.open": (
        "Open: {vram:.1f} GB of VRAM and {ram:.1f} GB of RAM with the system's {system:.0f} GB without {parts}, whose size is not "
        "known; give the file with --with FILE",
        "暂时无法确定：需要 {vram:.1f} GB 显存和 {ram:.1f} GB 内存（含系统的 {system:.0f} GB），其中未计入{parts}，因为大小未知；"
        "请用 --with 文件名 指定该文件",
    ),
    "plan.needs_ram": (
        "needs {needed:.1f} GB of RAM and {system:.0f} GB for the system, {there:.1f} GB there",
        "需要 {needed:.1f} GB 内存，另加系统的 {system:.0f} GB，而只有 {there:.1f} GB",
    ),
    "plan.needs_vram": (
        "needs {needed:.1f} GB of VRAM, {there:.1f} GB free",
        "需要 {needed:.1f} GB 显存，而空闲的只有 {there:.1f} GB",
    ),
    "plan.instead_file": (
        "{name} (about {gb:.1f} GB to download) would",
        "换成 {name}（下载大小约 {gb:.1f} GB）就放得下",
    ),
    "plan.instead_text": (
        "{text} as the text encoder would",
        "把文本编码器换成 {text} 就放得下",
    ),
    "plan.instead_both": (
        "{name} (about {gb:.1f} GB to download) with {text} would",
        "换成 {name}（下载大小约 {gb:.1f} GB）并搭配 {text} 就放得下",
    ),
    "plan.instead_on_card": (
        "{name} (about {gb:.1f} GB to download) would stay on the card",
        "换成 {name}（下载大小约 {gb:.1f} GB）就能全部放在显卡上",
    ),
    "plan.instead_none": (
        "no smaller file of this model is known that would",
        "目前没有已知的更小模型文件能放得下",
    ),
    "plan.instead_picture": (
        "a picture of {width}x{height} would",
        "图片改为 {width}x{height} 就放得下",
    ),
    "plan.beside": (
        "Counted beside the model file: {parts}",
        "模型文件之外计入的部分：{parts}",
    ),
    "plan.beside_assumed": (
        "Counted beside the model file: {parts}. What is assumed is what most people load; --with FILE... counts your own files.",
        "模型文件之外计入的部分：{parts}。“假定”是指多数人使用的文件；可用 --with 文件名 计入您自己的文件。",
    ),
    "plan.part_given": ("{name} {gb:.1f} GB", "{name} {gb:.1f} GB"),
    "plan.part_assumed": ("{name} {gb:.1f} GB (assumed)", "{name} {gb:.1f} GB（假定）"),
    "plan.machine": (
        "Read from this machine: {facts}",
        "从本机读取：{facts}",
    ),
    "plan.machine_vram": (
        "{gb:.1f} GB of VRAM that Forge will find free",
        "Forge 启动时可用的显存 {gb:.1f} GB",
    ),
    "plan.machine_ram": ("{gb:.1f} GB of RAM", "内存 {gb:.1f} GB"),
    "plan.machine_card": ("{name}", "{name}"),
    "plan.counted_as": (
        "{card} is not among the known cards: counted as {known}, the nearest of them. Only the times depend on that: they are "
        "those of {known}.",
        "未知的显卡 {card}：按最接近的 {known} 计算。受影响的只有时间：所示时间是 {known} 的。",
    ),
    "plan.counted_by_memory": (
        "{card} is not among the known cards, and its name does not say how fast it is: counted as {known}, a usual card for "
        "{gb:.1f} GB of VRAM. Only the times depend on that: they are those of {known}.",
        "未知的显卡 {card}，从名称也看不出速度：按 {known} 计算，它是显存 {gb:.1f} GB 时的常见显卡。受影响的只有时间：所示时间是 {known} 的。",
    ),
    "plan.no_card": (
        "no NVIDIA card answers here; say how much VRAM is meant, such as --vram 12GB",
        "读取不到本机的 NVIDIA 显卡；请指定显存大小，例如 --vram 12GB",
    ),
    "plan.no_ram": (
        "the system does not say how much RAM there is; give it, such as --ram 16GB",
        "读取不到内存大小；请指定，例如 --ram 16GB",
    ),
    "plan.no_part": (
        "expected a text encoder or a VAE, found neither; give the checkpoint first, then the LoRAs, and only those with --with",
        "应为文本编码器或 VAE，但两者都不是；请先写模型文件，再写 LoRA，--with 之后只写文本编码器与 VAE",
    ),
    "inspect.fits": (
        "Fits {model}: {used} of {of} modules are used",
        "适合 {model}：{of} 个模块中使用 {used} 个",
    ),
    "inspect.misfit": ("Does not fit {model}: {why}", "不适合 {model}：{why}"),
    "inspect.is": (
        "{name}: LoRA for {made_for}",
        "{name}：适用于 {made_for} 的 LoRA",
    ),
    "inspect.not_shown": (
        "an architecture that its names and sizes do not show",
        "从名称与大小看不出的架构",
    ),
}
